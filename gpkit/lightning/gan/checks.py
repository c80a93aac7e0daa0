"""What `GANModule` is given: arguments that make sense together, and batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gpkit import checks
from gpkit.needs import needs_of
from gpkit.penalty import Penalty


def require_nets(generator: Any, critic: Any) -> None:
    """Refuse nets that cannot be trained against each other.

    Raises:
        TypeError: if one is no module.
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
            f"generator and critic share {len(shared)} parameters, and each is trained against "
            "the other: give each its own"
        )


def require_penalties(
    of_critic: Mapping[str, Penalty],
    of_generator: Mapping[str, Penalty],
    *,
    trains_generator: bool,
) -> None:
    """Refuse penalties that could not act.

    Raises:
        TypeError: if one is on environments, or needs a classifier or the loss of each sample.
        ValueError: if two have one name, or the generator has none to train.
    """
    for name, penalty in (*of_critic.items(), *of_generator.items()):
        needs = needs_of(penalty)
        if needs.environments:
            raise TypeError(
                f"`penalty=...` {name!r} is on environments, which a GAN's batches do not have: "
                "use PenalizedModule"
            )
        if penalty.axes()["of"] == "sampled_loss":
            raise TypeError(
                f"`penalty=...` {name!r} draws labels from a classifier's logits, and a critic "
                "gives scores: use weight_grad_norm"
            )
        if needs.in_weights and needs.per_sample:
            raise TypeError(
                f"`penalty=...` {name!r} needs the loss of each sample, and a GAN's compares two "
                "batches: use scope='batch', as weight_grad_norm has it"
            )
    both = sorted(of_critic.keys() & of_generator.keys())
    if both:
        raise ValueError(
            f"critic and generator both have a penalty {both[0]!r}, and logs need two names: use "
            f"generator_penalty={{'generator_{both[0]}': ...}}"
        )
    if of_generator and not trains_generator:
        raise ValueError(
            "`generator_penalty=...` needs a generator to train; got one without parameters that "
            "require grad"
        )


def require_functions(**functions: Any) -> None:
    """Refuse optimisers and schedulers that cannot be made from parameters, or an optimiser.

    Raises:
        TypeError: if one is neither None nor a function.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            given = "an optimiser" if name.endswith("scheduler") else "parameters"
            made = "ExponentialLR, gamma=0.999" if name.endswith("scheduler") else "Adam, lr=1e-4"
            raise TypeError(
                f"`{name}=...` must be a function of {given}, as functools.partial({made}); "
                f"got {function!r}"
            )


def optional(where: str, value: Any, low: float, *, below: float | None = None) -> float | None:
    """Return None, or a number > ``low``; or one in [``low``, ``below``).

    Raises:
        ValueError: if it is neither.
    """
    if value is None:
        return None
    number = checks.number(where, value, low, strict=below is None)
    if below is not None and number >= below:
        raise ValueError(f"`{where}` must be a number in [{low:g}, {below:g}); got {value!r}")
    return number


def unpack(batch: Any, *, conditional: bool) -> tuple[Tensor, Any]:
    """Return the samples of a batch, and their labels where the nets take them.

    Args:
        batch: ``x``, ``(x,)`` or ``(x, y)``.
        conditional: whether there must be labels.

    Returns:
        x ``[B, *S]``, and y or None.

    Raises:
        TypeError: if it is anything else.
    """
    parts = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
    first = parts[0] if parts else None
    fits = isinstance(first, Tensor) and first.is_floating_point() and first.ndim > 0
    if not fits or len(parts) not in ((2,) if conditional else (1, 2)):
        expected = "(x, y)" if conditional else "x, (x,) or (x, y)"
        got = ", ".join(
            f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            for part in parts
        )
        raise TypeError(
            f"GANModule{'(conditional=True)' if conditional else ''} takes batches {expected} "
            f"with floating-point samples x [B, ...]; got ({got})"
        )
    return parts[0], parts[1] if conditional else None
