"""What the trainer and a subclass of a `GANModule` must be."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from pytorch_lightning.utilities import rank_zero_warn

from gpkit.lightning.compat import scaler_of

UNCALLED = {
    "critic_loss": "give loss=gpkit.lightning.gan.GANLoss(critic=..., generator=...)",
    "generator_loss": "give loss=gpkit.lightning.gan.GANLoss(critic=..., generator=...)",
    "optimizer_step": "Lightning does not call it under manual optimisation",
    "optimizer_zero_grad": "Lightning does not call it under manual optimisation",
    "on_before_zero_grad": "Lightning does not call it under manual optimisation",
    "lr_scheduler_step": "Lightning does not call it under manual optimisation",
    "configure_gradient_clipping": "use gradient_clip=..., or on_before_optimizer_step",
}


def warn_of_uncalled(module: pl.LightningModule, known: type) -> None:
    """Warn of methods of a subclass that nothing calls.

    Args:
        module: of the subclass.
        known: the class that it derives from.
    """
    for name, why in UNCALLED.items():
        if getattr(type(module), name, None) is not getattr(known, name, None):
            rank_zero_warn(f"{type(module).__name__} defines {name}, which is not called: {why}")


def require_support(trainer: pl.Trainer, *, simultaneous: bool) -> None:
    """Raise an error for a trainer under which gradients would be wrong.

    Args:
        trainer: the trainer of the fit.
        simultaneous: whether both nets are differentiated before either optimiser steps.

    Raises:
        RuntimeError: if the strategy is neither a single device, nor DDP, nor FSDP2, if DDP has a
            static graph, or if a gradient scaler would change its scale between the two steps.
    """
    known = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)
    if not isinstance(trainer.strategy, known):
        raise RuntimeError(
            "GANModule trains on one device, under DDP, or under ModelParallelStrategy with "
            "fully_shard in configure_model; got "
            f"{type(trainer.strategy).__name__}: use strategy='ddp'"
        )
    if getattr(trainer.model, "static_graph", False):
        raise RuntimeError(
            "GANModule has different graphs in the steps of critic and generator; got "
            "DDPStrategy(static_graph=True): leave static_graph out"
        )
    if simultaneous and scaler_of(trainer) is not None:
        raise RuntimeError(
            "`simultaneous=True` needs one gradient scale for both steps, and precision='16-mixed' "
            "changes it in between: use precision='bf16-mixed' or 32"
        )


def require_started(module: Any, known: type, *, again: bool = False) -> None:
    """Begin a fit, once: check its trainer, and warn of methods that are not called.

    Args:
        module: a `GANModule`, or a subclass, which may have an ``on_fit_start`` of its own.
        known: the class `GANModule`.
        again: whether another fit may begin with the same trainer.
    """
    if again or getattr(module, "supported", None) is not module.trainer:
        require_support(module.trainer, simultaneous=module.simultaneous)
        warn_of_uncalled(module, known)
        module.window.clear()
        nets = ["critic", "generator"] if module.trains_generator else ["critic"]
        # Once: later FSDP2 may have gathered the parameters, which are others then.
        module.places = {net: place_of(module.optimizers(), module, net) for net in nets}
        module.supported = module.trainer


def place_of(optimizers: Any, module: pl.LightningModule, name: str) -> int:
    """Return which of the optimisers is that of a net; ``configure_optimizers`` has any order.

    Args:
        optimizers: one, or a list.
        module: the `GANModule`.
        name: of the net.

    Returns:
        The index.

    Raises:
        ValueError: if none has its parameters, or one has those of others as well.
    """
    net = getattr(module, name)
    own = {id(p) for p in net.parameters()}
    for place, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if stepped & own:
            if stepped - own:
                raise ValueError(
                    f"the optimiser of the {name} has parameters of others too, which would be "
                    "stepped with it: return one for each net from configure_optimizers"
                )
            return place
    raise ValueError(
        f"no optimiser has parameters of the {name}: return one for each net from "
        "configure_optimizers, or freeze the net"
    )
