"""What torch's autograd lacks for penalties. Nothing here knows what a penalty is.

``derivatives`` takes derivatives of any order, ``graph`` reads autograd graphs, ``isolation`` runs
a forward without side effects, ``kernels`` chooses kernels that have a double backward,
``norm_layers`` writes out layers whose third derivative is wrong in torch, ``activations`` catches
outputs of submodules, ``known_gradient`` makes values with a gradient that is already known,
``random`` draws from a penalty's own generator, ``distributed`` is what ranks share, ``numerics``
is arithmetic on rows ``[G, n]``, ``taylor`` propagates truncated Taylor series, and ``compat``
holds all private API of torch that is used, by Lightning's part too.

To add a rule of Taylor mode for an operation: decorate it with ``@rule("name")`` in
``taylor/rules.py``, and add a function that uses it to the tests of Taylor mode.
"""
