"""`prepare`: a copy of a net, in which what has no double backward is replaced by what has one."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpkit import checks
from gpkit.autodiff.compat import is_compiled, uncompiled_name
from gpkit.autodiff.isolation import double_backward
from gpkit.autodiff.state import copied_net
from gpkit.findings.compat import compiled_from, runs_eagerly

LOG = logging.getLogger(__name__)


def prepare(net: nn.Module, order: int = 1) -> nn.Module:
    """Return a copy of a net that computes the same, and can be differentiated twice.

    - ``nn.Hardsigmoid`` and ``nn.EmbeddingBag``, which torch differentiates once, are computed in
      operations that it differentiates again.
    - ``inplace=True`` of activations and dropout becomes False, so that no layer writes to an input
      that a penalty differentiates.
    - Compiled modules are the modules again that were compiled.
    - A net with attention or recurrent layers runs on kernels with a double backward, and for
      ``order`` >= 2 norm layers are computed in elementary operations. A penalty that runs the net
      itself, ``penalty(net, x)``, does that without `prepare`; ``penalty(net(x), x)`` needs it.

    Parameters keep their names, so a ``state_dict`` fits both. An operation in your own
    ``forward``, such as ``F.hardsigmoid``, stays.

    Args:
        net: is not changed.
        order: of the penalty's derivative.

    Returns:
        The copy. Its attribute ``prepared`` has what was changed, by the name of the module; it is
        also logged.

    Raises:
        TypeError: if it is no module.
        ValueError: if ``order`` < 1.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Hardsigmoid(), nn.ReLU(inplace=True))
    >>> prepare(net).prepared
    {'1': 'Hardsigmoid: in differentiable operations', '2': 'ReLU: inplace=False'}
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"`net=...` must be a torch.nn.Module; got a {type(net).__name__}")
    checks.integer("prepare(order=...)", order, 1)
    changes: dict[str, str] = {}
    made = _replaced("", uncompiled(net, changes), changes, {})
    fused = [type(m).__name__ for m in made.modules() if _has_fused_kernels(m)]
    if fused or (order > 1 and any(_is_norm(m) for m in made.modules())):
        kernels = _Kernels(order)
        made.register_forward_pre_hook(kernels.enter, prepend=True)
        made.register_forward_hook(kernels.leave, always_call=True)
        kinds = ", ".join(dict.fromkeys(fused)) or "norm layers"
        changes[""] = f"{kinds}: on kernels that have a double backward"
    for name, change in changes.items():
        LOG.info("%s: %s", name or "the net", change)
    made.prepared = changes  # type: ignore[assignment]
    return made


def fused(net: nn.Module) -> tuple[str, ...]:
    """Return the names of the compiled modules that have no double backward.

    The backends for debugging that run torch's own operations, such as "eager", have one.
    """
    found = {uncompiled_name(n): m for n, m in net.named_modules() if is_compiled(m)}
    return tuple(name for name, module in found.items() if not runs_eagerly(module))


def uncompiled(net: nn.Module, changes: dict[str, str]) -> nn.Module:
    """Return a copy of a net without compiled modules, and note these.

    Args:
        net: is not changed.
        changes: gets an entry for each of them.
    """
    for name, module in net.named_modules():
        if is_compiled(module):
            changes[uncompiled_name(name)] = f"{type(module).__name__}: uncompiled"
    # The copy of a module after module.compile() is not compiled.
    made = copied_net(net)
    for module in list(made.modules()):
        for own, child in list(module.named_children()):
            if compiled_from(child) is not child:
                setattr(module, own, compiled_from(child))
    return compiled_from(made)


def _replaced(
    name: str, module: nn.Module, changes: dict[str, str], seen: dict[nn.Module, nn.Module]
) -> nn.Module:
    """Return a module with its children replaced; one that occurs twice stays one."""
    if module in seen:
        return seen[module]
    found = module
    if type(found) is nn.Hardsigmoid:
        changes[name] = "Hardsigmoid: in differentiable operations"
        found = HardSigmoid()
    elif type(found) is nn.EmbeddingBag and found.mode in ("sum", "mean"):
        changes[name] = "EmbeddingBag: as an embedding and a sum"
        found = Bag(found)
    elif getattr(found, "inplace", False) is True:
        changes[name] = f"{type(found).__name__}: inplace=False"
        found.inplace = False  # type: ignore[assignment]
    found.training = module.training
    seen[module] = found
    for own, child in list(found.named_children()):
        inner = _replaced(f"{name}.{own}" if name else own, child, changes, seen)
        if inner is not child:
            setattr(found, own, inner)
    return found


class HardSigmoid(nn.Module):
    """min(max(x + 3, 0), 6) / 6, of operations that torch differentiates any number of times."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the value for each entry."""
        return F.relu6(x + 3) / 6


class Bag(nn.Module):
    """The sum or mean of the embeddings in each bag, as `torch.nn.EmbeddingBag`.

    Args:
        bag: the layer, whose weight is kept.
    """

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.weight, self.mode, self.padding_idx = bag.weight, bag.mode, bag.padding_idx
        self.include_last_offset = bag.include_last_offset
        self.options: dict[str, Any] = {
            "max_norm": bag.max_norm,
            "norm_type": bag.norm_type,
            "scale_grad_by_freq": bag.scale_grad_by_freq,
        }

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return ``[B, d]`` for indices ``[B, n]``, or for a list ``[N]`` with offsets ``[B]``."""
        if input.ndim == 2:
            bags, count = torch.arange(len(input), device=input.device), len(input)
            bags, flat = bags.repeat_interleave(input.shape[1]), input.reshape(-1)
        else:
            assert offsets is not None, "indices [N] need offsets"
            starts = offsets[:-1] if self.include_last_offset else offsets
            flat, count = input, len(starts)
            places = torch.arange(len(flat), device=flat.device)
            bags = torch.searchsorted(starts.contiguous(), places, right=True) - 1
        # Of the padding index neither the row nor a gradient counts.
        rows = F.embedding(flat, self.weight, self.padding_idx, **self.options)
        kept = torch.ones_like(flat, dtype=rows.dtype)
        if self.padding_idx is not None:
            kept = (flat != self.padding_idx).to(rows.dtype)
        weights = kept
        if per_sample_weights is not None:
            weights = kept * per_sample_weights.reshape(-1)
        total = rows.new_zeros(count, rows.shape[1]).index_add(0, bags, rows * weights[:, None])
        if self.mode == "sum":
            return total
        sizes = rows.new_zeros(count).index_add(0, bags, kept).clamp(min=1)
        return total / sizes[:, None]


class _Kernels:
    """Hooks around a forward pass, which then runs on kernels with a double backward."""

    def __init__(self, order: int) -> None:
        self.order = order
        self.entered: list[double_backward] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Begin a forward pass."""
        self.entered.append(double_backward(self.order))
        self.entered[-1].__enter__()

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """End it, also after an error."""
        self.entered.pop().__exit__(None, None, None)


def _has_fused_kernels(module: nn.Module) -> bool:
    """Whether a module runs attention or a recurrent net."""
    code = getattr(type(module).forward, "__code__", None)
    calls = code is not None and "scaled_dot_product_attention" in code.co_names
    return calls or isinstance(module, (nn.MultiheadAttention, nn.RNNBase))


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__
