"""Extensions of torch's autograd that penalties need. Nothing here depends on penalties.

- ``derivatives``: derivatives of any order.
- ``graph``: reads autograd graphs.
- ``isolation``: runs a forward pass without side effects, on kernels that have a double backward.
- ``norm_layers``: computes norm layers whose third derivative is wrong in torch.
- ``activations``: captures the outputs of submodules.
- ``known_gradient``: creates a value with a gradient that is already known.
- ``random``: random numbers from a penalty's own seed.
- ``distributed``: statistics over the ranks of a distributed run.
- ``numerics``: norms and arithmetic of rows ``[G, n]``.
- ``sharding``: derivatives of nets whose weights FSDP2 has sharded, and all private API of FSDP2.
- ``taylor``: propagates truncated Taylor series.
- ``compat``: all private API of torch that gpkit uses.

To add a Taylor-mode rule for an operation: decorate a function with ``@rule("name")`` in
``taylor/rules.py``, and add a function that uses the operation to the tests of Taylor mode.
"""
