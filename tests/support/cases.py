"""The one table of penalties: how each is built and called, and what it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from scenes import (
    Scene,
    images,
    losses_graph,
    mask_graph,
    numbers,
    on_activations,
    on_critic,
    on_entries,
    on_environments,
    on_losses,
    on_mask,
    on_outputs,
    on_sampled,
    on_steps,
    on_target,
    on_weighted,
    on_weights,
    on_weights_losses,
    outputs_graph,
    sample_weights,
    steps_graph,
    target_graph,
    vectors,
    weighted_graph,
    weights_graph,
    weights_losses_graph,
)
from torch import Tensor
from truths import (
    Oracle,
    of_activations,
    of_change,
    of_compared,
    of_cure,
    of_gnp,
    of_hidden,
    of_inputs,
    of_quotients,
    of_sampled,
    of_scale,
    of_spectrum,
    of_trace,
    of_variance,
    of_weights,
)

import gpkit
from gpkit.formula import Terms


@dataclass(frozen=True)
class Row:
    """A penalty: how it is built and called, and what it must be."""

    name: str
    build: Callable[..., Any]  # takes axes, such as every=4
    call: Callable[[Any, Scene], Any]  # with a callable
    graph: Callable[[Any, Scene], Any] | None  # with a tensor whose graph is there
    oracles: tuple[Oracle, ...]
    scene: Callable[..., Scene] = images
    where: tuple[str, ...] = ("real",)  # the samples at which the net is evaluated
    per_sample: bool = True
    groups: int = 1  # where they are not the samples
    twice: bool = True  # whether the penalty's own second derivative is exact
    points: int = 1  # for each sample
    reduce: Callable[[Tensor], Tensor] = torch.mean  # of the values

    @property
    def drawn(self) -> bool:
        """Whether the points are random even where real and fake are equal."""
        return "near" in self.where or "noisy" in self.where

    consistent: bool = True  # the gradient is that of the value, not an estimate of it


def preset(name: str, weight: float, **chosen: Any) -> Callable[..., Any]:
    return lambda **axes: getattr(gpkit, name)(weight=weight, **{**chosen, **axes})


def input_row(norm: str) -> Row:
    return Row(
        f"input_grad_norm_{norm}",
        preset("input_grad_norm", 0.7, norm=norm),
        on_losses,
        losses_graph,
        (of_inputs(0.7, lambda n: n**2, norm=norm, loss=True),),
        scene=partial(images, 3),
    )


ROWS = [
    Row(
        "weight_grad_norm",
        preset("weight_grad_norm", 0.3),
        on_weights,
        weights_graph,
        (of_weights(0.3),),
        scene=partial(images, 3),
        per_sample=False,
    ),
    Row(
        "per_sample_grad_norm",
        preset("per_sample_grad_norm", 0.3),
        on_weights_losses,
        weights_losses_graph,
        (of_weights(0.3, per_sample=True),),
        scene=partial(images, 3),
    ),
    Row(
        "weight_grad_norm_order2",
        preset("weight_grad_norm", 0.3, order=2, estimator="exact"),
        on_weights,
        weights_graph,
        (of_weights(0.3, order=2),),
        scene=vectors,
        per_sample=False,
    ),
    Row(
        "fisher",
        preset("fisher", 0.3),
        on_sampled,
        partial(on_sampled, graph=True),
        (of_sampled(0.3),),
        scene=partial(images, 3),
        per_sample=False,
    ),
    Row(
        "irm",
        preset("irm", 0.7),
        on_environments,
        partial(on_environments, graph=True),
        (of_scale(0.7),),
        scene=partial(images, 3),
        per_sample=False,
        groups=2,
    ),
    Row(
        "irm_halves",
        preset("irm", 0.7, halves=True),
        on_environments,
        partial(on_environments, graph=True),
        (of_scale(0.7, halves=True),),
        scene=partial(images, 3),
        per_sample=False,
        groups=2,
    ),
    Row(
        "fishr",  # without the moving averages: test_environments.py
        preset("fishr", 0.7, ema=0.0),
        partial(on_environments, features=True),
        partial(on_environments, features=True, graph=True),
        (of_variance(0.7),),
        scene=partial(images, 3),
        per_sample=False,
        groups=2,
    ),
    Row(
        "gnp",
        lambda **axes: gpkit.gnp(r=0.3, alpha=0.7, **axes),
        on_weights,
        None,
        (of_gnp(0.3, 0.7),),
        scene=partial(images, 3),
        where=("real", "real"),
        per_sample=False,
        consistent=False,
    ),
    Row(
        "sam",
        lambda **axes: gpkit.sam(rho=0.3, **axes),
        on_weights,
        None,
        (of_gnp(0.3, 1.0),),
        scene=partial(images, 3),
        where=("real", "real"),
        per_sample=False,
        consistent=False,
    ),
    Row(
        "sobolev",
        preset("sobolev", 0.7),
        on_target,
        target_graph,
        (of_compared(0.7),),
    ),
    Row(
        "right_reasons",
        preset("right_reasons", 0.7),
        on_mask,
        mask_graph,
        (of_compared(0.7, mask=True),),
        scene=partial(images, 3),
    ),
    Row(
        "lipschitz_policy",
        preset("lipschitz_policy", 0.7),
        on_losses,
        losses_graph,
        (of_inputs(0.7, lambda n: n**2, loss=True),),
        scene=partial(images, 3),
    ),
    Row(
        "laplacian",
        preset("laplacian", 0.7),
        on_outputs,
        outputs_graph,
        (of_trace(0.7),),
        scene=vectors,
    ),
    Row(
        "losses of steps",
        preset("input_grad_norm", 0.7),
        on_steps,
        steps_graph,
        (of_inputs(0.7, lambda n: n**2, loss=True),),
        scene=partial(images, 3),
    ),
    Row(
        "sample_weight",
        preset("GradientPenalty", 0.7),
        on_weighted,
        weighted_graph,
        (of_inputs(0.7, lambda n: n**2),),
        reduce=lambda v: (sample_weights(len(v)) * v).sum() / sample_weights(len(v)).sum(),
    ),
    Row(
        "named entries",
        preset("GradientPenalty", 0.7, wrt=gpkit.inputs("x")),
        on_entries,
        None,
        (of_inputs(0.7, lambda n: n**2),),
        scene=partial(images, 3),
    ),
    Row(
        "two activations",
        preset("GradientPenalty", 0.7, wrt=[gpkit.activation("0"), gpkit.activation("1")]),
        on_activations,
        None,
        (of_activations(0.7),),
    ),
    Row(
        "stencil",
        preset("GradientPenalty", 0.7, estimator=gpkit.stencil(0.5)),
        on_outputs,
        None,
        (of_quotients(0.7, 0.5),),
        scene=vectors,
        where=("moved",) * 6,
    ),
    Row(
        "jvp",  # of one number, where v = ±1; on average in others: test_forwards.py
        preset("GradientPenalty", 0.7, estimator=gpkit.jvp()),
        on_outputs,
        None,
        (of_inputs(0.7, lambda n: n**2),),
        scene=numbers,
    ),
    Row(
        "cure",
        preset("cure", 0.7, h=0.4),
        on_losses,
        None,
        (of_cure(0.7, 0.4),),
        scene=partial(images, 3),
        where=("real", "moved"),
    ),
    *map(input_row, ("l2", "l1", "linf")),
    Row(
        "jacobian",
        preset("jacobian", 0.7, estimator="exact"),
        on_outputs,
        outputs_graph,
        (of_inputs(0.7, lambda n: n**2 / 2),),
        scene=partial(images, 3),
    ),
    Row(
        "spectral_jacobian",
        preset("spectral_jacobian", 0.7, estimator=gpkit.power_iteration(60)),
        on_outputs,
        outputs_graph,
        (of_spectrum(0.7),),
        scene=partial(images, 3),
        twice=False,
    ),
    Row(
        "contractive",
        preset("contractive", 0.7, activation="1", estimator="exact"),
        on_outputs,
        None,
        (of_hidden(0.7),),
        scene=partial(images, 3),
    ),
    Row(
        "curvature",
        preset("curvature", 0.7),
        on_outputs,
        outputs_graph,
        (of_inputs(0.7, lambda n: n**2, order=2),),
    ),
    Row(
        "curvature_order3",
        preset("curvature", 0.7, order=3),
        on_outputs,
        outputs_graph,
        (of_inputs(0.7, lambda n: n**2, order=3),),
        scene=partial(vectors, 2),
    ),
    Row(
        "eikonal",
        preset("eikonal", 0.7),
        on_outputs,
        outputs_graph,
        (of_inputs(0.7, lambda n: (n - 1) ** 2),),
    ),
    Row(
        "path_length",  # of one product with a Gaussian, and a moving average: test_path_length.py
        preset(
            "path_length",
            7.0,
            every=1,
            estimator="exact",
            form=gpkit.two_sided(gpkit.running_average(1.0, 1.5)),
        ),
        on_outputs,
        None,
        (of_inputs(7.0, lambda n: (n - 1.5) ** 2),),
        scene=partial(images, 3),
    ),
    Row(
        "wgan_gp",
        preset("wgan_gp", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: (n - 1) ** 2),),
        where=("between",),
    ),
    Row(
        "wgan_lp",
        preset("wgan_lp", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: (n - 1).clamp(min=0) ** 2),),
        where=("between",),
    ),
    Row(
        "r1",
        preset("r1", 7.0),
        on_critic,
        outputs_graph,
        (of_inputs(7.0, lambda n: n**2 / 2),),
    ),
    Row(
        "r2",
        preset("r2", 7.0),
        on_critic,
        partial(outputs_graph, of="fake"),
        (of_inputs(7.0, lambda n: n**2 / 2),),
        where=("fake",),
    ),
    Row(
        "r1_r2",
        preset("r1_r2", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: n**2),),  # 7/2 of two means of B are 7 of the mean of 2 B
        where=("real+fake",),
        points=2,
    ),
    Row(
        "approximate_r1",
        preset("approximate_r1", 7.0, sigma=0.3),
        on_critic,
        None,
        (of_change(7.0, 0.3),),
        where=("real", "noisy"),
    ),
    Row(
        "approximate_r2",
        preset("approximate_r2", 7.0, sigma=0.3),
        on_critic,
        None,
        (of_change(7.0, 0.3),),
        where=("fake", "noisy"),
    ),
    Row(
        "amp",
        preset("amp", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: n**2),),  # as r1_r2, where they are as many
        where=("real+fake",),
        points=2,
    ),
    Row(
        "dragan",
        preset("dragan", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: (n - 1) ** 2),),
        where=("near",),
    ),
    Row(
        "zero_gp",
        preset("zero_gp", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: n**2),),
        where=("between",),
    ),
    Row(
        "wgan_div",
        preset("wgan_div", 3.0),
        on_critic,
        None,
        (of_inputs(3.0, lambda n: n**6),),
        where=("between",),
    ),
    Row(
        "max_gp",
        preset("max_gp", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: n**2),),
        where=("between",),
        reduce=torch.max,
    ),
    Row(
        "duq",
        preset("duq", 0.7),
        on_outputs,
        outputs_graph,
        (of_inputs(0.7, lambda n: (n - 1) ** 2, of=lambda output: output.sum()),),
        scene=partial(images, 3),
    ),
    Row(
        "hessian",
        preset("hessian", 0.3, estimator="exact"),
        on_weights,
        weights_graph,
        (of_weights(0.3, order=2),),
        scene=vectors,
        per_sample=False,
    ),
    Row(
        "sum",
        lambda **axes: gpkit.sum(
            {"r1": {"weight": 7.0, **axes}, "mine": {"preset": "r2", "weight": 3.0, **axes}}
        ),
        on_critic,
        None,
        (
            of_inputs(7.0, lambda n: n**2 / 2),
            of_inputs(3.0, lambda n: n**2 / 2, z_index=1),
        ),
        where=("real", "fake"),
    ),
]


def rows(choose: Callable[[Row], Any] = lambda row: True) -> pytest.MarkDecorator:
    """Run a test for every row of the table, or for those chosen."""
    chosen = [row for row in ROWS if choose(row)]
    return pytest.mark.parametrize("row", chosen, ids=[row.name for row in chosen])


def each_terms(terms: Any) -> list[Terms]:
    """Return the terms of a penalty, or of each part of a sum."""
    return list(terms.values()) if isinstance(terms, dict) else [terms]


def evaluated(row, s, call=None, penalty=None):
    """Return the terms of a call, and the points at which the net was evaluated."""
    s.net.seen.clear()
    terms = each_terms((call or row.call)((penalty or row.build()).terms, s))
    return terms, list(s.net.seen)


def expected(row, s, z):
    """Return the oracles' norms, values, penalty and its gradient in the parameters."""

    def total(params):
        found = [oracle(s, params, z) for oracle in row.oracles]
        norms, values = [n for _, n, _ in found], [v for _, _, v in found]
        return sum(w * row.reduce(v) for w, _, v in found), (norms, values)

    grads, (penalty, (norms, values)) = torch.func.grad_and_value(total, has_aux=True)(s.params)
    return norms, values, penalty, torch.cat([g.flatten() for g in grads.values()])
