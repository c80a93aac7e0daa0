"""The inputs and activations whose gradient norms are logged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from gpkit.lightning.watch.calls import SeenCalls, findings_of_calls
from gpkit.lightning.watch.capture import Capture, ProbeSpec
from gpkit.lightning.watch.probe import Probe, runs_compiled


@dataclass(frozen=True)
class WatchedTensor:
    """The input or the output of a submodule in one step.

    Args:
        label: its name in the log, such as "input" or "activation/head".
        title: how error messages call the submodule, such as "the submodule 'head'".
        key: its name in the capture: "" for the input, the submodule's name for an activation.
        capture: what the hooks captured. It is complete when the step has run.
        call: the index of the call that is meant; None if there must be only one.
        seen: the submodules that the step calls; None after the first step.
    """

    label: str
    title: str
    key: str
    capture: Capture
    call: int | None
    seen: SeenCalls | None

    @property
    def tensor(self) -> Tensor | None:
        """The tensor; None if the step did not call the submodule."""
        return self.capture.activations.get(self.key) if self.key else self.capture.x

    def findings(self, step: str) -> Iterator[str]:
        """Yield the reasons why it has no gradient norm for each sample.

        Args:
            step: the name of the method that was run, such as "training_step".

        Yields:
            One line for each finding.
        """
        yield from self.capture.problems.values()
        validating = step == "validation_step" and len(self.capture.calls.get(self.key, ())) == 1
        call = None if validating else self.call  # it may call a critic once, on real samples
        yield from findings_of_calls(
            self.capture, [(self.key, self.title)], call, self.seen, step=step
        )
        if self.tensor is not None and not self.tensor.ndim:
            end = "output" if self.key else "input"
            yield (
                f"the {end} of {self.title} must have samples, [B, ...]; got a single number: "
                "name another submodule"
            )


class WatchedTensors:
    """A context that captures the inputs and outputs of submodules; it is entered for each step.

    Within the context compiled modules run uncompiled, because they have no hooks.

    Args:
        module: the module.
        inputs: names of the submodules whose inputs are captured; "" is the module itself.
        activations: names of the submodules whose outputs are captured.
        call: the index of the call that is captured; None if there must be only one.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[str],
        activations: Sequence[str],
        call: int | None = None,
    ) -> None:
        self._call = call
        self._seen: SeenCalls | None = SeenCalls(module)  # for the messages of the first step
        self._probes: list[tuple[str, str, str, Probe]] = []  # label, title, key, probe
        compiled = runs_compiled(module)
        for name in inputs:
            title = f"the submodule {name!r}" if name else f"the {type(module).__name__} itself"
            label = "input" if len(inputs) == 1 else f"input/{name or type(module).__name__}"
            probe = Probe(
                module.get_submodule(name), title, ProbeSpec(x=True), call=call, eager=compiled
            )
            self._probes.append((label, title, "", probe))
        for name in activations:
            label, title = f"activation/{name}", f"the submodule {name!r}"
            spec = ProbeSpec(activations=(name,))
            probe = Probe(module, title, spec, call=call, eager=compiled)
            self._probes.append((label, title, name, probe))
        if not compiled:  # hooks that stay would make torch.compile compile the module again
            for *_, probe in self._probes:
                probe.register_hooks()

    def __enter__(self) -> list[WatchedTensor]:
        """Return the tensors. They are complete when the block ends."""
        seen = self._seen and self._seen.__enter__()
        return [
            WatchedTensor(label, title, key, probe.__enter__(), self._call, seen)
            for label, title, key, probe in self._probes
        ]

    def __exit__(self, *exception: object) -> None:
        """Stop capturing."""
        for *_, probe in reversed(self._probes):
            probe.__exit__(*exception)
        if self._seen is not None:
            self._seen.__exit__(*exception)
            self._seen = None

    def remove(self) -> None:
        """Remove the hooks."""
        for *_, probe in self._probes:
            probe.remove()
