"""Check of the strength's convention: where the same number is another strength in public code."""

from __future__ import annotations

from collections.abc import Iterator

from gpkit.axes.at import data
from gpkit.doctor.trial import Trial
from gpkit.environment_penalty import EnvironmentPenalty
from gpkit.finding import Finding
from gpkit.gradient_penalty import GradientPenalty

HALF = (
    "the ½ of the formula is inside, and the paper's authors' code has none, λ mean n²",
    "their λ is weight=2·λ here; where code has the ½, such as StyleGAN's r1_gamma, weight=γ",
)

# By the name of a preset: what is known of code with another strength, and how to have it here.
# The table is that of the docstrings, where each preset says whose number its weight is.
KNOWN = {
    "r1": HALF,
    "r2": HALF,
    "amp": (
        "the ½ of the formula is inside, and there is a mean over demonstrations and one over the "
        "agent's motions; public code has λ mean n² of demonstrations alone",
        "its λ is gpkit.r1(weight=2·λ) on demonstrations",
    ),
    "approximate_r1": (
        "the difference is not divided by σ, as in the paper: a penalty of the gradient has n²",
        "weight=γ/(2·σ²) is as strong as r1(weight=γ)",
    ),
    "approximate_r2": (
        "the difference is not divided by σ, as in the paper: a penalty of the gradient has n²",
        "weight=γ/(2·σ²) is as strong as r2(weight=γ)",
    ),
    "cure": (
        "the authors' code has the norm, not its square, of the gradient of the batch's mean loss",
        "their γ is no weight here: look at the share of the loss's gradient",
    ),
}


def convention(trial: Trial) -> Iterator[Finding]:
    """Note where published code has another factor than the formula here."""
    penalty, terms = trial.penalty, trial.outcome.terms
    said = [KNOWN[trial.preset]] if trial.preset in KNOWN else []
    if isinstance(penalty, EnvironmentPenalty):
        said += _of_environments(trial, penalty)
    if isinstance(penalty, GradientPenalty) and penalty.every > 1:
        why = f"every={penalty.every} multiplies the weight by {penalty.every} where it acts"
        said.append((why, "leave the weight as it is without every="))
    if isinstance(penalty, GradientPenalty) and terms is not None and trial.in_input:
        said += _of_samples(trial, penalty)
    for why, fix in said:
        yield Finding("convention", "note", why, fix)


def _of_environments(trial: Trial, penalty: EnvironmentPenalty) -> Iterator[tuple[str, str]]:
    """Yield what is known of penalties of environments."""
    if penalty.reduce == "mean":
        why = "the penalty is the mean over the environments, and the papers' formulas their sum"
        yield why, "multiply the weight by their number, or reduce='sum'"
    layers = [m for m in trial.net.modules() if hasattr(m, "in_features")]
    if trial.preset == "fishr" and layers:
        entries = sum(p.numel() for p in layers[-1].parameters(recurse=False))
        why = (
            f"the penalty is the mean over the {entries} entries of the classifier, as in the "
            "authors' code, and the paper's formula is their sum"
        )
        yield why, f"the paper's λ is weight={entries}·λ here"


def _of_samples(trial: Trial, penalty: GradientPenalty) -> Iterator[tuple[str, str]]:
    """Yield what is known of penalties in the input, of this batch and net."""
    targets, _ = trial.graphs
    scores, batch = targets[0].y.shape[1], len(trial.example.x)
    if not isinstance(penalty.at, data) and penalty.of == "output" and scores > 1:
        why = (
            f"the critic has {scores} scores a sample, and n² is the sum over them of their "
            "squared gradients; published code takes the gradient of their sum"
        )
        yield why, "of=lambda scores: scores.flatten(1).sum(1) is the papers' code"
    if trial.preset == "input_grad_norm" and batch > 1:
        why = (
            "each norm is of the sample's own loss; code that differentiates the mean loss of B "
            "samples, and squares the gradient of the whole batch, has mean n² / B"
        )
        yield why, f"its λ is weight=λ/B here, λ/{batch} for a batch of {batch}"
    if trial.preset == "sobolev":
        entries = trial.example.x[0].numel()
        why = "n² is the sum over the entries of a sample; code for forces takes their mean"
        yield why, f"form=gpkit.squared(scale=1/{entries}) is the mean over {entries} entries"
