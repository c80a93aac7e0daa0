"""Estimators that take no gradient in the variables, so that one backward pass trains them.

``random_difference`` evaluates the function at one more point, ``jvp`` runs it in forward mode, and
``stencil`` evaluates it at points along each axis.
"""
