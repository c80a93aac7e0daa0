"""Checks of the forward pass: random numbers, writes to the input, samples that are coupled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpkit.autodiff.compat import tree_leaves
from gpkit.doctor.trial import SEED, Trial
from gpkit.finding import Finding
from gpkit.findings.samples import coupled_samples
from gpkit.findings.watch import ROOT, Visit


def random_forward(trial: Trial) -> Iterator[Finding]:
    """Find modules that give another value for the same input, such as dropout."""
    first, second = trial.forward[1].visits, trial.look(SEED + 1)[1].visits
    names = [v.name for v, w in zip(first, second, strict=False) if _draws(v, w)]
    names = [n for n in dict.fromkeys(names) if not any(o != n and _inside(o, n) for o in names)]
    if not names:
        return
    why = (
        "two evaluations of the net differ, as with dropout: the penalty that runs the net itself "
        "has masks of its own, and its value varies from step to step"
    )
    fix = 'leave it if that is meant, or use forward="eval", or a dropout of zero'
    yield Finding("random-forward", "note", why, fix, _listed(names))


def _draws(first: Visit, second: Visit) -> bool:
    """Whether a module was given the same twice, and returned something else."""
    same = first.name == second.name and first.given == second.given
    return same and first.returned != second.returned


def in_place(trial: Trial) -> Iterator[Finding]:
    """Find modules that write to the net's input, which a penalty in the input differentiates."""
    visits = trial.forward[1].visits
    root = next((v for v in visits if not v.name), None)
    if root is None or not root.wrote:
        return
    names = [
        v.name
        for v in visits
        if v.wrote and v.name and root.given.numbers[:1] == v.given.numbers[:1]
    ]
    why = "the net writes to its input in place, and a leaf that is differentiated must not change"
    if not trial.in_input:
        why = (
            "the net writes to its input in place: a second run on the same batch, as of a penalty "
            "that is given a function, meets other samples, or an error"
        )
    fix = "use inplace=False, or gpkit.prepare(net)"
    severity = "error" if trial.in_input else "warning"
    yield Finding("in-place", severity, why, fix, names[0] if names else ROOT)


def not_finite(trial: Trial) -> Iterator[Finding]:
    """Find the first module that returns NaN or infinity for a finite input."""
    broken = [v for v in trial.forward[1].visits if v.given.finite and not v.returned.finite]
    if broken:
        why = "its output is NaN or infinite for finite inputs"
        fix = "look at its weights, and scale the samples"
        yield Finding("not-finite", "error", why, fix, broken[0].name or ROOT)


def coupled(trial: Trial) -> Iterator[Finding]:
    """Find out, by moving one sample, whether the outputs of the others move."""
    x, needs = trial.example.x, trial.needs
    if needs is None or not needs.per_sample or len(x) < 2 or not x.is_floating_point():
        return
    if "coupled-samples" in {f.code for f in _warned(trial)}:
        return  # the penalty has said so itself
    own = getattr(trial.penalty, "forward", "isolated") == "eval"
    modes = [m for m in trial.net.modules() if m.training]
    before = trial.forward[0] if not own else None
    try:
        if own:
            for module in modes:
                module.training = False
            before = trial.look(SEED)[0]
        moved = x.clone()
        moved[0] += x.std().clamp(min=1e-3)
        after = _at(trial, moved)
    finally:
        for module in modes:
            module.training = True
    if not _others_move(before, after, len(x)):
        return
    norms = [type(m).__name__ for m in trial.net.modules() if m.training]
    yield coupled_samples(batch_norm=any("BatchNorm" in name for name in norms))


def _at(trial: Trial, moved: Tensor) -> object:
    from gpkit.autodiff.isolation import isolated

    with isolated(trial.net, SEED, trial.device, twice=False), torch.no_grad():
        return trial.example.run(trial.net, moved)


def _others_move(before: object, after: object, batch: int) -> bool:
    """Whether an output of a sample other than the first differs."""
    for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True):
        if isinstance(a, Tensor) and a.is_floating_point() and a.shape[:1] == (batch,):
            change = (a[1:] - b[1:]).abs().max()
            if change > 1e-5 * (a - b).abs().max():
                return True
    return False


def _warned(trial: Trial) -> list[Finding]:
    found = [getattr(w, "finding", None) for w in trial.outcome.warned]
    found.append(getattr(trial.outcome.error, "finding", None))
    return [f for f in found if f is not None]


def _inside(name: str, other: str) -> bool:
    """Whether a module is in another one."""
    return not other or name.startswith(f"{other}.")


def _listed(names: list[str], most: int = 4) -> str:
    """Return names in one line, of many the first."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
