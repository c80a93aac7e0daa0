"""Parameters by the names that they have in the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from gpkit.autodiff.compat import uncompiled_name


def by_group(optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the parameter groups of optimisers.

    Args:
        optimizers: all optimisers of the fit.

    Yields:
        The name and the parameters of each group. The name is the group's own "name", or "group_0"
        and so on; with several optimisers it begins with "optimizer_0/" and so on.
    """
    for i, optimizer in enumerate(optimizers):
        prefix = f"optimizer_{i}/" if len(optimizers) > 1 else ""
        for j, group in enumerate(optimizer.param_groups):
            yield f"{prefix}{group.get('name', f'group_{j}')}", group["params"]


def by_layer(module: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the submodules that own parameters directly.

    Args:
        module: the module. Parameters that it owns itself go under its class name.

    Yields:
        The name, as in ``module.named_modules()``, and the parameters.

    >>> [name for name, _ in by_layer(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.PReLU()))]
    ['0', '2']
    """
    for name, layer in module.named_modules():
        own: list[Tensor] = list(layer.parameters(recurse=False))
        if own:
            yield uncompiled_name(name) or type(module).__name__, own
