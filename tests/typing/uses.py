"""A program of a user's, for the type checker: `mypy` reads it, nothing runs it.

An ignore that is not needed is an error, so each of them is a test: a misspelt name is an error to
type checkers, and every public name is exported to strict ones.
"""

from typing import assert_type

from torch import Tensor

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
