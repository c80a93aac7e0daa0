"""What is drawn: random numbers, recorded for an oracle that uses the same, and points of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.property.config import Config

Points = tuple[Tensor, ...]
LOW, HIGH = -1.0, 2.0  # of uniform points
SCALE = 0.3  # of perturbations


class Draws:
    """Numbers in the order in which they were drawn. Taking one of another kind is an error."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Tensor]] = []
        self.used = 0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """A context that records what is drawn from generators that are passed to torch."""

        def recording(kind: str, draw: Any) -> Any:
            def recorded(*args: Any, generator: Any = None, **kwargs: Any) -> Tensor:
                drawn = draw(*args, generator=generator, **kwargs)
                if generator is not None:
                    self.kept.append((kind, drawn.clone()))
                return drawn

            return recorded

        with (
            mock.patch("torch.rand", recording("uniform", torch.rand)),
            mock.patch("torch.randn", recording("normal", torch.randn)),
        ):
            yield

    def take(self, kind: str, shape: tuple[int, ...]) -> Tensor:
        """Return the next numbers, which must be of a kind and a shape."""
        assert self.used < len(self.kept), f"the penalty drew no {kind} numbers {list(shape)}"
        found, drawn = self.kept[self.used]
        assert (found, tuple(drawn.shape)) == (kind, shape), (
            f"expected a draw of {kind} numbers {list(shape)}; the penalty drew {found} numbers "
            f"{list(drawn.shape)}"
        )
        self.used += 1
        return drawn.double()

    def uniform(self, *shape: int) -> Tensor:
        return self.take("uniform", shape)

    def normal(self, *shape: int) -> Tensor:
        return self.take("normal", shape)

    def require_used(self) -> None:
        left = [(kind, list(x.shape)) for kind, x in self.kept[self.used :]]
        assert not left, f"the penalty drew more random numbers than the formula has: {left}"


def chosen(c: Config, real: Points, fake: Points, draws: Draws) -> Points:
    """Return the points; on the graph of the samples unless they are detached."""
    zs = where(c.at, real, fake, draws)
    return tuple(z.detach() if c.detach else z for z in zs)


def where(at: str, real: Points, fake: Points, draws: Draws) -> Points:
    if at in ("data", "real"):
        return real
    if at == "fake":
        return fake
    if at == "interpolate":
        alpha = draws.uniform(len(real[0]))
        return tuple(
            column(alpha, x) * x + (1 - column(alpha, x)) * y for x, y in pairs(real, fake)
        )
    if at == "midpoint":
        return tuple((x + y) / 2 for x, y in pairs(real, fake))
    if at == "uniform":
        return tuple(LOW + (HIGH - LOW) * draws.uniform(*x.shape) for x in real)
    if at == "box":
        u = [draws.uniform(*x.shape) for x in real]
        return tuple(low(x) + (high(x) - low(x)) * v for x, v in zip(real, u, strict=True))
    if at == "mixture":
        return both(real, fake)
    if at == "triple":
        first = where("uniform", real, fake, draws)
        return both(both(real, first), where("interpolate", real, fake, draws))
    kind = at.removeprefix("perturb_")
    batch = len(real[0])
    alpha = draws.uniform(batch) if kind == "along" else torch.ones(batch, dtype=torch.float64)
    found = []
    for x in real:
        u = 2 * draws.uniform(*x.shape) - 1 if kind == "uniform" else draws.normal(*x.shape)
        entries = x.detach().reshape(-1)
        spread = ((entries - entries.mean()) ** 2).mean().sqrt()
        size = SCALE * spread if kind in ("relative", "along") else SCALE
        found.append(x + column(alpha, x) * size * u)
    return tuple(found)


def low(x: Tensor) -> Tensor:
    """Return a bound for each entry of the last dimension."""
    return torch.linspace(-1, 0, x.shape[-1], dtype=torch.float64)


def high(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 2, x.shape[-1], dtype=torch.float64)


def column(alpha: Tensor, x: Tensor) -> Tensor:
    return alpha.reshape(-1, *[1] * (x.ndim - 1))


def pairs(real: Points, fake: Points) -> Any:
    return zip(real, fake, strict=True)


def both(first: Points, second: Points) -> Points:
    return tuple(torch.cat([x, y]) for x, y in pairs(first, second))
