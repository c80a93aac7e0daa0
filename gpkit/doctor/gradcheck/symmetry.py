"""What must not change the penalty: taking samples apart, their order, the order of entries."""

from __future__ import annotations

import torch

from gpkit.doctor.gradcheck.compared import Known
from gpkit.doctor.gradcheck.report import Check, failed, unchecked
from gpkit.doctor.gradcheck.trial import Call
from gpkit.doctor.gradcheck.turn import Turn

REDUCED = {
    "mean": lambda values, shares: sum(v * s for v, s in zip(values, shares, strict=True)),
    "sum": lambda values, _: sum(values),
    "max": lambda values, _: max(values),
}


def samples(known: Known, reduce: str = "mean") -> Check:
    """The penalty of a batch is the mean of those of its parts, also of a part of one sample.

    It catches the norm of the whole batch, a mean loss, whose gradients hold a factor 1/B, a sum
    over the batch, and a shape that a batch of one does not have.

    Returns:
        The check.
    """
    trial = known.trial
    B, indices = trial.batch, torch.arange(trial.batch, device=trial.device)
    said: list[str] = []
    for first in dict.fromkeys((B // 2, 1)):
        parts = [indices[:first], indices[first:]]
        shares = [len(part) / B for part in parts]

        def apart(
            seed: int, at: list[Call] | None, parts: list = parts, shares: list = shares
        ) -> float:
            found = [trial.value(seed + 1000 * k, rows=part, at=at) for k, part in enumerate(parts)]
            return REDUCED[reduce](found, shares)

        try:
            same, whole, split = known.same(apart)
        except Exception as error:
            what = f"a batch of {min(map(len, parts))} raised {type(error).__name__}: {error}"
            return failed(what, "does a squeeze or a view depend on the batch size?")
        sizes = " and ".join(str(len(part)) for part in parts)
        if not same:
            found = f"{whole:.6g} for {B} samples, {split:.6g} for {sizes} of them ({reduce})"
            return failed(found, _cause(known, whole, split, shares))
        said.append(sizes)
    return Check(f"the {reduce} over parts of {', and of '.join(said)} samples is the same")


def _cause(known: Known, whole: float, split: float, shares: list[float]) -> str:
    ratio = split / whole if whole else float("inf")
    half = shares == [0.5, 0.5]
    if half and known.close(ratio, 0.5, 10):
        return (
            "it is a sum over the samples, or the squared norm of the whole batch, so its strength "
            "grows with the batch size: take the norm of each sample, flatten(1), and the mean"
        )
    if half and known.close(ratio, 4, 10):
        return (
            "the gradient of a mean loss has a factor 1/B, squared here: differentiate the sum of "
            'the losses, or losses with reduction="none"'
        )
    return (
        "the samples are not penalised one by one: is it the norm of the whole batch "
        "(grad.norm() without dim: use grad.flatten(1).norm(dim=1)), the gradient of a mean loss, "
        "or does the net compare samples?"
    )


def order(known: Known) -> Check:
    """The order of the samples does not matter."""
    trial = known.trial
    rows = torch.randperm(trial.batch, generator=torch.Generator().manual_seed(1))
    rows = rows.roll(1) if bool((rows == torch.arange(trial.batch)).all()) else rows
    rows = rows.to(trial.device)
    same, a, b = known.same(lambda seed, at: trial.value(seed, rows=rows, at=at))
    if same:
        return Check("the same for the samples in another order")
    return failed(
        f"{a:.6g}, and {b:.6g} for the same samples in another order",
        "is only the first sample penalised, or is a tensor of the batch not among the samples? "
        "Pass labels, targets and masks to check_penalty too, so that they are reordered",
    )


def entries(known: Known) -> Check:
    """The order and the signs of a sample's entries do not matter, if the net has the same output.

    It catches a norm over the wrong axis, and the row sums of a Hessian taken for its diagonal.

    Returns:
        The check.
    """
    trial = known.trial
    if not trial.shape.numel() or not trial.shape:
        return unchecked("a sample has no entries to renumber")
    turn = Turn(trial.shape, trial.device)
    same, a, b = known.same(lambda seed, at: trial.value(seed, turn=turn, at=at))
    if same:
        return Check("the same for the entries of a sample in another order, with other signs")
    axes = "".join(f", {n}" for n in trial.shape)
    return failed(
        f"{a:.6g}, and {b:.6g} when the entries of each sample [B{axes}] are renumbered, with "
        "other signs, and the net turns them back",
        "is the norm over one axis only (grad.norm(2, dim=1) on images: use "
        "grad.flatten(1).norm(dim=1)), or are the rows of the Hessian summed for its diagonal? A "
        "mask or target that is meant to tell entries apart must be passed to check_penalty; if it "
        'is meant, skip=["entries"]',
    )
