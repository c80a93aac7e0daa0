"""Plausible bugs, put into gpkit one at a time: does the comparison notice each of them?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from gpkit import formula
from gpkit.autodiff import derivatives, isolation, numerics
from gpkit.axes import at, average, form, parameters
from gpkit.estimators import base
from gpkit.estimators.compared import Compared
from gpkit.penalty import Penalty
from tests.property.config import CENTERED, Config


@dataclass(frozen=True)
class Break:
    """What is replaced by what, and which configurations are concerned at all."""

    where: Any
    name: str
    new: Any
    concerns: Callable[[Config], bool] = lambda c: True


def rows_over_channels(rows: Any, norm: str) -> torch.Tensor:
    """The norm over the first dimension of a sample alone, as `norm(dim=1)` is on images."""
    rows = [tuple(part[:, : max(1, part.shape[1] // 2)] for part in row) for row in rows]
    return numerics.reduce_rows(rows, norm)


def over_the_batch(rows: Any, norm: str) -> torch.Tensor:
    """One norm of the whole batch, for each sample."""
    n2 = numerics.reduce_rows(rows, norm)
    return n2.sum().expand_as(n2)


def one_alpha(alpha: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return alpha[:1].to(x.dtype)


def alpha_per_entry(alpha: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.rand(x.shape).to(x.dtype)


def every_forgotten(self: Penalty, step: int) -> float:
    return 0.0 if step % self.every else float(self._given)


def lower_order(y: Any, xs: Any, order: int, *, batched: bool) -> Any:
    return derivatives.derivative_rows(y, xs, min(order, 2), batched=batched)


def before_the_update(self: average.running_average, norms: torch.Tensor) -> Any:
    return self.value


def detached_centre(self: average.running_average, norms: torch.Tensor) -> Any:
    return self.value if self.use == "before" else self.updated(norms.detach())


def unused_refused(y: Any, xs: Any, times: Any = None) -> Any:
    return torch.autograd.grad(y, xs, times, create_graph=True)


def always_detached(self: at.At, real: Any, fake: Any, rng: Any) -> Any:
    return tuple(x.detach().requires_grad_() for x in self.choose(real, fake, rng))


def dropped_last(self: parameters.weights, given: Any) -> Any:
    return CHOSEN(self, given)[:-1] or CHOSEN(self, given)


def no_gradient(y: Any, xs: Any, times: Any = None) -> Any:
    return tuple(g.detach() if i else g for i, g in enumerate(GRADIENTS(y, xs, times)))


def scale_twice(self: form.Form, n2: torch.Tensor) -> torch.Tensor:
    return self.value(n2) * self.scale**2


def summed_outputs(y: Any, xs: Any, order: int, *, batched: bool) -> Any:
    """The gradient of the sum of the outputs, in place of the Jacobian."""
    return derivatives.derivative_rows(y.sum(1, keepdim=True), xs, order, batched=batched)


def pixels_as_channels(row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return row.reshape(len(row) * x[0, 0].numel(), -1)


exact = import_module("gpkit.estimators.exact")  # the package has the classes under these names
finite_difference = import_module("gpkit.estimators.finite_difference")


def target_added(self: Compared, row: Any, r: int = 0) -> Any:
    return ROW(replace(self, targets=self.targets and tuple(-g for g in self.targets)), row, r)


def metric_first(self: Compared, row: Any, r: int = 0) -> Any:
    return ROW(replace(self, metrics=None), self.times(row, r), r)


ROW = Compared.row
CHOSEN = parameters.weights.chosen
GRADIENTS = derivatives.gradients
SIDES = {"forward": (0.0, 1.0), "backward": (-1.0, 0.0), "central": (-1.0, 0.0)}
WEIGHTS = {"mean": torch.Tensor.sum, "sum": torch.Tensor.sum, "max": torch.Tensor.amax}


BREAKS: dict[str, Break] = {
    "half of a sample's entries in the norm": Break(exact, "reduce_rows", rows_over_channels),
    "one norm for the whole batch": Break(exact, "reduce_rows", over_the_batch),
    "one alpha for the whole batch": Break(at, "per_sample", one_alpha),
    "alpha per entry": Break(at, "per_sample", alpha_per_entry),
    "sum for mean": Break(formula, "REDUCTIONS", WEIGHTS),
    "the root is missing": Break(form, "root", lambda n2: n2),
    "the weight is not multiplied by every": Break(Penalty, "weight_at", every_forgotten),
    "order 3 is order 2": Break(
        exact, "derivative_rows", lower_order, lambda c: c.order == 3 and c.estimator == "exact"
    ),
    "a centre that is detached": Break(
        average.running_average,
        "for_call",
        detached_centre,
        lambda c: c.centered == "graph" and c.form in CENTERED,
    ),
    "a centre before its update": Break(
        average.running_average,
        "for_call",
        before_the_update,
        lambda c: c.centered == "constant" and c.form in CENTERED,
    ),
    "a parameter that is not used is an error": Break(
        exact, "gradients", unused_refused, lambda c: c.net == "unused" and c.in_weights
    ),
    "the last parameter is dropped": Break(parameters.weights, "chosen", dropped_last),
    "detach=False is ignored": Break(at.At, "__call__", always_detached),
    "the factor of the form counts twice": Break(form.Form, "__call__", scale_twice),
    "the gradient of the sum in place of the Jacobian": Break(
        exact,
        "derivative_rows",
        summed_outputs,
        lambda c: c.outputs > 1 and c.of in ("output", "activation") and c.estimator == "exact",
    ),
    "other variables than the first have no gradient": Break(exact, "gradients", no_gradient),
    "pixels taken for channels": Break(
        base, "per_pixel", pixels_as_channels, lambda c: c.scope == "pixel"
    ),
    "fused layer norm, whose third derivative is wrong": Break(
        isolation,
        "elementary",
        nullcontext,
        lambda c: c.net == "layer_norm" and c.order > 1 and "tensor" not in c.call,
    ),
    "the weights of the samples are not read": Break(
        formula, "weighted_mean", lambda v, w: v.mean(), lambda c: c.weigh and c.reduce == "mean"
    ),
    "the target is added": Break(Compared, "row", target_added, lambda c: c.target),
    "the graph of a target is dropped": Break(
        Compared, "pulled", lambda self, n2, ascent: n2, lambda c: c.target and c.in_weights
    ),
    "the metric is a factor of the derivative alone": Break(
        Compared, "row", metric_first, lambda c: c.target and bool(c.metric)
    ),
    "torch's weight norm, whose second derivative is wrong": Break(
        derivatives, "MENDED", {}, lambda c: c.net == "weight_norm" and c.in_weights
    ),
    "central differences are backward ones": Break(
        finite_difference, "SIGNS", SIDES, lambda c: c.estimator == "finite_difference"
    ),
}


@contextmanager
def broken(name: str) -> Iterator[None]:
    """A context in which gpkit has a bug."""
    found = BREAKS[name]
    with mock.patch.object(found.where, found.name, found.new):
        yield
