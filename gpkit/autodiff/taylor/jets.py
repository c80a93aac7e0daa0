"""Jet: a tensor subclass that carries Taylor coefficients through any function of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from gpkit.autodiff.compat import tree_leaves, tree_map
from gpkit.autodiff.taylor.compat import no_torch_function, wrapper_tensor

Rule = Callable[..., Any]


RULES: dict[str, Rule] = {}  # name of an ATen operation -> rule(func, *args, **kwargs) -> result


DETACH = torch.ops.aten.detach.default


class Jet(Tensor):
    """The truncated Taylor series a_0 + a_1 t + ... + a_k t^k, as a tensor with the value a_0.

    torch dispatches each operation on a jet to ``__torch_dispatch__`` as an ATen operation, which
    looks up the rule with its name. The coefficients are ordinary tensors with ordinary graphs.

    Args:
        coefficients: a_0, ..., a_k, all of the same shape; 0.0 where they are known to be zero.
    """

    order: int  # k
    leading: list[Tensor]  # without the zeros at the end, of which a path x + t v has many
    shares = False  # whether it is a view or has views: in-place writes would have to change those

    @staticmethod
    def __new__(cls, coefficients: Sequence[Any]) -> Jet:  # noqa: D102  see the class
        jet = wrapper_tensor(cls, coefficients[0])
        jet.assign(coefficients)
        return jet

    def assign(self, coefficients: Sequence[Any]) -> None:
        """Take these coefficients, in its own dtype."""
        own = list(coefficients)
        self.order = len(own) - 1
        while is_zero(own[-1]):
            own.pop()
        if any(map(is_zero, own)):
            zero = torch.zeros_like(own[0])
            own = [zero if is_zero(a) else a for a in own]
        self.leading = [a if a.dtype == self.dtype else a.to(self.dtype) for a in own]

    @property
    def coefficients(self) -> list[Tensor]:
        """a_0, ..., a_k as tensors."""
        return [
            a if isinstance(a, Tensor) else torch.zeros_like(self.leading[0]) for a in self.series
        ]

    @property
    def series(self) -> list[Any]:
        """a_0, ..., a_k, with 0.0 for the zeros at the end."""
        return [*self.leading, *[0.0] * (self.order + 1 - len(self.leading))]

    __torch_function__ = no_torch_function()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch passes them by position
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply the rule of an ATen operation, or raise an error that names it."""
        if func is DETACH:  # as autograd does with what it saves: without a look at the rules
            args[0].shares = True
            return args[0].leading[0].detach()
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if not torch.is_grad_enabled():  # under no_grad the result is a constant
            require_no_function()
            return func(*value(args), **value(kwargs))
        target = None
        if name.endswith("_") and name[:-1] in RULES and may_be_written_to(args[0]):
            target, name = args[0], name[:-1]
            overload = func.name().partition(".")[2]
            func = getattr(getattr(torch.ops.aten, name), overload or "default")
        if name not in RULES:
            raise NotImplementedError(refusal(name))
        with enable_reentrant_dispatch():
            out = RULES[name](func, *args, **kwargs)
        if func.is_view:
            for jet in filter(is_jet, tree_leaves((args, out))):
                jet.shares = True
        if target is None:
            return out
        target.assign(out.series)
        return target

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Jet({self.coefficients!r})"


PIECEWISE = (
    "abs",
    "relu",
    "leaky_relu",
    "prelu",
    "elu",
    "celu",
    "hardtanh",
    "clamp",
    "clamp_min",
    "clamp_max",
    "maximum",
    "minimum",
    "max",
    "min",
    "amax",
    "amin",
    "max_pool2d_with_indices",
    "adaptive_max_pool2d",
    "threshold",
    "sort",
    "topk",
    "where",
    "gt",
    "ge",
    "lt",
    "le",
    "sign",
    "_prelu_kernel",
    "rrelu_with_noise",
    "hardswish",
    "hardsigmoid",
    "softshrink",
    "hardshrink",
    "smooth_l1_loss",
    "huber_loss",
    "floor",
    "round",
)


def refusal(name: str) -> str:
    """Return the error message for an operation without a rule."""
    if name in PIECEWISE:
        return (
            f"Taylor mode needs smooth operations; {name!r} is piecewise, and its derivatives "
            "ignore the kinks: use GELU, SiLU, softplus or tanh"
        )
    if name in ("copy_", "fill_"):
        return (
            f"Taylor mode does not support the in-place operation {name!r}, as in y[:, 0] = x: "
            "make a new tensor of the parts, as with torch.cat, torch.stack or torch.where"
        )
    if name.endswith("_") and not name.endswith("__"):
        return (
            f"Taylor mode does not support the in-place operation {name!r} on a view, a tensor "
            f"with views, or a constant: use {name[:-1]!r}"
        )
    return (
        f"Taylor mode has no rule for the operation {name!r}: use estimator='exact' or 'projection'"
    )


def require_no_function() -> None:
    """Refuse an `torch.autograd.Function`: its forward is under no_grad, so it looks constant.

    Those of torch's sharding are refused by what they are, see `require_no_hooks`.

    Raises:
        NotImplementedError: if one runs now.
    """
    frame: Any = inspect.currentframe()
    while frame is not None:
        kind = frame.f_locals["cls"] if frame.f_code is APPLY else None
        if kind is not None and not kind.__module__.startswith("torch.distributed."):
            raise NotImplementedError(
                "Taylor mode cannot look into a torch.autograd.Function; got "
                f"{kind.__name__}: use estimator='exact' or 'projection'"
            )
        frame = frame.f_back


APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def may_be_written_to(x: Any) -> bool:
    """Whether x is a jet without views, so that an in-place operation changes it only."""
    return isinstance(x, Jet) and not x.shares


def is_jet(x: Any) -> bool:
    """Whether x is a jet."""
    return isinstance(x, Jet)


def is_zero(a: Any) -> bool:
    """Whether a coefficient is the number zero: known to be zero, and no tensor."""
    return isinstance(a, float) and a == 0


def order_of(*args: Any) -> int:
    """Return k of the first jet among the arguments."""
    return next(x.order for x in tree_leaves(args) if is_jet(x))


def coefficients(x: Any, order: int) -> list[Any]:
    """Return a_0, ..., a_k of a jet; for a constant tensor or number a_1, ..., a_k are zero."""
    if isinstance(x, Jet):
        return x.coefficients
    zero = torch.zeros_like(x) if isinstance(x, Tensor) else 0.0
    return [x, *[zero] * order]


def value(x: Any) -> Any:
    """Return the arguments of an operation with each jet replaced by its a_0."""
    return tree_map(lambda a: a.leading[0] if isinstance(a, Jet) else a, x)


def jets(results: Sequence[Any], order: int) -> Any:
    """Return the results of an operation on the first coefficients as a jet, or as several jets.

    Args:
        results: for a_0, a_1, ...; those that are left out are zero.
        order: k.
    """
    rest = [0.0] * (order + 1 - len(results))
    if isinstance(results[0], Tensor):
        return Jet([*results, *rest])
    return type(results[0])([Jet([*parts, *rest]) for parts in zip(*results, strict=True)])


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule for the ATen operations with these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register
