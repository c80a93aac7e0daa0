"""Checks of the parameters: which ones the penalty trains, and which get no gradient of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from torch import Tensor

from gpkit.autodiff import graph
from gpkit.autodiff.compat import LEAF
from gpkit.doctor.trial import FAILURES, Gradients, Trial
from gpkit.finding import Finding


def frozen(trial: Trial) -> Iterator[Finding]:
    """Note parameters that do not require grad."""
    names = [n for n, p in trial.net.named_parameters() if not p.requires_grad]
    if names and trial.parameters:
        why = f"{grouped(names)} do not require grad, and are not trained"
        yield Finding("frozen", "note", why, "leave them if that is meant")


def tied(trial: Trial) -> Iterator[Finding]:
    """Note parameters that several modules share: they count once in a norm of the weights."""
    owners = defaultdict(list)
    for name, p in trial.net.named_parameters(remove_duplicate=False):
        owners[id(p)].append(name)
    for names in owners.values():
        if len(names) > 1:
            why = f"{' and '.join(names)} are one parameter, and count once in a norm"
            yield Finding("tied", "note", why)


def reached(trial: Trial) -> Iterator[Finding]:
    """List the parameters that get a gradient of the penalty, and those that get none.

    A matrix on the way from the variables to what is differentiated gets one, unless something
    cuts the graph: that is a warning, if the loss has a gradient there.

    Yields:
        The warning, and a note with the lists.
    """
    if trial.outcome.terms is None:
        return
    gradients, of_loss = trial.outcome.gradients, _of_loss(trial)
    trained = [n for n, g in gradients.items() if _moves(g)]
    without = [n for n, g in gradients.items() if not _moves(g)]
    unused = [n for n in without if of_loss and not _moves(of_loss.get(n))]
    trial.numbers["trains"] = trained
    trial.numbers["does not train"] = without
    cut = [n for n in _on_the_way(trial) if n in without and n not in unused]
    if cut and trained:
        why = f"{grouped(cut)} have a gradient of the loss and none of the penalty"
        fix = (
            "does a .detach(), no_grad() or checkpoint cut the inner gradient off, or is a unit "
            "dead?"
        )
        yield Finding("partial-gradient", "warning", why, fix)
    if not trained:
        return  # `refusal`, or the weight is zero
    told = f"the penalty trains {len(trained)} of {len(gradients)} parameters"
    rest = [n for n in without if n not in unused]
    told += f"; no gradient of it: {grouped(rest)}" * bool(rest)
    told += f"; none of the loss either: {grouped(unused)}" * bool(unused)
    yield Finding("reached", "note", told)


def untracked(trial: Trial) -> Iterator[Finding]:
    """Find parameters of modules that run without gradients, and that nothing trains."""
    if trial.outcome.terms is None:
        return
    (_, watch), of_loss = trial.graphs, _of_loss(trial)
    gradients = trial.outcome.gradients
    tracked = {v.name for v in watch.visits if v.tracked}
    ran = {v.name for v in watch.visits} - tracked
    names = [n for n in trial.parameters if n.rpartition(".")[0] in ran]
    names = [n for n in names if gradients.get(n) is None and of_loss.get(n) is None]
    if names:
        why = f"{grouped(names)} take part without gradients, and nothing trains them"
        fix = (
            "does their module run under no_grad(), or in a checkpoint(..., use_reentrant=True) "
            "whose input needs no gradient? Freeze them, if that is meant"
        )
        yield Finding("untracked", "warning", why, fix)


def _of_loss(trial: Trial) -> Gradients:
    try:
        return trial.loss[1]
    except FAILURES:
        return {}  # no loss fits the example


def _on_the_way(trial: Trial) -> list[str]:
    """Return the matrices that operations between the variables and y take."""
    needs = trial.needs
    if needs is None or trial.twice < 2 or needs.environments or needs.order > 1:
        return []
    targets, _ = trial.graphs
    taken = set()
    for target in targets if targets[0].batched else targets[:1]:
        for node in graph.between(target.y, target.xs):
            for parent, _ in node.next_functions:
                taken |= _leaves_before(parent)
    return [n for n, p in trial.parameters.items() if p.ndim > 1 and id(p) in taken]


def _leaves_before(node: object) -> set[int]:
    """Return the leaf of a node, or of what it is a view of, such as a transposed matrix."""
    for _ in range(4):
        leaf = getattr(node, LEAF, None)
        if leaf is not None:
            return {id(leaf)}
        parents = [p for p, _ in getattr(node, "next_functions", ()) if p is not None]
        if len(parents) != 1:
            return set()
        node = parents[0]
    return set()


def _moves(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.detach().any())


def grouped(names: Iterable[str], most: int = 4) -> str:
    """Return names in one line, of many the first and how many more there are."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
