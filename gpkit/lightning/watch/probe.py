"""Forward hooks that capture the input, output and activations of a net during a training step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.compiler import set_stance

from gpkit.autodiff.activations import Change
from gpkit.autodiff.compat import in_backward, is_compiled, is_compiled_function
from gpkit.autodiff.isolation import double_backward
from gpkit.autodiff.tracing.calls import TRACES
from gpkit.autodiff.tracing.hooks import hooked
from gpkit.autodiff.tracing.points import variable
from gpkit.lightning.watch.capture import Capture, ProbeSpec, with_argument
from gpkit.lightning.watch.entries import (
    Arguments,
    entry,
    finding_of_kind,
    path_in_call,
    path_of,
    replaced,
)

Replacements = Mapping[Any, tuple[Change, int]]


class Probe:
    """A context in which hooks capture the input, output and activations of a net.

    It also makes them differentiable. An input or activation without a graph is replaced by a leaf
    that requires grad; the tensors of the batch stay unchanged. The net computes with a copy of it,
    so an in-place operation in the net does not change the captured tensor. The forward pass runs
    on kernels that support the derivatives in ``spec.order``.

    The hooks are removed when the context ends. After `register_hooks` they stay on the net until
    `remove`, do nothing outside of the context, and entering the context again is cheap.

    Non-reentrant checkpointing reruns a forward pass in the backward pass. In such a rerun the
    hooks replace tensors as they did before, and discard what they capture.

    Args:
        net: the module to capture from.
        title: how error messages call it, such as "the submodule 'net'".
        spec: what to capture.
        replacements: what to compute with instead, each with the index of the call: of the input
            under the name "", of inputs by name under ("", name), of activations under their names.
        call: which call is captured of a submodule that is called several times, from 0. With None
            it is the last.
        eager: whether compiled modules run uncompiled within the context.
        own_batch: whether a name means an entry of the batch first, and then an argument of the
            net; else the other way round.
    """

    def __init__(
        self,
        net: nn.Module,
        title: str,
        spec: ProbeSpec,
        replacements: Replacements | None = None,
        *,
        call: int | None = None,
        eager: bool = False,
        own_batch: bool = False,
    ) -> None:
        self.net, self.title, self.spec, self.call = net, title, spec, call
        self.own_batch = own_batch
        self.replacements = replacements or {}
        self.eager = eager
        self.kernels = double_backward(spec.order) if spec.order else None
        self.registered = False
        self.hooks: list[Any] = []
        self.capture: Capture | None = None  # None outside of the context
        self._captured_last_forward = False

    def register_hooks(self) -> Probe:
        """Register the hooks once, until `remove`. Entering the context is then cheap."""
        self._register()
        self.registered = True
        return self

    def remove(self) -> None:
        """Remove the hooks."""
        while self.hooks:
            self.hooks.pop().remove()

    def expect_backward(self) -> None:
        """Say that the next backward pass is the one of the captured forward pass.

        Without this, a forward pass outside of the context, as a penalty may run, would be taken
        for the one that checkpointing reruns.
        """
        self._captured_last_forward = True

    def __enter__(self) -> Capture:
        """Return the capture. It is complete when the block ends."""
        if not self.registered:
            self._register()
        self.stance = set_stance("force_eager") if self.eager else None
        if self.kernels is not None:
            self.kernels.__enter__()
        self.capture = capture = Capture()
        self._captured_last_forward = True
        return capture

    def __exit__(self, *exception: object) -> None:
        """Stop capturing."""
        self.capture = None
        if self.kernels is not None:
            self.kernels.__exit__(*exception)
        if self.stance is not None:
            self.stance.__exit__(*exception)
        if not self.registered:
            self.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and deepcopy as an inert probe: a copy of the net copies its hooks too."""
        return Probe, (nn.Identity(), self.title, ProbeSpec())

    def _register(self) -> None:
        spec, net = self.spec, self.net
        named = [(name, net.get_submodule(name)) for name in spec.activations]
        if spec.x or spec.output or spec.entries:
            self.hooks.append(hooked(net, self._on_input, with_kwargs=True, before=True))
        if spec.output:
            self.hooks.append(hooked(net, self._on_output))
        for name, module in named:
            self.hooks.append(hooked(module, partial(self._on_activation, name)))

    def _current_capture(self) -> Capture | None:
        """Return where a hook stores what it captures; None if it has to do nothing.

        Raises:
            RuntimeError: if checkpointing reruns a forward pass whose input or activation a penalty
                has replaced.
        """
        if TRACES or not in_backward():
            self._captured_last_forward = self.capture is not None
            return self.capture
        if not self._captured_last_forward:
            return None
        if self.spec.moves:
            raise RuntimeError(
                f"{self.title} runs under checkpointing, which reruns its forward in the backward "
                "pass, and a penalty replaces its input or an activation: the rerun would compute "
                "something else. Use estimator='exact' at the data, or no checkpointing there"
            )
        return Capture()  # to be discarded

    def _on_input(self, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        capture = self._current_capture()
        if capture is None:
            return None
        where, x = (0, args[0]) if args else (None, None)
        if not isinstance(x, Tensor):
            places = [*enumerate(args), *kwargs.items()]
            where, x = next(((k, v) for k, v in places if isinstance(v, Tensor)), (None, None))
        chosen, index = self._count(capture, "", x)
        if self.spec.entries:
            args, kwargs = self._with_entries(capture, (args, kwargs), chosen, index)
            x = args[where] if isinstance(where, int) else kwargs.get(where)
        if not self.spec.x:
            return args, kwargs
        if x is None or not x.is_floating_point():
            found = "holds no tensor" if x is None else f"is {x.dtype}, which has no gradient"
            if chosen:
                capture.problems[""] = (
                    f"the input of {self.title} {found}: name a submodule whose input is a "
                    "floating-point tensor, such as the one after an embedding"
                )
            return args, kwargs
        used = self._tensor_to_use("", x, index)
        assert where is not None
        if chosen:
            capture.x, capture.arguments = used, (args, kwargs, where)
        return with_argument(args, kwargs, where, used.clone())

    def _with_entries(
        self, capture: Capture, call: Arguments, chosen: bool, index: int
    ) -> Arguments:
        """Return arguments in which inputs by name require grad, or are replaced."""
        for name in self.spec.entries:
            key, path, of_batch = ("", name), None, capture.of_batch.get(name)
            if of_batch is None or not self.own_batch:
                path = path_in_call(self.net, call, name)
            if path is None:
                path = path_of(call, of_batch)
                if chosen and path is not None:
                    capture.paths[name] = path
                continue
            if self.replacements and key not in self.replacements:
                continue
            x = entry(call, path)
            if not x.is_floating_point():
                if chosen and of_batch is None:
                    capture.problems[name] = finding_of_kind(name, x)
                continue
            capture.problems.pop(name, None)  # of an entry of the batch
            used = self._tensor_to_use(key, x, index)
            call = replaced(call, path, used.clone())
            if chosen:
                capture.entries[name], capture.paths[name] = used, path
                capture.of_call.add(name)
        if chosen:
            capture.arguments = (*call, 0)
        return call

    def _on_output(self, _: nn.Module, args: Any, output: Any) -> None:
        capture = self.capture
        if capture is None or (not TRACES and in_backward()):
            return
        if self._is_chosen(len(capture.calls[""]) - 1):
            capture.output = output

    def _on_activation(self, name: str, module: nn.Module, _: Any, output: Any) -> Any:
        capture = self._current_capture()
        if capture is None:
            return None
        chosen, index = self._count(capture, name, output)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            found = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
            if chosen:
                capture.problems[name] = (
                    f"activation({name!r}) must be a floating-point tensor; got {found}: name "
                    f"another submodule, such as one inside that {type(module).__name__}"
                )
            return output
        used = self._tensor_to_use(name, output, index)
        if chosen:
            capture.activations[name] = used
        return used.clone()

    def _count(self, capture: Capture, name: str, x: Any) -> tuple[bool, int]:
        """Count a call; return whether it is captured, and its index."""
        calls = capture.calls.setdefault(name, [])
        calls.append(list(x.shape) if isinstance(x, Tensor) else [])
        index = len(calls) - 1
        chosen = self._is_chosen(index)
        if chosen:
            capture.problems.pop(name, None)  # of a call before the chosen one
        return chosen, index

    def _is_chosen(self, index: int) -> bool:
        """Whether a call is captured. The first always is: it may be the only one."""
        return self.call is None or index in (0, self.call)

    def _tensor_to_use(self, name: Any, x: Tensor, index: int) -> Tensor:
        """Return the replacement for ``x`` if there is one, or ``x`` itself, requiring grad.

        Every call gets a tensor that requires grad, also one that is not captured: when
        checkpointing reruns a call it cannot be known which one it was.
        """
        if name in self.replacements:
            change, at = self.replacements[name]
            if at == index:
                return change(x)
        return x if x.requires_grad else variable(x)


def runs_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to the training step of a module, or to a submodule."""
    step = getattr(module, "training_step", None)
    return any(map(is_compiled, module.modules())) or is_compiled_function(step)
