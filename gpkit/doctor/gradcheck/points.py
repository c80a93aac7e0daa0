"""Where the net is evaluated: one α a sample, noise that is there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpkit.axes.at import At, data, fake, interpolate, perturb, real
from gpkit.doctor.gradcheck.compared import Known, usable
from gpkit.doctor.gradcheck.report import Check, failed, unchecked

SEEDS = 6
CLEAN = (
    "the net is evaluated at the clean samples: is it the noised tensor that must require grad and "
    "be given to the net?"
)


def points(known: Known, at: At | None) -> Check:
    """The points are where they should be.

    Between two samples, each sample has one α of its own. Without ``like=`` this is looked at if
    the points lie between the first two samples; with it, the points must be those of its ``at``.

    Returns:
        The check.
    """
    z = _points(known, 0)
    if z is None:
        return unchecked("the points at which the net is differentiated cannot be seen")
    kinds = [x for x in known.trial.samples if isinstance(x, Tensor) and x.shape == z.shape]
    if isinstance(at, (real, data, fake)):
        return _fixed(at, z, kinds)
    if isinstance(at, perturb):
        return _noised(known, at, kinds[:1])
    if len(kinds) >= 2 and (
        isinstance(at, interpolate) or (at is None and _between(z, *kinds[:2]))
    ):
        return _interpolated(known, kinds[0], kinds[1], at)
    return unchecked("they are not between two samples" if at is None else f"at={at!r}")


def _points(known: Known, seed: int) -> Tensor | None:
    """Return the points of the first call of the net."""
    calls = known.trial.run(seed).calls
    if not usable(calls[:1], known.trial):
        return None
    return calls[0].tensors[calls[0].variables[0]]


def _fixed(at: At, z: Tensor, kinds: list[Tensor]) -> Check:
    expected = kinds[-1] if isinstance(at, fake) and kinds else next(iter(kinds), None)
    if expected is None:
        return unchecked("no sample has the shape of the points")
    name = type(at).__name__
    if torch.equal(z, expected.detach()):
        return Check(f"the {name} samples")
    return failed(f"the net is not evaluated at the {name} samples", "like= is evaluated there")


def _between(z: Tensor, x: Tensor, y: Tensor) -> bool:
    """Whether the points look like interpolates: in the box, or on the lines, and no samples."""
    x, y = x.detach(), y.detach()
    if torch.equal(z, x) or torch.equal(z, y):
        return False
    low, high, slack = torch.minimum(x, y), torch.maximum(x, y), 1e-5 * (x - y).abs()
    if bool(((z >= low - slack) & (z <= high + slack)).all()):
        return True
    return _spread(_alphas(z, x, y)) < 1e-3


def _alphas(z: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return α of every entry ``[B, n]``; NaN where x and y are close."""
    d = (x - y).detach().flatten(1)
    close = d.abs() < 1e-2 * d.abs().amax(1, keepdim=True)
    return ((z - y.detach()).flatten(1) / d).masked_fill(close | (d == 0), torch.nan)


def _spread(alpha: Tensor) -> float:
    """Return the largest difference between entries of one sample."""
    low = alpha.nan_to_num(torch.inf).amin(1)
    high = alpha.nan_to_num(-torch.inf).amax(1)
    return float((high - low).nan_to_num(0, 0, 0).amax())


def _interpolated(known: Known, x: Tensor, y: Tensor, at: At | None) -> Check:
    found = [_points(known, seed) for seed in range(SEEDS)]
    alphas = torch.stack([_alphas(z, x, y) for z in found if z is not None])  # [seeds, B, n]
    if (spread := _spread(alphas.flatten(0, 1))) > 1e-3:
        return failed(
            f"α differs by up to {spread:.2g} inside of one sample",
            "draw one α for each sample, torch.rand(B, 1, 1, 1) for images, not one for each entry "
            "or channel: the points leave the line between the two samples",
        )
    of_sample = alphas.nanmean(2)  # [seeds, B]
    low, high = (float(f(of_sample[~of_sample.isnan()])) for f in (torch.amin, torch.amax))
    if low < -1e-3 or high > 1 + 1e-3:
        return failed(
            f"α is between {low:.3g} and {high:.3g}",
            "draw α from U[0, 1]: torch.rand, not torch.randn",
        )
    alike = float((of_sample.amax(1) - of_sample.amin(1)).nan_to_num(0).amax())
    varies = float((of_sample.amax(0) - of_sample.amin(0)).nan_to_num(0).amax())
    if alike < 1e-3 and (varies > 1e-3 or at is not None):
        return failed(
            "all samples of a batch have the same α",
            "draw one α for each sample: torch.rand(B, 1, 1, 1) for images, not torch.rand(1)",
        )
    if varies < 1e-3 and at is not None:
        return failed("α is the same at every call", "draw α anew at each call")
    return Check("between the samples, with one α for each")


def _noised(known: Known, at: perturb, kinds: list[Tensor]) -> Check:
    if not kinds:
        return unchecked("no sample has the shape of the points")
    x = kinds[0].detach()
    found = [z - x for z in (_points(known, seed) for seed in range(SEEDS)) if z is not None]
    delta = torch.stack(found).flatten(2)  # [seeds, B, n]
    size = at.scale * (float(x.std(correction=0)) if at.relative else 1.0)
    if not delta.any():
        return failed("the points have no noise", CLEAN)
    if not delta.flatten(1).any(1).all() or torch.equal(delta[0], delta[1]):
        return failed("the noise is not drawn anew at each call", "draw it inside of the penalty")
    if len(x) > 1 and torch.allclose(delta, delta[:, :1].expand_as(delta)):
        return failed("all samples of a batch have the same noise", "draw it with x's whole shape")
    largest, bounded = float(delta.abs().amax()), at.noise != "normal"
    if bounded and largest > 1.1 * size:
        return failed(
            f"the noise is up to {largest:.3g}, where like= has at most {size:.3g}",
            "is it multiplied by the standard deviation of the batch, and by ½?",
        )
    return Check(f"around the samples, with noise up to {largest:.3g}")


def noise(known: Known) -> Check:
    """The random numbers that the penalty draws have an effect.

    It catches noise that is added to a copy, while the net is evaluated at the clean sample.

    Returns:
        The check.
    """
    trial = known.trial
    with Drawn() as drawn:
        trial.run()
    shape = trial.shape
    of_samples = [s for s in drawn.shapes if shape.numel() > 1 and s[-len(shape) :] == shape]
    if not of_samples:
        return unchecked("it draws no noise of the shape of the samples")
    if known.drawn:
        return Check("the noise that it draws has an effect")
    return failed(f"it draws noise {list(of_samples[0])}, which has no effect on the value", CLEAN)


class Drawn(torch.overrides.TorchFunctionMode):
    """A mode that notes the shapes of random tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and note what it drew."""
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in DRAWING and isinstance(out, Tensor):
            self.shapes.append(out.shape)
        return out


DRAWING = {"rand", "randn", "rand_like", "randn_like", "normal", "normal_", "uniform_", "bernoulli"}
