"""Norms of gradients in the weights from the inputs and outputs of layers ("ghost norms").

``recording`` notes the calls of the layers in a forward pass. ``rules`` has the gradient in each
parameter of a layer, ``gram`` the norm of a sum of outer products. ``norms`` puts them together.

To add a layer: a function under ``@rule(nn.MyLayer)`` in ``rules``, and a net that has it in
``tests/autodiff/layers``.
"""
