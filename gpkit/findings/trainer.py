"""Checks of a `GradientPenaltyCallback` before the first step: every reason why a penalty fails."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff import graph
from gpkit.autodiff.compat import is_reentrant_checkpoint
from gpkit.autodiff.sharding.gathering import is_sharded
from gpkit.axes.parameters import weights
from gpkit.checks import is_a
from gpkit.finding import Finding, error
from gpkit.hints import HINTS

MODULES_WITH_PENALTIES = ("PenalizedModule", "GANModule")


def findings_before_fit(trainer: Any, module: nn.Module) -> Iterator[Finding]:
    """Yield the findings that need no training step: about the trainer, the module and the names.

    Args:
        trainer: the trainer of the fit. All of its `GradientPenaltyCallback` are checked, so that
            the first of them reports everything.
        module: the LightningModule.

    Yields:
        Each finding.
    """
    callbacks = [c for c in trainer.callbacks if is_a(c, "GradientPenaltyCallback")]
    if len(callbacks) > 1:
        yield error(
            "trainer",
            f"the trainer has {len(callbacks)} GradientPenaltyCallbacks, and one would "
            "differentiate the penalties of the other: pass all penalties to one, "
            "GradientPenaltyCallback([a, b])",
        )
    if is_a(module, *MODULES_WITH_PENALTIES):
        kind = type(module).__name__
        yield error(
            "trainer",
            f"a {kind} adds penalties itself, and logs under the same names: pass all penalties to "
            f"it, {kind}(..., penalty=...)",
        )
    for callback in callbacks:
        yield from _of_callback(trainer, module, callback)


def _of_callback(trainer: Any, module: Any, callback: Any) -> Iterator[Finding]:
    """Yield the findings about one callback."""
    which, penalties = callback.manual_backward, callback.penalties
    yield from findings_of_manual_backward(module, which, needed=True, what="gets the penalties")
    if isinstance(callback.losses, str) and not module.automatic_optimization:
        yield error(
            "call",
            f"losses={callback.losses!r} is an entry of what the step returns, and under manual "
            "optimisation penalties act before that: give a function of the output and the batch",
        )
    names = dict(module.named_modules())
    net = names.get(callback.module or "")
    if net is None:
        yield finding_of_name(module, callback.module)
    if is_sharded(module):
        from gpkit.findings.sharding import findings_of_sharding  # it loads FSDP2

        yield from findings_of_sharding(module, penalties, callback.needs)
        in_weights = any(needs.in_weights for needs in callback.needs.values())
        if in_weights and trainer.accumulate_grad_batches > 1:
            yield error(
                "trainer",
                "under FSDP penalties in the weights do not support gradient accumulation; got "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: use 1, or DDP",
            )
    for title, penalty in penalties.items():
        for found in _of_penalty(penalty, callback.needs[title], trainer, module, net):
            yield replace(found, penalty=title)


def findings_of_manual_backward(
    module: Any, which: int | None, *, needed: bool, what: str
) -> Iterator[Finding]:
    """Yield the findings about the argument ``manual_backward`` of a callback.

    Args:
        module: the LightningModule.
        which: the argument.
        needed: whether the callback has to know the backward pass.
        what: what that backward pass has or gets.

    Yields:
        Each finding.
    """
    automatic = module.automatic_optimization
    if automatic and which is not None:
        yield error("call", "`manual_backward=...` is for manual optimisation; leave it out")
    if needed and not automatic and which is None:
        yield error(
            "call",
            "the module optimises manually: say which of the manual_backward calls of a training "
            f"step {what}, with manual_backward=0 for the first",
        )


def finding_of_name(module: nn.Module, name: str) -> Finding:
    """Return what to say of a name that no submodule has, with the nearest name."""
    options = [n for n, _ in module.named_modules() if n]
    listed = ", ".join(repr(n) for n, _ in module.named_children())
    hint = checks.nearest(name, options)
    return error("call", f"there is no submodule {name!r}{hint}; there are {listed}")


def _of_penalty(
    penalty: Any, needs: Any, trainer: Any, module: Any, net: nn.Module | None
) -> Iterator[Finding]:
    """Yield the findings about one penalty. ``net`` is None if the submodule does not exist."""
    if needs.environments:
        yield error(
            "call",
            "it needs the environment of each sample, which a training step does not show: use "
            "PenalizedModule",
        )
        return
    yield from _of_strategy(trainer.strategy, module)
    reads_iterator = "dataloader_iter" in inspect.signature(module.training_step).parameters
    if not module.automatic_optimization and (needs.runs_again or penalty.scope == "accumulated"):
        yield error(
            "trainer",
            "it reruns the training step, which would step the optimisers again under manual "
            "optimisation: use estimator='exact', scope='batch'",
        )
    if needs.runs_again and reads_iterator:
        yield error(
            "trainer",
            "it reruns the training step on the same batch, and `dataloader_iter` gives another: "
            "write training_step(self, batch, batch_idx)",
        )
    if needs.part:
        yield error("call", needs.part)
    if needs.fakes:
        yield error("call", needs.fakes)
    names = [name for name, _ in needs.given]
    if names and reads_iterator:
        said = f"it reads {', '.join(names)} from the batch, and `dataloader_iter` is none"
        yield error("trainer", said)
    if "sample_weight" in names and needs.pooled:
        yield error(
            "call",
            f"scope={penalty.scope!r} has one norm, of a mean gradient, so it takes no "
            "sample_weight: weigh the samples in the loss"
            + ("" if may_shard(trainer.strategy) else ", or use scope='batch'"),
        )
    if net is not None:
        yield from _of_names(penalty, needs, net)


def _of_strategy(strategy: Any, module: nn.Module) -> Iterator[Finding]:
    """Yield why the gradients of a strategy cannot be penalised."""
    if is_a(strategy, "FSDPStrategy"):
        yield error(
            "trainer",
            "strategy='fsdp' is FSDP1, whose flat parameters have no double backward: use "
            "ModelParallelStrategy and fully_shard in configure_model, or strategy='ddp'",
        )
    elif is_a(strategy, "DeepSpeedStrategy"):
        said = "DeepSpeed gives no access to the gradients: use strategy='ddp'"
        yield error("trainer", said)
    elif is_a(strategy, "ModelParallelStrategy") and not is_sharded(module):
        yield error(
            "trainer",
            "under ModelParallelStrategy a penalty needs modules to which fully_shard was applied: "
            "apply it in configure_model, or use strategy='ddp'",
        )


def _of_names(penalty: Any, needs: Any, net: nn.Module) -> Iterator[Finding]:
    """Yield the activations and weights that a net does not have, or that are frozen."""
    for name in needs.activations:
        options = [n for n, _ in net.named_modules() if n]
        if name not in options:
            hint = checks.nearest(name, options)
            yield error("call", f"activation({name!r}) names no submodule{hint}")
    if isinstance(penalty.wrt, weights):
        match, options = penalty.wrt.match, [n for n, _ in net.named_parameters()]
        named = [n for n in options if fnmatch.fnmatchcase(n, match)]
        if not named:
            hint = checks.nearest(match, options)
            yield error("call", f"weights({match!r}) matches no parameter{hint}")
        elif not any(net.get_parameter(n).requires_grad for n in named):
            said = f"all {len(named)} parameters of weights({match!r}) are frozen"
            yield error("frozen", said)


def may_shard(strategy: Any) -> bool:
    """Whether a strategy may shard the parameters."""
    return is_a(strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def findings_of_loss(loss: Tensor) -> Iterator[Finding]:
    """Yield the findings about the loss of a training step."""
    if not loss.requires_grad:
        yield error("untrained", "the loss of the training step has no graph: was it detached?")
    if any(map(is_reentrant_checkpoint, graph.nodes(loss))):
        yield error(*HINTS["use_reentrant=True"])
