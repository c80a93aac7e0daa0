"""Taylor mode: the k-th derivative along one direction, at a cost that is polynomial in k.

- ``series``: recurrences for the coefficients of power series.
- ``jets``: a tensor that carries the coefficients through a function.
- ``rules``: one rule for each operation of torch.
- ``directional``: the directional derivative.
"""
