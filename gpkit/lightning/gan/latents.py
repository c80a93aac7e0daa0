"""Penalties of a generator: in its latents z, or in w where it has a mapping z -> w."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gpkit.autodiff.isolation import double_backward, isolated
from gpkit.autodiff.random import derived_seed, rank
from gpkit.formula import Terms
from gpkit.gradient_penalty import GradientPenalty
from gpkit.lightning.gan.samples import conditioned
from gpkit.needs import needs_of

AUTO = ("mapping", "synthesis")


def parts_of(generator: nn.Module, mapping: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of a generator's mapping and synthesis; () if it has none.

    Args:
        generator: G.
        mapping: "auto", two names, or None.

    Returns:
        Two names, or ().

    Raises:
        TypeError: if ``mapping`` is something else.
        ValueError: if the generator has no such parts.
    """
    if mapping is None:
        return ()
    if mapping == "auto":
        return AUTO if all(callable(getattr(generator, name, None)) for name in AUTO) else ()
    names = () if isinstance(mapping, str) else tuple(mapping)
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise TypeError(
            "`mapping=...` must be 'auto', None, or the names of two parts of the generator, such "
            f"as ('mapping', 'synthesis'); got {mapping!r}"
        )
    for name in names:
        if not callable(getattr(generator, name, None)):
            raise ValueError(
                f"`mapping=...` names {name!r}, which the generator {type(generator).__name__} "
                "does not have: name a submodule or a method of it, or use mapping=None"
            )
    return names


@dataclass(frozen=True)
class Path:
    """From latents z to samples, through w = mapping(z) where the generator has a mapping.

    Args:
        generator: G.
        parts: the names of its mapping and synthesis; () if it has none.
    """

    generator: nn.Module
    parts: tuple[str, ...]

    def act(self, penalty: Any, z: Tensor, labels: Any, step: int | None) -> Terms | None:
        """Evaluate a penalty of the generator's output, in w or in z.

        Args:
            penalty: of the generator, not in its weights.
            z: latents, ``[B, latent_dim]``.
            labels: of the samples, or None.
            step: the number of the generator's step.

        Returns:
            The terms; None if the penalty does not act on this step.
        """
        needs = needs_of(penalty)
        if not self.parts or needs.activations:
            net = [self.generator] if needs.activations else []
            return penalty.act(conditioned(self.generator, labels), z, *net, step=step)
        mapping, synthesis = (getattr(self.generator, name) for name in self.parts)
        if not penalty.acts_at(step):
            return penalty.act(synthesis, z, step=step)
        with self._forward(penalty, mapping, z, needs.order, step):
            w = conditioned(mapping, labels)(z)
        with attached(penalty):
            return penalty.act(synthesis, w, step=step)

    def _forward(
        self, penalty: GradientPenalty, mapping: Any, z: Tensor, order: int, step: int | None
    ) -> AbstractContextManager[Any]:
        """Return a context for the mapping's forward pass, as the penalty's ``forward=``."""
        if penalty.forward == "training":
            return double_backward(order) if order else nullcontext()
        seed = derived_seed("mapping", rank(), step)
        evaluating = penalty.forward == "eval"
        return isolated(mapping, seed, z.device, max(order, 1), evaluating=evaluating)


@contextmanager
def attached(penalty: GradientPenalty) -> Iterator[None]:
    """Keep the graph of a penalty's points within the block, so that it trains what made them."""
    at = penalty.at
    if at.detach:  # a mixture has it in its parts
        penalty.at = replace(at, detach=False)
    try:
        yield
    finally:
        penalty.at = at
