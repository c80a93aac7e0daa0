"""Derivatives of nets whose weights FSDP2 has sharded.

``gathering`` keeps the weights gathered while a graph is differentiated, and gathers them once more
for the backward pass through the derivative. ``compat`` holds the private API of FSDP2.
"""
