"""What a compiled loss and the penalties inside of it tell each other.

``calls``: the calls of penalties, recorded in a step that is not compiled, and repeated in the
graph; ``points``: tensors that require grad, inside of a graph.
"""
