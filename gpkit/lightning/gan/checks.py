"""Checks of the arguments and the batches of a `GANModule`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gpkit import checks
from gpkit.needs import needs_of
from gpkit.penalty import Penalty


def require_nets(generator: Any, critic: Any) -> None:
    """Check that two nets can be trained against each other.

    Args:
        generator: G.
        critic: D.

    Raises:
        TypeError: if one of them is not a ``torch.nn.Module``.
        ValueError: if the critic has nothing to train, or they share parameters.
    """
    for name, net in (("generator", generator), ("critic", critic)):
        if not isinstance(net, nn.Module):
            raise TypeError(f"`{name}=...` must be a torch.nn.Module; got a {type(net).__name__}")
    if not any(p.requires_grad for p in critic.parameters()):
        raise ValueError("`critic=...` has no parameter that requires grad: nothing would train")
    shared = {id(p) for p in critic.parameters()} & {id(p) for p in generator.parameters()}
    if shared:
        raise ValueError(
            f"generator and critic share {len(shared)} parameters, but they are trained against "
            "each other: give each its own parameters"
        )


def require_penalties(
    of_critic: Mapping[str, Penalty],
    of_generator: Mapping[str, Penalty],
    *,
    trains_generator: bool,
    pac: int = 1,
) -> None:
    """Check that penalties can act on a critic and a generator.

    Args:
        of_critic: penalties of the critic, by name.
        of_generator: penalties of the generator, by name.
        trains_generator: whether the generator has parameters that require grad.
        pac: samples in a pack.

    Raises:
        TypeError: if a penalty compares environments, needs the logits of a classifier, or needs
            the gradient of each sample's loss.
        ValueError: if two penalties have the same name, or the generator has penalties but nothing
            to train.
    """
    for name, penalty in (*of_critic.items(), *of_generator.items()):
        needs = needs_of(penalty)
        if needs.environments:
            raise TypeError(
                f"`penalty=...` {name!r} compares environments, which the batches of a GAN do not "
                "have: use PenalizedModule"
            )
        if penalty.axes()["of"] == "sampled_loss":
            raise TypeError(
                f"`penalty=...` {name!r} draws labels from a classifier's logits, but a critic "
                "returns scores: use weight_grad_norm"
            )
        if needs.given and (pac > 1 or name in of_generator):
            what = "a pack is one" if pac > 1 else "the generator has none"
            raise TypeError(
                f"`penalty=...` {name!r} needs {needs.given[0][0]}= of samples of the batch, and "
                f"{what}: call the penalty in a loop of your own"
            )
        if needs.in_weights and needs.per_sample:
            raise TypeError(
                f"`penalty=...` {name!r} needs the loss of each sample, but a GAN loss compares "
                "batches: use scope='batch', as weight_grad_norm does"
            )
        if needs.part or (needs.takes_part and name in of_generator):
            raise TypeError(
                f"`penalty=...` {name!r} has subsample=, which is for penalties of a critic's "
                "scores: a generator's take fewer latents by generator_penalty_shrink=..."
            )
    both = sorted(of_critic.keys() & of_generator.keys())
    if both:
        raise ValueError(
            f"critic and generator both have a penalty {both[0]!r}, but logs need different names: "
            f"use generator_penalty={{'generator_{both[0]}': ...}}"
        )
    if of_generator and not trains_generator:
        raise ValueError(
            "`generator_penalty=...` needs a generator to train; got one without parameters that "
            "require grad"
        )


def require_order(simultaneous: bool, **orders: bool) -> None:
    """Check that steps have one order.

    Args:
        simultaneous: whether both nets are differentiated before either steps.
        **orders: by argument name, whether another option orders the steps.

    Raises:
        ValueError: if both do.
    """
    for name, given in orders.items():
        if simultaneous and given:
            raise ValueError(
                f"`{name}=True` takes one step after the other, and `simultaneous=True` both at "
                "once: leave one of them out"
            )


def optional_number(
    where: str, value: Any, low: float, *, below: float | None = None
) -> float | None:
    """Return a number > ``low``, or with ``below`` one in [``low``, ``below``); or None.

    Args:
        where: the argument, as "ema=...", for the message.
        value: a number or None.
        low: the lower bound.
        below: the upper bound, if there is one.

    Returns:
        The number as a float, or None.

    Raises:
        ValueError: if the number is out of range.
    """
    if value is None:
        return None
    number = checks.number(where, value, low, strict=below is None)
    if below is not None and number >= below:
        raise ValueError(f"`{where}` must be a number in [{low:g}, {below:g}); got {value!r}")
    return number
