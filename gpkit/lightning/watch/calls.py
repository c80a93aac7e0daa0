"""The calls of submodules in a training step: which are seen, and which one is meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from gpkit.autodiff.compat import is_compiled
from gpkit.lightning.watch.capture import Capture

LISTED = 8  # names in a message


class SeenCalls:
    """A context that notes which submodules are called with floating-point tensors.

    It is for messages only, so it is entered around the first step of a fit.

    Args:
        module: the module whose submodules are noted.
    """

    def __init__(self, module: nn.Module) -> None:
        # Pairs, no dict: the hash of a metric changes with its state.
        self.parts = list(module.named_modules())
        self.inputs: dict[str, None] = {}  # names, without repetition
        self.outputs: dict[str, None] = {}

    def __enter__(self) -> SeenCalls:
        """Register a hook on each module, unless one is compiled: it would be traced."""
        # Not one global hook: torch forgets to remove half of one that takes keyword arguments.
        parts = [] if any(is_compiled(part) for _, part in self.parts) else self.parts
        self.hooks = [
            part.register_forward_hook(partial(self._note, name), with_kwargs=True)
            for name, part in parts
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def _note(self, name: str, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if is_floating(next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)):
            self.inputs[name] = None
        if is_floating(output):
            self.outputs[name] = None

    def hint(self, name: str, inside: str = "") -> str:
        """Return ", such as 'a', 'b'", the outermost first; "" if there is no submodule to name.

        Args:
            name: "" for submodules whose input can be taken, else those whose output can.
            inside: the submodule that names of activations start from.
        """
        start = f"{inside}." if inside and name else ""
        seen = self.outputs if name else self.inputs
        names = [n.removeprefix(start) for n in seen if n.startswith(start)]
        names = sorted((n for n in names if n), key=lambda n: n.count("."))
        listed = ", ".join(map(repr, names[:LISTED]))
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        return f", such as {listed}{more}" if listed else ""


def is_floating(x: Any) -> bool:
    """Whether ``x`` is a tensor with a gradient."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def findings_of_calls(
    capture: Capture,
    names: Sequence[tuple[str, str]],
    call: int | None,
    seen: SeenCalls | None,
    *,
    step: str,
    inside: str = "",
) -> Iterator[str]:
    """Yield what keeps the calls of submodules from showing the tensor that is meant.

    Args:
        capture: what was captured in the step.
        names: the names of the submodules in the capture, and how messages call each.
        call: the index of the call that is meant, from 0; None if there must be only one.
        seen: the submodules that the step calls; None if they were not noted.
        step: how messages call the step.
        inside: the submodule that names of activations start from.

    Yields:
        One line for each finding.
    """
    often = max((len(capture.calls.get(name, ())) for name, _ in names), default=0)
    for name, what in names:
        shapes = capture.calls.get(name, [])
        count = len(shapes)
        listed = ", ".join(f"call={i} {shape}" for i, shape in enumerate(shapes[:LISTED]))
        if count == 0:
            hint = seen.hint(name, inside) if seen else ""
            below = f"{inside}.{name}".strip(".") + "."
            if seen and any(n.startswith(below) for n in seen.outputs):
                how = f"runs parts of it, as {below}forward(x) does: write {below[:-1]}(x), or"
                yield f"{step} does not call {what}, but {how} name one that it calls{hint}"
            else:
                yield f"{step} does not call {what}: name one that it calls{hint}"
        elif call is None and capture.count(name) != 1:
            yield (
                f"{step} calls {what} {count} times: name one that is called once, or choose the "
                f"call by its index from 0 and its shape, {listed}"
            )
        elif call is not None and call >= (count if count > 1 else often):
            times = "once" if count == 1 else f"{count} times"
            yield f"{step} calls {what} {times}, and call={call} is not one of these: {listed}"
