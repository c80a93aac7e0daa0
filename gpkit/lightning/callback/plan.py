"""What the penalties that act on a step need from it, and how it is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gpkit.lightning.watch.probe import Capture, Probe, ProbeSpec
from gpkit.needs import Needs


@dataclass(frozen=True)
class Plan:
    """The penalties that act on a step, and the probe that captures what they need.

    Args:
        needs: of each penalty, by name.
        probe: captures what they need together.
    """

    needs: Mapping[str, Needs]
    probe: Probe

    def names_where(self, holds: Callable[[Needs], bool]) -> tuple[str, ...]:
        """Return the names of the penalties for whose needs a condition holds."""
        return tuple(name for name, needs in self.needs.items() if holds(needs))

    @property
    def runs_again(self) -> bool:
        """Whether a penalty may rerun the training step, with the same random numbers."""
        return any(needs.runs_again for needs in self.needs.values())

    @property
    def draws(self) -> bool:
        """Whether a penalty may draw random numbers."""
        return not all(needs.plain for needs in self.needs.values())


@dataclass(frozen=True)
class PenalizedNet:
    """The module or submodule whose weights, inputs or activations the penalties are about.

    Args:
        net: the module.
        title: how error messages call it, such as "the submodule 'net'".
        compiled: whether the LightningModule, or a part of it, runs compiled.
    """

    net: nn.Module
    title: str
    compiled: bool

    def probe(
        self, needs: Iterable[Needs], replacements: Mapping[str, Tensor] | None = None
    ) -> Probe:
        """Return a probe that captures what penalties need.

        Args:
            needs: of the penalties.
            replacements: tensors to compute with instead, see `Probe`.

        Returns:
            The probe; its hooks are not registered yet.
        """
        spec = probe_spec(needs)
        eager = self.compiled and spec.eager
        return Probe(self.net, self.title, spec, replacements, eager=eager)


def probe_spec(needs: Iterable[Needs]) -> ProbeSpec:
    """Return what a probe has to capture for penalties with these needs."""
    needs = list(needs)
    named = [a for n in needs if not n.calls_net for a in n.activations]
    return ProbeSpec(
        order=max((n.order for n in needs), default=0),
        x=any(n.reads_input for n in needs),
        output=any(n.reads_output for n in needs),
        activations=tuple(dict.fromkeys(named)),
        moves=any(n.runs_again and not n.in_weights for n in needs),
    )


def differentiated(needs: Needs, capture: Capture, loss: Tensor | None) -> Any:
    """Return what a penalty differentiates: an activation, the loss, or the output of the net."""
    if needs.differentiates == "activation":
        return capture.activations.get(needs.activations[0])
    return loss if needs.of_loss else capture.output
