"""The axes of `GradientPenalty`: most files have the name of the argument that they implement.

- ``of``: what is differentiated.
- ``wrt``: the variables of the derivative; ``activation``: the output of a submodule, for both.
- ``scope``: the groups; each group has one norm.
- ``form``: the function of the norm; ``average``: a running average as its centre.
- ``at``: the points where the derivative is taken; ``mixtures``: points in a box, and mixtures.
- ``weight`` and ``adaptive``: the factor at each optimiser step.
- ``environments``: the statistics of `EnvironmentPenalty`.

``call`` holds the arguments of a call. The estimators are in ``gpkit/estimators``.

To add a form: subclass `Form` in ``form.py``, define ``value``, and add the class to ``FORMS``.
To add points: subclass `At` in ``at.py``, define ``choose``, and add the class to ``POINTS``.
To add a schedule: subclass `Weight` in ``weight.py`` and define ``__call__``.
Then export it in ``gpkit/__init__.py``, and add a row to the table of cases in ``tests/support``.

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
