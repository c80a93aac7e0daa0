"""The axes of `GradientPenalty`: one file for each argument, named as the argument.

``of`` what is differentiated, ``wrt`` with respect to what, ``scope`` the groups that have a norm
each, ``form`` what is done to the norm, ``at`` where the derivative is taken, ``weight`` and
``adaptive`` the factor at a step; ``environments`` the statistics of environments. ``call`` and
``samples`` read what a penalty was called with.

To add a form: subclass `Form` in ``form.py`` with one method, ``value``, and name it in ``FORMS``.
To add a point: subclass `At` in ``at.py`` with one method, ``choose``, and name it in ``POINTS``.
To add a schedule: subclass `Weight` in ``weight.py`` with one method, ``__call__``.
Export it in ``gpkit/__init__.py``, and add a row to the table of cases in ``tests/support``.

>>> from dataclasses import dataclass
>>> import torch
>>> from gpkit.axes.form import Form
>>> @dataclass(frozen=True)
... class quartic(Form):
...     def value(self, squared_norms):
...         return squared_norms**2
>>> quartic()(torch.tensor([4.0]))  # n = 2
tensor([16.])
"""
