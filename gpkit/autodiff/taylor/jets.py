"""Jet: a tensor subclass that carries Taylor coefficients through any function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch

from gpkit.autodiff.compat import no_torch_function, tree_leaves, tree_map, wrapper_tensor

Rule = Callable[..., Any]


RULES: dict[str, Rule] = {}  # name of an ATen operation -> rule(func, *args, **kwargs) -> result


class Jet(Tensor):
    """The truncated Taylor series a_0 + a_1 t + ... + a_k t^k, as a tensor with the value a_0.

    torch dispatches each operation on a jet to ``__torch_dispatch__`` as an ATen operation, which
    looks up the rule with its name. The coefficients are ordinary tensors with ordinary graphs.

    Args:
        coefficients: a_0, ..., a_k, all of the same shape.
    """

    coefficients: list[Tensor]
    shares = False  # whether it is a view or has views: in-place writes would have to change those

    @staticmethod
    def __new__(cls, coefficients: Sequence[Tensor]) -> Jet:  # noqa: D102  see the class
        value = coefficients[0]
        jet = wrapper_tensor(cls, value)
        jet.coefficients = [
            a if a.dtype == value.dtype else a.to(value.dtype) for a in coefficients
        ]
        return jet

    __torch_function__ = no_torch_function()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch passes them by position
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Apply the rule of an ATen operation, or raise an error that names it."""
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if not torch.is_grad_enabled():  # under no_grad the result is a constant
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
        target.coefficients = [a.to(target.dtype) for a in out.coefficients]
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
)


def refusal(name: str) -> str:
    """Return the error message for an operation without a rule."""
    if name in PIECEWISE:
        return (
            f"Taylor mode of order >= 2 needs smooth operations; {name!r} is piecewise, and its "
            "derivatives ignore the kinks: use GELU, SiLU, softplus or tanh"
        )
    if name.endswith("_") and not name.endswith("__"):
        return (
            f"Taylor mode does not support the in-place operation {name!r} on a view, a tensor "
            f"with views, or a constant: use {name[:-1]!r}"
        )
    return (
        f"Taylor mode has no rule for the operation {name!r}: use estimator='exact' or 'projection'"
    )


def may_be_written_to(x: Any) -> bool:
    """Whether x is a jet without views, so that an in-place operation changes it only."""
    return isinstance(x, Jet) and not x.shares


def is_jet(x: Any) -> bool:
    """Whether x is a jet."""
    return isinstance(x, Jet)


def order_of(*args: Any) -> int:
    """Return k of the first jet among the arguments."""
    return next(len(x.coefficients) - 1 for x in tree_leaves(args) if is_jet(x))


def coefficients(x: Any, order: int) -> list[Any]:
    """Return a_0, ..., a_k of a jet; for a constant tensor or number a_1, ..., a_k are zero."""
    if isinstance(x, Jet):
        return x.coefficients
    zero = torch.zeros_like(x) if isinstance(x, Tensor) else 0.0
    return [x, *[zero] * order]


def value(x: Any) -> Any:
    """Return the arguments of an operation with each jet replaced by its a_0."""
    return tree_map(lambda a: a.coefficients[0] if isinstance(a, Jet) else a, x)


def jets(results: Sequence[Any]) -> Any:
    """Return the results of an operation on a_0, ..., a_k as a jet, or as several jets."""
    if isinstance(results[0], Tensor):
        return Jet(results)
    return type(results[0])([Jet(parts) for parts in zip(*results, strict=True)])


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule for the ATen operations with these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register
