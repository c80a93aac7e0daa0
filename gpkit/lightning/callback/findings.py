"""What keeps a penalty from acting on a LightningModule, told before the first step."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff import graph
from gpkit.autodiff.compat import is_reentrant_checkpoint
from gpkit.axes.at import At, fake, interpolate, mixture
from gpkit.axes.wrt import weights
from gpkit.gradient_penalty import GradientPenalty
from gpkit.lightning.compat import is_a
from gpkit.lightning.watch.probe import Seen, Wanted
from gpkit.needs import needs_of
from gpkit.penalty import Penalty

CANNOT = "GradientPenaltyCallback cannot add its penalties"
PENALISED = ("PenalizedModule", "GANModule")

IN_PLACE = (
    "the training step writes to its batch in place, and a penalty runs it again on that batch: "
    "let it write to a copy, or use a penalty of scope='batch' with estimator='exact'"
)


def before_fit(trainer: Any, module: pl.LightningModule) -> list[str]:
    """Return what can be told of the trainer and the module alone.

    Args:
        trainer: of the run. All its callbacks with penalties are looked at.
        module: the LightningModule.

    Returns:
        A line for each finding.
    """
    callbacks = [c for c in trainer.callbacks if is_a(c, "GradientPenaltyCallback")]
    found = []
    if len(callbacks) > 1:
        found.append(
            "the trainer has two GradientPenaltyCallbacks, and one would differentiate the "
            "penalties of the other: give all penalties to one, GradientPenaltyCallback([a, b])"
        )
    if is_a(module, *PENALISED):
        kind = type(module).__name__
        found.append(
            f"the {kind} has penalties of its own, and logs under the same names: give them all to "
            f"it, {kind}(..., penalty=...)"
        )
    for c in callbacks:
        found += _of_callback(trainer, module, c.penalties, c.module, c.manual_backward)
    return found


def _of_callback(
    trainer: Any,
    module: pl.LightningModule,
    penalties: Mapping[str, Penalty],
    name: str | None,
    manual_backward: int | None,
) -> list[str]:
    """Return what is found of one callback; its arguments are those of the callback."""
    found = []
    automatic = module.automatic_optimization
    if automatic and manual_backward is not None:
        found.append("`manual_backward=...` is for manual optimisation; leave it out")
    if not automatic and manual_backward is None:
        found.append(
            "the module optimises manually: say which of the manual_backward calls of a training "
            "step gets the penalty, manual_backward=0 for the first"
        )
    names = dict(module.named_modules())
    net = names.get(name or "")
    if net is None:
        hint = checks.nearest(str(name), filter(None, names))
        listed = ", ".join(repr(n) for n, _ in module.named_children())
        found.append(f"there is no submodule {name!r}{hint}; there are {listed}")
    if sharded(module):
        from gpkit.lightning.callback.sharded import refusals

        found += refusals(module, penalties)
        if trainer.accumulate_grad_batches > 1:
            found.append(
                "under FSDP the penalty is that of one micro-batch a step; got "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: use 1, or DDP"
            )
    for title, penalty in penalties.items():
        found += [f"penalty {title!r}: {line}" for line in _of(penalty, trainer, module, net)]
    return found


def _of(
    penalty: Penalty, trainer: Any, module: pl.LightningModule, net: nn.Module | None
) -> Iterator[str]:
    """Yield what is found of one penalty."""
    strategy = trainer.strategy
    needs = needs_of(penalty)
    if needs.environments or not isinstance(penalty, GradientPenalty):
        yield "environments are not seen in a training step: use PenalizedModule"
        return
    if is_a(strategy, "FSDPStrategy"):
        yield (
            "strategy='fsdp' is FSDP1, whose flat parameters have no double backward: use "
            "ModelParallelStrategy, fully_shard in configure_model, and "
            "estimator='finite_difference' with scope='global'; or strategy='ddp'"
        )
    elif is_a(strategy, "DeepSpeedStrategy"):
        yield "DeepSpeed keeps the gradients to itself: use strategy='ddp'"
    elif is_a(strategy, "ModelParallelStrategy") and not (needs.in_weights and sharded(module)):
        yield (
            "under ModelParallelStrategy penalties are in the weights, of modules to which "
            "fully_shard was applied: use estimator='finite_difference' with scope='global', or "
            "strategy='ddp'"
        )
    if not module.automatic_optimization and (needs.runs_again or penalty.scope == "accumulated"):
        yield (
            "it runs the training step again, which under manual optimisation would step the "
            "optimisers: use estimator='exact', scope='batch'"
        )
    if needs.runs_again and "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield "it runs the training step again, which `dataloader_iter` does not allow: use a batch"
    if any(isinstance(at, (interpolate, fake)) for at in _points(penalty.at)):
        yield (
            f"at={type(penalty.at).__name__}() needs fakes, and a training step shows none: use "
            "gpkit.GANModule, or penalty(critic, real=..., fake=...) in the training step"
        )
    for name in needs.activations if net is not None else ():
        options = [n for n, _ in net.named_modules() if n]  # type: ignore[union-attr]
        if name not in options:
            yield f"activation({name!r}) names no submodule{checks.nearest(name, options)}"
    wrt = penalty.wrt
    if isinstance(wrt, weights) and net is not None:
        named = [n for n, p in net.named_parameters() if fnmatch.fnmatchcase(n, wrt.match)]
        if not named:
            options = [n for n, _ in net.named_parameters()]
            yield f"weights({wrt.match!r}) matches no parameter{checks.nearest(wrt.match, options)}"
        elif not any(net.get_parameter(n).requires_grad for n in named):
            yield f"all {len(named)} parameters of weights({wrt.match!r}) are frozen"


def shards(strategy: Any) -> bool:
    """Whether a strategy may shard parameters."""
    return is_a(strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds the parameters, or some of them."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from gpkit.lightning.callback.sharded import is_sharded

    return is_sharded(module)


def _points(at: At) -> list[At]:
    """Return the points of a mixture, each, or the points themselves."""
    return [p for part in at.ats for p in _points(part)] if isinstance(at, mixture) else [at]


def of_net(module: nn.Module, title: str, seen: Seen, wanted: Wanted) -> list[str]:
    """Return what can be told of the net in a step that was made.

    Args:
        module: the LightningModule.
        title: how the net that was watched is called.
        seen: of the net.
        wanted: of the net.

    Returns:
        A line for each finding.
    """
    found = list(seen.problems)
    names = [*[""] * wanted.x, *wanted.activations, *seen.calls]
    called = {name: f"activation({name!r})" if name else title for name in names}
    children = ", ".join(repr(n) for n, _ in module.named_children())
    for name, what in called.items():
        count = seen.calls.get(name, 0)
        if count == 0:
            hint = "name one" if name else f"module=... names one, of {children},"
            found.append(f"the training step does not call {what}: {hint} that it calls")
        elif count > 1 and module.automatic_optimization:
            found.append(f"the training step calls {what} {count} times: name one called once")
    return found


def of_loss(loss: Tensor) -> list[str]:
    """Return what can be told of the loss that a step gave: a line for each finding."""
    found = []
    if not loss.requires_grad:
        found.append("the loss of the training step has no graph: was it detached?")
    if any(map(is_reentrant_checkpoint, graph.nodes(loss))):
        found.append(
            "the training step uses reentrant checkpointing, through which there is no gradient "
            "of a gradient: checkpoint(..., use_reentrant=False)"
        )
    return found
