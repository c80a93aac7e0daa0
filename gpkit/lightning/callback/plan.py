"""What the penalties that act together need of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gpkit.lightning.watch.probe import Seen, Wanted, watched
from gpkit.needs import Needs


@dataclass(frozen=True)
class Plan:
    """What penalties need of a training step, all together.

    Args:
        needs: of each, by name.
        watch: shows what they need of the net.
    """

    needs: Mapping[str, Needs]
    watch: watched

    def names(self, holds: Callable[[Needs], bool]) -> tuple[str, ...]:
        """Return the names of the penalties whose needs have a property."""
        return tuple(name for name, needs in self.needs.items() if holds(needs))

    @property
    def runs_again(self) -> bool:
        """Whether the step may be run again, with the same random numbers."""
        return any(needs.runs_again for needs in self.needs.values())

    @property
    def draws(self) -> bool:
        """Whether random numbers may be drawn."""
        return not all(needs.plain for needs in self.needs.values())


def wanted_by(needs: Iterable[Needs]) -> Wanted:
    """Return what penalties want of the net while it runs."""
    needs = list(needs)
    named = [a for n in needs if not n.calls_net for a in n.activations]
    return Wanted(
        order=max((n.order for n in needs), default=0),
        x=any(n.reads_input for n in needs),
        output=any(n.reads_output for n in needs),
        activations=tuple(dict.fromkeys(named)),
        moves=any(n.runs_again and not n.in_weights for n in needs),
    )


def differentiated(needs: Needs, seen: Seen, loss: Tensor | None) -> Any:
    """Return what a penalty differentiates, of a step that was made."""
    if needs.differentiates == "activation":
        return seen.activations.get(needs.activations[0])
    return loss if needs.of_loss else seen.output
