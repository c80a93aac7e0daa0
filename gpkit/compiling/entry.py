"""`compile`, the way in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gpkit.autodiff.tracing.compat import traces_gradients
from gpkit.compiling import obstacles
from gpkit.compiling.loss import CompiledLoss


def compile(function: Callable[..., Any], *, measure: bool = True, **options: Any) -> CompiledLoss:
    """Return a loss that calls penalties, as one compiled graph.

    ``torch.compile`` has no double backward. But a graph that holds the forward passes and the
    gradients inside of the penalties needs only one backward pass, so all of it is traced together.
    The graph has no counters: steps, ``every``, schedules, adaptive weights and random numbers stay
    outside, and a step is what it is without compiling, to rounding.

    The first step of each set of penalties that act together runs as it is, and is then repeated
    compiled, in the state in which it started. If value and gradient do not agree, or something
    cannot be traced, a warning says so, and the function runs as it is from then on. ``logging`` at
    level INFO tells how long compiling took: seconds to minutes. A smaller last batch is compiled
    once more.

    Convolutions on a CPU lose by compiling: torch's own compiled step takes 1.2 to 1.9 times as
    long there. So both are timed in the first step, with their backward passes, and the faster is
    kept.

    Running averages, the environments of a batch and dropout in a penalty's own forward pass are
    compiled as well: averages are read before each step and updated after it, dropout masks are
    drawn outside. A step with values that the graph does not know, such as other environments, runs
    as it is.

    Not compiled are finite differences (``torch.compile`` the net alone), scopes that average
    gradients first, recurrent nets, other random numbers in a penalty's own forward pass, weight
    norm under a weight penalty, Mish, and penalties that are given ``step=``.

    Args:
        function: returns the loss, one number; or it and more, such as outputs. It calls penalties,
            none or several, and must not call ``requires_grad_()`` on what it computes.
        measure: whether the faster of both is kept; False keeps the compiled one.
        **options: of ``torch.compile``, such as ``mode="reduce-overhead"``.

    Returns:
        A function with the same arguments. Its attribute ``obstacle`` says why it is not compiled;
        None if it is.

    Raises:
        TypeError: if ``function`` is no function.
        RuntimeError: if this version of torch cannot trace gradients.

    Warns:
        UserWarning: once, if it is not compiled.

    >>> import gpkit, torch
    >>> critic = torch.nn.Linear(2, 1)
    >>> penalty = gpkit.wgan_gp(weight=10.0)
    >>> step = gpkit.compile(
    ...     lambda real, fake: critic(fake).mean() - critic(real).mean()
    ...     + penalty(critic, real=real, fake=fake)
    ... )  # step(real, fake).backward()
    """
    if not callable(function):
        raise TypeError(
            "`gpkit.compile(...)` takes the function that returns the loss; got "
            f"a {type(function).__name__}: gpkit.compile(lambda x, y: loss(net(x), y) + ...)"
        )
    if not traces_gradients():
        raise RuntimeError(
            "`gpkit.compile(...)` needs a version of torch that can trace gradients, such as 2.13; "
            f"got {torch.__version__}: call the function itself, and leave compile=False"
        )
    return CompiledLoss(function, measure, options)


def compiled(function: Callable[..., Any], penalties: Mapping[str, Any]) -> CompiledLoss | None:
    """Return a module's loss compiled; None, with a warning, if a penalty cannot be.

    Args:
        function: computes the loss.
        penalties: by name.

    Returns:
        The compiled loss.
    """
    named = ((name, obstacles.of_penalty(p)) for name, p in penalties.items())
    found = next((f"{name!r} {said}" for name, said in named if said), None)
    if found is None:
        return compile(function)
    warnings.warn(f"`compile=True` has no effect: {found}", stacklevel=3)
    return None
