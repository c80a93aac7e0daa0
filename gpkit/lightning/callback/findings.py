"""Checks of a `GradientPenaltyCallback` before the first step: every reason why a penalty fails."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff import graph
from gpkit.autodiff.compat import is_reentrant_checkpoint, tree_leaves
from gpkit.autodiff.sharding.gathering import is_sharded
from gpkit.axes.parameters import weights
from gpkit.finding import error
from gpkit.gradient_penalty import GradientPenalty
from gpkit.hints import HINTS
from gpkit.lightning.callback.plan import PenalizedNet
from gpkit.lightning.compat import is_a
from gpkit.lightning.watch.calls import SeenCalls, findings_of_calls
from gpkit.lightning.watch.probe import Capture, ProbeSpec
from gpkit.needs import needs_of
from gpkit.penalty import Penalty

MODULES_WITH_PENALTIES = ("PenalizedModule", "GANModule")

BATCH_WRITTEN_IN_PLACE = (
    "the training step writes to its batch in place, and a penalty reruns it on that batch: "
    "write to a copy, or use scope='batch' with estimator='exact'"
)


def findings_before_fit(trainer: Any, module: pl.LightningModule) -> list[str]:
    """Return the findings that need no training step: about the trainer, the module and the names.

    Args:
        trainer: the trainer of the fit. All of its `GradientPenaltyCallback` are checked, so that
            the first of them reports everything.
        module: the LightningModule.

    Returns:
        One line for each finding.
    """
    callbacks = [c for c in trainer.callbacks if is_a(c, "GradientPenaltyCallback")]
    found = []
    if len(callbacks) > 1:
        found.append(
            f"the trainer has {len(callbacks)} GradientPenaltyCallbacks, and one would "
            "differentiate the penalties of the other: pass all penalties to one, "
            "GradientPenaltyCallback([a, b])"
        )
    if is_a(module, *MODULES_WITH_PENALTIES):
        kind = type(module).__name__
        found.append(
            f"a {kind} adds penalties itself, and logs under the same names: pass all penalties to "
            f"it, {kind}(..., penalty=...)"
        )
    for c in callbacks:
        found += _findings_of_callback(trainer, module, c.penalties, c.module, c.manual_backward)
    return found


def _findings_of_callback(
    trainer: Any,
    module: pl.LightningModule,
    penalties: Mapping[str, Penalty],
    name: str | None,
    manual_backward: int | None,
) -> list[str]:
    """Return the findings about one callback.

    Args:
        trainer: the trainer of the fit.
        module: the LightningModule.
        penalties: of the callback, by name.
        name: the callback's ``module``.
        manual_backward: the callback's ``manual_backward``.

    Returns:
        One line for each finding.
    """
    found = []
    automatic = module.automatic_optimization
    if automatic and manual_backward is not None:
        found.append("`manual_backward=...` is for manual optimisation; leave it out")
    if not automatic and manual_backward is None:
        found.append(
            "the module optimises manually: say which of the manual_backward calls of a training "
            "step gets the penalties, with manual_backward=0 for the first"
        )
    names = dict(module.named_modules())
    net = names.get(name or "")
    if net is None:
        hint = checks.nearest(str(name), filter(None, names))
        listed = ", ".join(repr(n) for n, _ in module.named_children())
        found.append(f"there is no submodule {name!r}{hint}; there are {listed}")
    if is_sharded(module):
        from gpkit.lightning.callback.sharded import findings_of_sharding

        found += findings_of_sharding(module, penalties)
        in_weights = any(needs_of(penalty).in_weights for penalty in penalties.values())
        if in_weights and trainer.accumulate_grad_batches > 1:
            found.append(
                "under FSDP penalties in the weights do not support gradient accumulation; got "
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: use 1, or DDP"
            )
    for title, penalty in penalties.items():
        found += [
            f"penalty {title!r}: {line}"
            for line in _findings_of_penalty(penalty, trainer, module, net)
        ]
    return found


def _findings_of_penalty(
    penalty: Penalty, trainer: Any, module: pl.LightningModule, net: nn.Module | None
) -> Iterator[str]:
    """Yield the findings about one penalty. ``net`` is None if the submodule does not exist."""
    strategy = trainer.strategy
    needs = needs_of(penalty)
    if needs.environments or not isinstance(penalty, GradientPenalty):
        yield (
            "it needs the environment of each sample, which a training step does not show: use "
            "PenalizedModule"
        )
        return
    if is_a(strategy, "FSDPStrategy"):
        yield (
            "strategy='fsdp' is FSDP1, whose flat parameters have no double backward: use "
            "ModelParallelStrategy and fully_shard in configure_model, or strategy='ddp'"
        )
    elif is_a(strategy, "DeepSpeedStrategy"):
        yield "DeepSpeed gives no access to the gradients: use strategy='ddp'"
    elif is_a(strategy, "ModelParallelStrategy") and not is_sharded(module):
        yield (
            "under ModelParallelStrategy a penalty needs modules to which fully_shard was applied: "
            "apply it in configure_model, or use strategy='ddp'"
        )
    if not module.automatic_optimization and (needs.runs_again or penalty.scope == "accumulated"):
        yield (
            "it reruns the training step, which would step the optimisers again under manual "
            "optimisation: use estimator='exact', scope='batch'"
        )
    if needs.runs_again and "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield (
            "it reruns the training step on the same batch, and `dataloader_iter` gives another: "
            "write training_step(self, batch, batch_idx)"
        )
    if needs.part:
        yield needs.part
    if needs.names:
        yield (
            f"it names entries of a batch, {list(needs.names)}, and a training step shows the "
            "arguments of a submodule: use PenalizedModule, or call the penalty in the step, "
            "penalty(f, batch)"
        )
    if needs.fakes:
        yield needs.fakes
    names = [name for name, _ in needs.given]
    if names and "dataloader_iter" in inspect.signature(module.training_step).parameters:
        yield f"it reads {', '.join(names)} from the batch, and `dataloader_iter` is none"
    if "sample_weight" in names and needs.pooled:
        yield (
            f"scope={penalty.scope!r} has one norm, of a mean gradient, so it takes no "
            "sample_weight: weigh the samples in the loss"
            + ("" if may_shard(strategy) else ", or use scope='batch'")
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


def may_shard(strategy: Any) -> bool:
    """Whether a strategy may shard the parameters."""
    return is_a(strategy, "FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def findings_of_net(
    module: nn.Module,
    watched: PenalizedNet,
    capture: Capture,
    spec: ProbeSpec,
    seen: SeenCalls | None = None,
) -> list[str]:
    """Return the findings about the net that one training step has shown.

    Args:
        module: the LightningModule.
        watched: the net that was captured from.
        capture: what the probe captured.
        spec: what it had to capture.
        seen: the submodules that the step calls; None if they were not noted.

    Returns:
        One line for each finding.
    """
    names = [(n, f"activation({n!r})" if n else watched.title) for n in spec.names]
    inside = next((n for n, part in module.named_modules() if part is watched.net), "")
    calls = findings_of_calls(
        capture, names, watched.call, seen, step="the training step", inside=inside
    )
    return [*capture.problems.values(), *calls]


def warn_of_rows(watched: PenalizedNet, capture: Capture, batch: Any) -> None:
    """Warn if the input of a submodule has not one row for each sample of the batch.

    Args:
        watched: the net that the input was captured from.
        capture: what the probe captured.
        batch: of the training step.
    """
    x = capture.x
    if x is None or not x.ndim:
        return
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim]
    samples = getattr(batch, "num_graphs", None)  # of a batch of graphs
    if samples is None:
        alike = sum(len(t) for t in tensors if t.shape[1:] == x.shape[1:])  # may be concatenated
        samples = max(alike, len(tensors[0]) if tensors else len(x))
    rows = len(x)
    if rows > samples:  # fewer are a part of the batch, or fakes
        rank_zero_warn(
            f"{watched.title} gets an input of {rows} rows, and the batch has {samples} samples: "
            "each row counts as a sample, with a norm of its own, and the mean loss is taken to be "
            "over the rows. If several rows belong to a sample, call the penalty in your own "
            "training step with groups=..., or choose a submodule with a row for each sample"
        )


def findings_of_loss(loss: Tensor) -> list[str]:
    """Return the findings about the loss of a training step, one line for each."""
    found = []
    if not loss.requires_grad:
        found.append("the loss of the training step has no graph: was it detached?")
    if any(map(is_reentrant_checkpoint, graph.nodes(loss))):
        found.append(str(error(*HINTS["use_reentrant=True"])))
    return found
