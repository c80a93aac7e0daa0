"""`compile`: a loss with penalties inside as one compiled graph.

``entry`` is the way in, ``loss`` runs the graphs, ``plans`` makes them, ``parity`` compares them
with the eager loss, in numbers and in time, ``obstacles`` says why a loss cannot be compiled.
"""
