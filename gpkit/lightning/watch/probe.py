"""Forward hooks that capture the input, output and activations of a net during a training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.compiler import set_stance
from torch.utils.hooks import RemovableHandle

from gpkit.autodiff.compat import in_backward, is_compiled, is_compiled_function
from gpkit.autodiff.isolation import double_backward


@dataclass(frozen=True)
class ProbeSpec:
    """What a `Probe` captures, and what the forward pass has to support.

    Args:
        order: highest order k of a derivative that a penalty takes by double backward: the forward
            runs on kernels that can be differentiated so often. 0 if every graph is differentiated
            once.
        x: whether to capture the input of the net.
        output: whether to capture its output.
        activations: names of submodules whose outputs are captured.
        moves: whether a penalty reruns the net at another input or activation.
    """

    order: int = 0
    x: bool = False
    output: bool = False
    activations: tuple[str, ...] = ()
    moves: bool = False

    @property
    def eager(self) -> bool:
        """Whether a compiled net must run uncompiled: it has no hooks and no double backward."""
        return self.order > 0 or self.x or self.output or bool(self.activations)


@dataclass
class Capture:
    """What a `Probe` captured in one training step: of several calls of the net, the last one.

    Args:
        x: the first tensor in the input of the net, ``[B, *S]``. It requires grad.
        output: the output of the net.
        activations: outputs of submodules by name, ``[B, *H]`` each. They require grad.
        calls: number of calls by submodule name; the name of the net itself is "".
        problems: messages about inputs and activations that cannot be differentiated.
    """

    x: Tensor | None = None
    output: Any = None
    activations: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


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
        replacements: tensors to compute with instead: of the input under the name "", of
            activations under their names.
        eager: whether compiled modules run uncompiled within the context.
    """

    def __init__(
        self,
        net: nn.Module,
        title: str,
        spec: ProbeSpec,
        replacements: Mapping[str, Tensor] | None = None,
        *,
        eager: bool = False,
    ) -> None:
        self.net, self.title, self.spec = net, title, spec
        self.replacements = replacements or {}
        self.eager = eager
        self.kernels = double_backward(spec.order) if spec.order else None
        self.registered = False
        self.hooks: list[RemovableHandle] = []
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
        if spec.x:
            self.hooks.append(net.register_forward_pre_hook(self._on_input, with_kwargs=True))
        if spec.output:
            self.hooks.append(net.register_forward_hook(self._on_output))
        for name, module in named:
            self.hooks.append(module.register_forward_hook(partial(self._on_activation, name)))

    def _current_capture(self) -> Capture | None:
        """Return where a hook stores what it captures; None if it has to do nothing.

        Raises:
            RuntimeError: if checkpointing reruns a forward pass whose input or activation a penalty
                has replaced.
        """
        if not in_backward():
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
        capture.calls[""] = capture.calls.get("", 0) + 1
        where, x = (0, args[0]) if args else (None, None)
        if not isinstance(x, Tensor):
            places = [*enumerate(args), *kwargs.items()]
            where, x = next(((k, v) for k, v in places if isinstance(v, Tensor)), (None, None))
        if x is None or not x.is_floating_point():
            found = "holds no tensor" if x is None else f"is {x.dtype}, which has no gradient"
            capture.problems.append(
                f"the input of {self.title} {found}: name a submodule whose input is a "
                "floating-point tensor, such as the one after an embedding"
            )
            return args, kwargs
        capture.x = used = self._tensor_to_use("", x)
        if isinstance(where, int):
            args = (*args[:where], used.clone(), *args[where + 1 :])
        else:
            kwargs = {**kwargs, where: used.clone()}
        return args, kwargs

    def _on_output(self, _: nn.Module, args: Any, output: Any) -> None:
        if self.capture is not None and not in_backward():
            self.capture.output = output

    def _on_activation(self, name: str, module: nn.Module, _: Any, output: Any) -> Any:
        capture = self._current_capture()
        if capture is None:
            return None
        capture.calls[name] = capture.calls.get(name, 0) + 1
        if not isinstance(output, Tensor) or not output.is_floating_point():
            found = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
            capture.problems.append(
                f"activation({name!r}) must be a floating-point tensor; got {found}: name another "
                f"submodule, such as one inside that {type(module).__name__}"
            )
            return output
        capture.activations[name] = used = self._tensor_to_use(name, output)
        return used.clone()

    def _tensor_to_use(self, name: str, x: Tensor) -> Tensor:
        """Return the replacement for ``x`` if there is one, or ``x`` itself, requiring grad."""
        if name in self.replacements:
            return self.replacements[name]
        return x if x.requires_grad else x.detach().requires_grad_()


def runs_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was applied to the training step of a module, or to a submodule."""
    step = getattr(module, "training_step", None)
    return any(map(is_compiled, module.modules())) or is_compiled_function(step)
