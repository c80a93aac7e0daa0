"""The shortcut of a call that repeats an earlier one: its arithmetic alone.

A call asks much that has the same answer at each step: what was given, which modules run, what
they write to, whether their graph has the derivatives, and whether the penalty trains it. Where the
axes and the net are those of an earlier call, `Function` computes the same numbers by the same
functions without asking, and `Scores` does where the graph is. Whatever is new takes the long way
through `GradientPenalty.evaluate`.
`Steps` do the same for `with_loss` by finite differences in the weights, whose graph is compared
node by node with the one before.
"""
