"""What a penalty asks of a training step that knows nothing of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gpkit.captures import Named
from gpkit.estimators import exact, taylor
from gpkit.lightning.passes import activation_names
from gpkit.lightning.probe import Needs, Seen
from gpkit.penalty import GradientPenalty
from gpkit.variables import inputs, weights
from gpkit.window import POOLED


def needs(acting: Mapping[str, GradientPenalty]) -> Needs:
    """Return what penalties need of a training step."""
    penalties = acting.values()
    named = [n for p in penalties if not calls_net(p) for n in activation_names(p)]
    return Needs(
        max((p.order for p in penalties if not p.estimator.first_order), default=0),
        any(map(wants_input, penalties)),
        any(map(wants_output, penalties)),
        tuple(dict.fromkeys(named)),
        any(map(replays, penalties)),
        tuple(n for n, p in acting.items() if p.scope in POOLED),
        tuple(n for n, p in acting.items() if differs(p)),
        not all(map(plain, penalties)),
        any(replays(p) and not in_weights(p) for p in penalties),
    )


def in_weights(penalty: GradientPenalty) -> bool:
    """Whether it is a penalty in the weights."""
    return isinstance(penalty.wrt, weights)


def wants_input(penalty: GradientPenalty) -> bool:
    """Whether it differentiates in the input of the net, or takes its points from there."""
    return not in_weights(penalty) and (penalty.at.moves or not isinstance(penalty.wrt, Named))


def wants_output(penalty: GradientPenalty) -> bool:
    """Whether it differentiates what the net gives in the training forward."""
    return penalty.of != "loss" and not isinstance(penalty.of, Named) and not calls_net(penalty)


def calls_net(penalty: GradientPenalty) -> bool:
    """Whether it calls the net itself, at other points or on jets, and not the training step."""
    elsewhere = penalty.at.moves or isinstance(penalty.estimator, taylor)
    return penalty.of != "loss" and not in_weights(penalty) and elsewhere


def one_by_one(penalty: GradientPenalty) -> bool:
    """Whether it asks for the gradient of each sample's loss in the weights."""
    return in_weights(penalty) and penalty.of == "loss" and penalty.scope == "sample"


def differs(penalty: GradientPenalty) -> bool:
    """Whether the gradient of the loss at two points is all that it takes."""
    plain = penalty.of == "loss" and penalty.scope != "sample" and in_weights(penalty)
    return plain and penalty.estimator.first_order and not penalty.estimator.reuses_graph


def plain(penalty: GradientPenalty) -> bool:
    """Whether it is the exact gradient of the loss, in all weights or in the input."""
    kinds = type(penalty) is GradientPenalty and type(penalty.estimator) is exact
    if in_weights(penalty):
        where = penalty.scope == "batch" and getattr(penalty.wrt, "match", "") == "*"
    else:
        where = penalty.scope == "sample" and type(penalty.wrt) is inputs and not penalty.at.moves
    return kinds and where and penalty.of == "loss" and penalty.order == 1


def replays(penalty: GradientPenalty) -> bool:
    """Whether it may run the training step again."""
    if calls_net(penalty):
        return False
    moves = penalty.at.moves and not in_weights(penalty)
    pools = penalty.scope in POOLED
    return moves or pools or one_by_one(penalty) or not penalty.estimator.reuses_graph


def value(penalty: GradientPenalty, seen: Seen, loss: Tensor | None) -> Any:
    """Return what it differentiates, of a step that was made."""
    if isinstance(penalty.of, Named):
        return seen.activations.get(penalty.of.name)
    return loss if penalty.of == "loss" else seen.output
