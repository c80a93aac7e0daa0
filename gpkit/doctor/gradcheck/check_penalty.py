"""`check_penalty`: gradcheck for a penalty of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gpkit import checks
from gpkit.doctor.gradcheck import autograd, edges, formula, points, symmetry, traces
from gpkit.doctor.gradcheck.compared import Known, known
from gpkit.doctor.gradcheck.report import Check, PenaltyError, PenaltyReport, failed, unchecked
from gpkit.doctor.gradcheck.trial import Trial, tensors_of
from gpkit.gradient_penalty import GradientPenalty

NAMES = (
    "float64", "repeatable", "backward", "gradient", "samples", "order", "entries", "points",
    "noise", "formula", "zero", "side_effects", "autocast",
)  # fmt: skip


def check_penalty(
    fn: Callable[..., Any],
    net: nn.Module,
    *samples: Any,
    like: GradientPenalty | Callable[..., Any] | None = None,
    autocast: torch.dtype | None = torch.bfloat16,
    skip: Sequence[str] = (),
    raise_exception: bool = True,
    **named: Any,
) -> PenaltyReport:
    r"""Check a gradient penalty of your own, as `torch.autograd.gradcheck` checks a function.

    ``fn(net, *samples, **named)`` returns one number to add to a loss. It may draw random numbers.
    It is run some hundred times, with copies of the net and of the samples, in float64.

    .. math:: P(\theta) = \text{mean}_i \, v_i, \quad v_i \text{ of sample } i \text{ alone}, \quad
              \frac{P(\theta + h u) - P(\theta - h u)}{2h} = u \cdot \nabla_\theta P

    ============ ===================================================================================
    check        what must hold
    ============ ===================================================================================
    float64      it runs in float64
    repeatable   from the same random state it returns the same number
    backward     the backward pass of its value runs, with the net as it is
    gradient     its gradient in the parameters is that of its value, by central differences
    samples      the penalty of a batch is the mean of those of its parts, also of a single sample
    order        the order of the samples does not matter
    entries      the order and the signs of a sample's entries do not matter, if the net turns them
                 back: so a norm is over all entries, and a trace is that of the Hessian
    points       interpolates have one α for each sample; with ``like=``, the points are as its
                 ``at`` has them
    noise        noise of the samples' shape, if it draws any, has an effect
    formula      with ``like=``: value and gradient are those of ``like``, at the same points
    zero         value and gradient are finite if the net's output is zero
    side_effects buffers, ``.grad``, ``requires_grad``, modes and samples are as before, and the
                 random state is not seeded
    autocast     it runs, and is finite; in float16 the inner gradient does not underflow
    ============ ===================================================================================

    A penalty in the inputs has all checks. Of one in the weights, the norm of the mean loss is not
    the mean over samples, so "samples" and "entries" are left out.

    Args:
        fn: the penalty: ``fn(net, x)``, ``fn(critic, real, fake)``, ``fn(net, x, y)``, ...
        net: a small net with unequal slopes at the samples; smooth, if ``fn`` takes second
            derivatives.
        *samples: what ``fn`` takes after the net. Tensors ``[B, ...]`` are samples, labels and
            targets, B >= 2; 4 to 8 are enough.
        like: what it should be. A `GradientPenalty`, such as ``gpkit.wgan_gp(weight=10)``, of the
            net's output: it is evaluated with exact derivatives, where ``fn`` evaluates the net; a
            random estimate is compared on average. Or a function that takes the arguments of
            ``fn``. None leaves out the check of the formula.
        autocast: the dtype for which the penalty is run under autocast, or None. torch.float16
            looks for underflow as well.
        skip: names of checks to leave out.
        raise_exception: raise an error that names all checks that failed.
        **named: keyword arguments of ``fn``.

    Returns:
        The report: ``ok``, ``failures`` by name, ``checks``, ``to_dict()``; as text, a line each.

    Raises:
        PenaltyError: if a check failed and ``raise_exception``; its ``report`` has them all.
        TypeError: if ``net`` is no module, or ``fn`` cannot be called with the arguments.
        ValueError: if there are fewer than two samples, no parameter requires grad, or a name in
            ``skip`` is unknown.

    >>> import gpkit
    >>> def gradient_penalty(critic, real, fake):  # the norm is over the channels alone
    ...     alpha = torch.rand(len(real), 1, 1, 1)
    ...     x = (alpha * real + (1 - alpha) * fake).requires_grad_()
    ...     (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    ...     return (g.norm(2, dim=1) - 1).square().mean()
    >>> _ = torch.manual_seed(0)
    >>> critic = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 1))
    >>> real, fake = torch.randn(2, 4, 2, 3, 3)
    >>> report = gpkit.check_penalty(
    ...     gradient_penalty, critic, real, fake, like=gpkit.wgan_gp(1.0), raise_exception=False
    ... )
    >>> list(report.failures)
    ['entries', 'formula']
    """
    _require(net, samples, named, skip, like)
    found = tuple(
        replace(check, name=name)
        for name, check in _checks(fn, net, samples, named, like, autocast, skip)
    )
    report = PenaltyReport(found)
    if raise_exception and not report.ok:
        raise PenaltyError(report)
    return report


def _checks(
    fn: Callable[..., Any],
    net: nn.Module,
    samples: tuple[Any, ...],
    named: dict[str, Any],
    like: Any,
    dtype: torch.dtype | None,
    skip: Sequence[str],
) -> Iterator[tuple[str, Check]]:
    """Yield the checks by name."""
    trial = Trial(fn, net, samples, named, torch.float64)
    try:
        trial.run(gradient=True)
        yield "float64", Check("it runs in float64")
    except Exception as error:
        trial = trial.like(dtype=torch.float32)
        trial.run()  # what fails here too is for the caller
        yield (
            "float64",
            failed(
                f"{type(error).__name__} in float64: {error}",
                "make new tensors with the dtype and device of x: torch.ones_like(out), "
                "torch.rand(B, dtype=x.dtype, device=x.device)",
            ),
        )
    if (again := (trial.value(), trial.value()))[0] != again[1] and again[0] == again[0]:
        yield (
            "repeatable",
            failed(
                f"{again[0]:.6g}, then {again[1]:.6g}, from the same random state",
                "it keeps a state between calls: pass it as an argument. The other checks need it",
            ),
        )
        if "side_effects" not in skip:
            yield "side_effects", traces.side_effects(trial)
        return
    yield "repeatable", Check("the same number from the same random state")
    trained = known(trial)
    alone = _each_alone(trained)
    at = like.at if isinstance(like, GradientPenalty) else None
    inputs = any(call.variables for call in trained.run.calls) or at is not None
    reduce = like.reduce if isinstance(like, GradientPenalty) else "mean"
    weights = unchecked("it differentiates in no input of the net")
    compares = unchecked("the net compares samples, as batch norm in training mode does")
    made: dict[str, Callable[[], Check]] = {
        "backward": lambda: edges.backward(trial),
        "gradient": lambda: autograd.gradient(trained),
        "samples": lambda: (
            (symmetry.samples(alone, reduce) if alone else compares) if inputs else weights
        ),
        "order": lambda: symmetry.order(alone) if alone else compares,
        "entries": lambda: symmetry.entries(trained) if inputs else weights,
        "points": lambda: points.points(trained, at) if inputs else weights,
        "noise": lambda: points.noise(trained),
        "formula": lambda: formula.formula(trained, like),
        "zero": lambda: edges.zero(trained),
        "side_effects": lambda: traces.side_effects(trial),
        "autocast": lambda: (
            unchecked("autocast=None") if dtype is None else edges.autocast(trained, dtype)
        ),
    }
    results = {name: check() for name, check in made.items() if name not in skip}
    if trained.run.graph and _passed(results.get("formula")) and not _passed(results["gradient"]):
        results["gradient"] = Check("that of like=, which is not the derivative of the value")
    yield from results.items()


def _passed(check: Check | None) -> bool:
    return check is not None and check.passed is True


def _each_alone(trained: Known) -> Known | None:
    """Return a run in which the net sees each sample alone: in eval mode, if that is another one.

    Returns:
        The run; or None if the net compares samples in eval mode too.
    """
    other = trained.trial.like(evaluating=True)
    found = trained if other.value() == trained.run.value else known(other)
    return None if found.trial.compares(found.run.calls) else found


def _require(
    net: Any, samples: tuple[Any, ...], named: dict[str, Any], skip: Sequence[str], like: Any
) -> None:
    """Refuse what cannot be checked.

    Raises:
        TypeError: if ``net`` is no module, or ``like`` is in the weights.
        ValueError: if there are too few samples, nothing to train, or a wrong name.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"`net` must be a module, check_penalty(fn, net, x); got {type(net).__name__}"
        )
    if not any(p.requires_grad for p in net.parameters()):
        raise ValueError("no parameter of the net requires grad, so a penalty trains nothing")
    tensors = [t for t in tensors_of((samples, named)) if t.ndim]
    if not tensors or len(tensors[0]) < 2:
        raise ValueError("check_penalty needs samples [B, ...] with B >= 2, after the net")
    for name in (skip,) if isinstance(skip, str) else skip:
        checks.choice("skip=[...]", name, NAMES)
    if isinstance(like, GradientPenalty) and not like.wrt.batched:
        raise TypeError(
            "`like=` in the weights needs your loss: give a function of the arguments of fn, "
            "like=lambda net, x, y: penalty(lambda: loss(net(x), y), net)"
        )
    if like is not None and not callable(like):
        raise TypeError(f"`like=` must be a gpkit penalty or a function; got {type(like).__name__}")
