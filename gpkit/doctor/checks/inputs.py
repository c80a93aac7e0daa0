"""Checks of the samples, and of how the penalty is called with them."""

from __future__ import annotations

from collections.abc import Iterator

from gpkit.doctor.trial import FAILURES, Trial
from gpkit.finding import Finding, FoundError, FoundWarning, error
from gpkit.hints import hint_for


def integer_input(trial: Trial) -> Iterator[Finding]:
    """Find a penalty in the input of samples that are not floating-point."""
    x = trial.example.x
    if not trial.in_input or x.is_floating_point():
        return
    why = f"a penalty in the input needs floating-point samples, and these are {x.dtype}"
    fix = "differentiate in an embedding, wrt=gpkit.activation(...), or use a weight penalty"
    yield Finding("integer-input", "error", why, fix)


def mean_loss(trial: Trial) -> Iterator[Finding]:
    """Find a loss that is averaged over the batch before an input penalty differentiates it."""
    needs, example = trial.needs, trial.example
    if needs is None or not needs.of_loss or not needs.per_sample or example.loss is None:
        return
    try:
        value = example.loss_of(trial.forward[0])
    except FAILURES as failure:
        yield error("call", f"the loss cannot be computed ({_line(failure)})")
        return
    if value.ndim == 0 and len(example.x) > 1:
        why = (
            "the loss is one number, the mean of the batch, which hides a factor 1/B in each "
            "sample's gradient: a penalty of it depends on the batch size"
        )
        fix = (
            'give the penalty the loss of each sample, reduction="none", and train on its mean; '
            "PenalizedModule and GradientPenaltyCallback do it themselves"
        )
        yield Finding("mean-loss", "error", why, fix)


def selected(trial: Trial) -> Iterator[Finding]:
    """Note that the logits of the output are meant, where it is no tensor."""
    needs = trial.needs
    if trial.selects and (needs is None or not needs.of_loss):
        why = f"the net returns a {type(trial.forward[0]).__name__}, of which its logits are taken"
        fix = 'in a loop of your own, say so: penalty(lambda x: net(x)["logits"], x)'
        yield Finding("call", "note", why, fix)


def refusal(trial: Trial) -> Iterator[Finding]:
    """Say why the penalty, or its backward pass, raised an error, and what it warned of."""
    failed = trial.outcome.error
    if isinstance(failed, FoundError):
        yield failed.finding
    elif failed is not None:
        found = hint_for(str(failed)) if isinstance(failed, RuntimeError) else None
        yield found or Finding("call", "error", _line(failed), _advice(trial))
    for warning in trial.outcome.warned:
        if isinstance(warning, FoundWarning):
            yield warning.finding


def _advice(trial: Trial) -> str:
    """Return what to do about an error of a call, as far as it is known here."""
    needs = trial.needs
    names = [name for name, _ in needs.given] if needs is not None else []
    missing = [name for name in names if name not in trial.example.given]
    if missing:
        return f"diagnose(..., {missing[0]}=...)"
    if needs is not None and needs.environments and trial.example.y is None:
        return "give the example as (x, y, env)"
    return ""


def _line(failure: Exception) -> str:
    """Return an error's message in one line."""
    said = str(failure).strip().splitlines()
    return said[0] if said else type(failure).__name__
