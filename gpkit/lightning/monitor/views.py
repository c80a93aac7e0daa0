"""The inputs and activations that a step of a LightningModule shows, under the names of a log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gpkit.lightning.watch.probe import Capture, Probe, ProbeSpec, runs_compiled


@dataclass(frozen=True)
class View:
    """One input or activation.

    Args:
        label: its name in the log.
        title: what it is, for a finding.
        key: its name in what was seen; the input's is "".
        capture: what the hooks captured, complete when the step has run.
    """

    label: str
    title: str
    key: str
    capture: Capture

    @property
    def tensor(self) -> Tensor | None:
        """What was seen; None if it was not there."""
        return self.capture.activations.get(self.key) if self.key else self.capture.x

    def findings(self, step: str, *, once: bool) -> Iterator[str]:
        """Yield what keeps it from having a norm for each sample.

        Args:
            step: the name of the method that was run.
            once: whether it must not have been there several times.

        Yields:
            A line for each finding.
        """
        yield from self.capture.problems
        calls = self.capture.calls.get(self.key, 0)
        if not calls:
            yield f"{step} does not call {self.title}: name one that it calls"
        elif calls > 1 and once:
            yield f"{step} calls {self.title} {calls} times: name one that is called once"
        elif self.tensor is not None and not self.tensor.ndim:
            yield f"{self.title} has a single number, and must have samples, [B, ...]: name another"


class Views:
    """Watches submodules of a module in its steps: a context, to be entered for each of them.

    Compiled ones run uncompiled for that: they have no hooks.

    Args:
        module: the module.
        inputs: names of the submodules whose inputs are meant; "" is the module itself.
        activations: names of those whose outputs are.
    """

    def __init__(
        self, module: nn.Module, inputs: Sequence[str], activations: Sequence[str]
    ) -> None:
        self._probes: list[tuple[str, str, str, Probe]] = []
        compiled = runs_compiled(module)
        for name in inputs:
            title = f"the submodule {name!r}" if name else f"the {type(module).__name__} itself"
            label = "input" if len(inputs) == 1 else f"input/{name or type(module).__name__}"
            probe = Probe(module.get_submodule(name), title, ProbeSpec(x=True), eager=compiled)
            self._probes.append((label, title, "", probe))
        for name in activations:
            label, title = f"activation/{name}", f"the submodule {name!r}"
            probe = Probe(module, title, ProbeSpec(activations=(name,)), eager=compiled)
            self._probes.append((label, title, name, probe))
        if not compiled:  # else it would be compiled anew with the hooks
            for *_, probe in self._probes:
                probe.register_hooks()

    def __enter__(self) -> list[View]:
        """Return the views, complete when the block ends."""
        return [View(a, title, key, probe.__enter__()) for a, title, key, probe in self._probes]

    def __exit__(self, *exception: object) -> None:
        """See no more."""
        for *_, probe in reversed(self._probes):
            probe.__exit__(*exception)

    def remove(self) -> None:
        """Take the hooks off."""
        for *_, probe in self._probes:
            probe.remove()
