"""Taylor mode: the k-th derivative along one direction, at a cost that is polynomial in k.

``series`` has the recurrences for coefficients, ``jets`` the tensor that carries them, ``rules``
one rule for each operation of torch, and ``directional`` the derivative itself.
"""
