"""Does a form bend a random estimate of n²?"""

from __future__ import annotations

import warnings

import torch

from gpkit.axes.form import Form
from gpkit.estimators.base import Estimator, Target
from gpkit.finding import Finding, FoundWarning


def warn_of_bias(form: Form, estimator: Estimator, target: Target, order: int) -> None:
    """Warn of a form that bends a random estimate of n²: it is right on average for n² alone."""
    if not estimator.is_random(target, order) or _is_linear(form):
        return
    why = (
        f"form={type(form).__name__} is not linear in n², and estimator={type(estimator).__name__} "
        "gives a random estimate of n²: the root of an estimate is not the estimate of the root. "
        'Use estimator="exact", form="squared", or more draws (the bias falls as 1/n)'
    )
    warnings.warn(FoundWarning(Finding("biased-estimate", "warning", why)), stacklevel=2)


def _is_linear(form: Form) -> bool:
    """Whether a form is a multiple of n², plus a constant."""
    if not isinstance(getattr(form, "center", 0), (int, float)):
        return False  # a tensor or an average
    n2 = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    values = form.value(n2)
    return torch.allclose(values - values[0], (values[1] - values[0]) * n2)
