"""The random numbers that a penalty draws, recorded, for an oracle that uses the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


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
