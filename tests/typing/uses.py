"""A program of a user's, for the type checker: `mypy` reads it, nothing runs it.

An ignore that is not needed is an error, so each of them is a test: a misspelt name is an error to
type checkers, and every public name is exported to strict ones. It is checked as by `mypy --strict`
(see pyproject.toml): what gpkit returns has a type.
"""

from typing import Any, assert_type

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpkit
from gpkit import r1
from gpkit.presets import wgan_gp
from gpkit.sums import PenaltySum

assert_type(r1(weight=10.0), gpkit.GradientPenalty)
assert_type(gpkit.sum({"r1": r1(), "gp": wgan_gp()}), PenaltySum)
gpkit.GradientPenaltyCallback(gpkit.weight_grad_norm(weight=0.1))

gpkit.wgangp  # type: ignore[attr-defined]  # noqa: B018
gpkit.r1(wieght=10.0)  # type: ignore[call-arg]
gpkit.GradientPenalty(order="2")  # type: ignore[arg-type]


class cubed(gpkit.Form):  # noqa: N801
    """n³."""

    def value(self, squared_norms: Tensor) -> Tensor:
        return squared_norms**1.5


def loop(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A loop of a user's own."""
    penalty = gpkit.weight_grad_norm(weight=gpkit.warmup(1.0, steps=10))
    loss = F.cross_entropy(net(x), y)
    return loss + penalty(loss, net.parameters())


def of_a_critic(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """All that a call returns has a type."""
    penalty = gpkit.GradientPenalty(
        order=2, form=gpkit.two_sided(1.0), at=gpkit.interpolate(), estimator=gpkit.projection(4)
    )
    terms = penalty.terms(critic, real=real, fake=fake)
    total: Tensor = terms.norms.mean() + terms.values.mean() + terms.penalty
    step = gpkit.compile(lambda real: critic(real).mean() + penalty(critic, real=real))
    slope = gpkit.derivative(critic(real), real, order=1)
    compiled: Tensor = step(real)
    return total + compiled + slope.sum() + penalty.with_loss(lambda: total, critic)


def application(path: str) -> dict[str, float]:
    """The functions of the application."""
    net = gpkit.load(path)
    assert_type(net, nn.Module)
    report = gpkit.diagnose(net, gpkit.r1(), torch.randn(2, 3))
    print(report, gpkit.prepare(net))
    return gpkit.train(["model=mlp", "seed=1"])


class Mine(gpkit.PenalizedModule):
    """A module of a user's own."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.penalized_loss(batch)


class Told(gpkit.GradientPenaltyCallback):
    """A callback of a user's own."""
