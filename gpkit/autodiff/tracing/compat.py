"""What compiling takes of torch beside its public API, as ``autodiff/compat.py`` for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Hook = Callable[..., Any]


def traces_gradients() -> bool:
    """Whether torch.compile can trace torch.autograd.grad, from torch 2.13 on.

    There is no public way to ask, or to turn it on.

    Returns:
        Whether the option exists.
    """
    import torch._dynamo

    return hasattr(torch._dynamo.config, "trace_autograd_ops")


@cache
def tracing_gradients() -> AbstractContextManager[Any]:
    """Return a context in which torch.compile traces gradients, and compiles up to 16 graphs.

    The limit is for one function. It is public in torch.compiler.config, but patching two configs
    at every step takes twice as long. Under DDP the graph must not be split at its buckets. The
    context may be entered again, also inside of itself.
    """
    import torch._dynamo

    options: dict[str, Any] = {"trace_autograd_ops": True, "recompile_limit": 16}
    options["skip_nnmodule_hook_guards"] = False  # a hook of a later step has to be seen
    return torch._dynamo.config.patch(**options, optimize_ddp=False)


def graphs_allowed() -> int:
    """Return how many graphs of one function torch.compile looks at without `tracing_gradients`."""
    import torch._dynamo

    return int(torch._dynamo.config.recompile_limit)


def for_steps(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of torch.compile with which a graph draws the random numbers of eager torch.

    Those of torch's own compiler are others, and no step with dropout would be as without it.
    Before each step a graph looks at all that it was made of; at what does not change, no longer.

    Args:
        options: of torch.compile.

    Returns:
        The options. For torch's own compiler a mode becomes what it stands for, since torch.compile
        takes no mode beside options.
    """
    import torch._inductor

    mode, given = options.get("mode"), options.get("options")
    own: dict[str, Any] = {"guard_filter_fn": may_change}
    if options.get("backend", "inductor") == "inductor":
        own["fallback_random"] = True
        own["joint_custom_pre_pass"] = sums_of_transposes()
        own |= torch._inductor.list_mode_options(mode) if mode else {}
    elif mode:
        return options
    others = {name: option for name, option in options.items() if name != "mode"}
    return {**others, "options": {**own, **(given or {})}}


@cache
def sums_of_transposes() -> Any:
    """Return a pass over graphs of torch's own compiler that makes aᵀ + bᵀ into (a + b)ᵀ.

    The gradient in a weight has two parts, the products from z = a Wᵀ and from g = δ W. The first
    is of Wᵀ, so both are transposed and summed there. Summed as they are, the compiler adds one
    product to the other, without a pass over both.
    """
    from torch._inductor.custom_graph_pass import CustomGraphPass

    add, permute = torch.ops.aten.add.Tensor, torch.ops.aten.permute.default

    class SumsOfTransposes(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.find_nodes(op="call_function", target=add):
                pair = node.args
                if node.kwargs or any(getattr(x, "target", None) is not permute for x in pair):
                    continue
                (a, order), (b, other) = (x.args for x in pair)
                if order == other and all(len(x.users) == 1 for x in pair):
                    with graph.inserting_before(node):
                        total = graph.call_function(add, (a, b))
                        total.meta["val"] = a.meta["val"] + b.meta["val"]
                        swapped = graph.call_function(permute, (total, order))
                        swapped.meta.update(node.meta)
                    node.replace_all_uses_with(swapped)
                    for left in (node, *dict.fromkeys(pair)):
                        graph.erase_node(left)

        def uuid(self) -> str:
            return "gpkit: sums of transposes, 1"

    return SumsOfTransposes()


# What guards of gpkit's own code, and of Python's, are about: functions, classes and constants.
FIXED = (
    *("G['__import_gpkit_dot_", "G['__import_contextlib']", "G['__builtins_dict__"),
    *("G['__import_itertools']", "G['__import_torch_dot__"),
    *("calls", "order", "anchor", "weights", "may_be_traced"),
    *("G['Trace']", "G['TRACES']", "G['nullcontext']"),
)


def may_change(guards: Sequence[Any]) -> list[bool]:
    """Return which guards of a graph are needed: those of the user's objects, and of torch.

    Of gpkit's objects in them, such as a penalty, the attributes are needed. Their classes are not,
    and neither is what a penalty knows of earlier eager steps, which no graph uses.
    """
    own = {guard.name: type(guard.value).__module__ for guard in guards}
    own = {name: module for name, module in own.items() if module.startswith("gpkit.")}
    known = tuple(name for name, module in own.items() if module.startswith("gpkit.shortcut."))
    classes = [f"type({name})" for name in own]

    def needed(guard: Any) -> bool:
        if guard.name.startswith((*FIXED, *known)) or any(c in guard.name for c in classes):
            return False
        return guard.name not in own or guard.guard_type != "NOT_PRESENT_IN_GENERIC_DICT"

    return list(map(needed, guards))


def is_noted(x: Tensor) -> bool:
    """Whether Dynamo runs a function of this tensor, to see the shape of what it returns.

    It does so with tensors without values. Later, when the graph of single operations is made,
    these are inside of others, of another class.

    Args:
        x: an argument of the function.

    Returns:
        Whether it has no values, and is not inside of another.
    """
    from torch._subclasses import FakeTensor

    return isinstance(x, FakeTensor)


def traceable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that does the same, for a TorchFunctionMode that may be traced.

    ``Tensor.unflatten`` is written in Python, around one of its base class that Dynamo does not
    find from inside of a mode. It is compared by ``is``: Dynamo does not find it in a dict either.

    Args:
        function: of torch.
    """
    return torch.unflatten if function is Tensor.unflatten else function


def keeping_buffers() -> AbstractContextManager[Any]:
    """Return a context in which a graph is compiled, and run, with several backward passes."""
    import torch._functorch.config

    return torch._functorch.config.patch(donated_buffer=False)


class hooked_by:
    """A context in which modules have two forward hooks; it can be entered again.

    Its key is always the same, which ``register_forward_hook`` does not promise: for a new one the
    graph would be compiled anew.

    Args:
        before: ``(module, args, kwargs) -> (args, kwargs)``.
        after: ``(module, args, kwargs, output) -> output``.
        modules: that are hooked.
    """

    def __init__(self, before: Hook, after: Hook, modules: Sequence[nn.Module]) -> None:
        self.before, self.after, self.modules = before, after, modules

    def __enter__(self) -> None:
        before, after = self.before, self.after
        for module in self.modules:
            module._forward_hooks[KEY] = after
            module._forward_hooks_with_kwargs[KEY] = True
            module._forward_pre_hooks[KEY] = before
            module._forward_pre_hooks_with_kwargs[KEY] = True

    def __exit__(self, *exception: object) -> None:
        for module in self.modules:
            del module._forward_hooks[KEY]
            del module._forward_hooks_with_kwargs[KEY]
            del module._forward_pre_hooks[KEY]
            del module._forward_pre_hooks_with_kwargs[KEY]


KEY = -1  # torch's own are not negative


@torch.library.custom_op("gpkit::copied", mutates_args=())
def copied(x: Tensor) -> Tensor:
    """Return a copy, which a graph keeps for its backward pass if that needs it.

    An ordinary copy is made anew there: of a buffer that the step has written to by then. Torch's
    own compiler has wrong gradients where batch norm runs in training mode, and then in eval mode.
    """
    return x.clone()


@copied.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class buffers_apart:
    """A context, in a graph, in which modules write to copies of their buffers.

    Args:
        modules: with the names of their buffers.
        evaluating: whether the modules are in eval mode meanwhile.
    """

    def __init__(
        self, modules: Iterable[tuple[nn.Module, tuple[str, ...]]], *, evaluating: bool = False
    ) -> None:
        self.modules, self.evaluating = modules, evaluating

    def __enter__(self) -> None:
        self.trained = [m for m, _ in self.modules if m.training] if self.evaluating else []
        for module in self.trained:
            module.training = False
        self.kept = [(m, name, m._buffers[name]) for m, names in self.modules for name in names]
        for module, name, buffer in self.kept:
            if buffer is not None:
                module._buffers[name] = copied(buffer) if self.evaluating else buffer.clone()

    def __exit__(self, *exception: object) -> None:
        for module, name, buffer in self.kept:
            module._buffers[name] = buffer
        for module in self.trained:
            module.training = True
