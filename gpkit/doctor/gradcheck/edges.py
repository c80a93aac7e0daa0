"""At the edges: a zero gradient, low precision."""

from __future__ import annotations

import torch
from torch import Tensor

from gpkit.doctor.gradcheck.compared import Known
from gpkit.doctor.gradcheck.report import Check, failed, unchecked
from gpkit.doctor.gradcheck.trial import Run, Trial, tensors_of
from gpkit.hints import hint_for

UNDERFLOW = 2.0**-23  # the root mean square of the inner gradient; float16 ends at 2⁻²⁴
OUTER = [2.0 ** (6 * k) for k in range(8)]  # scales of the loss, of which one must do


def backward(given: Trial) -> Check:
    """The backward pass runs, on the kernels that the net takes as it is."""
    try:
        given.like(dtype=None).run(gradient=True, fused=True)
    except RuntimeError as error:
        hint = hint_for(str(error))
        cause = hint.fix if hint is not None else "an operation has no second derivative"
        return failed(str(hint.why if hint is not None else error).splitlines()[0], cause)
    return Check("it runs")


def zero(known: Known) -> Check:
    """Value and gradient are finite where the net's output is zero, and so its gradient."""
    run = known.trial.run(gradient=True, scale=0.0)
    if _is_finite(run):
        return Check(f"finite if the net's output is zero: {run.value:.4g}")
    what = "gradient" if torch.tensor(run.value).isfinite() else "value"
    return failed(
        f"the {what} is not finite if the net's output, and so its gradient, is zero",
        "the root of zero has no derivative: do not take the root (n² needs none), or add an "
        "epsilon inside of it, (g.flatten(1).square().sum(1) + 1e-12).sqrt()",
    )


def _is_finite(run: Run) -> bool:
    value = torch.tensor(run.value).isfinite().all()
    return bool(value) and all(bool(g.isfinite().all()) for g in run.gradient.values())


def autocast(known: Known, dtype: torch.dtype) -> Check:
    """Under autocast nothing is lost.

    In float16 the net's output is scaled so that the inner gradient is about 2⁻²³: without a scale
    of its own it underflows.

    Returns:
        The check.
    """
    trial = known.trial.like(dtype=torch.float32)
    context = torch.autocast(trial.device.type, dtype)
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float16:
        return _underflow(trial, context)
    try:
        run, plain = trial.run(gradient=True, within=context), trial.run()
    except Exception as error:
        return failed(
            f"{type(error).__name__} under {name}: {error}",
            "inner gradients and samples have other dtypes there: convert, g.float(), or leave "
            f"autocast around the penalty, torch.autocast({trial.device.type!r}, enabled=False)",
        )
    if not _is_finite(run):
        return failed(f"not finite under {name}", "take norms and means in float32: g.float()")
    return Check(f"{run.value:.4g} under {name}, {plain.value:.4g} in float32")


def _underflow(trial: Trial, context: torch.autocast) -> Check:
    size = _inner(trial)
    if not size:
        return unchecked("no inner gradient in the net's input was seen")
    scale = UNDERFLOW / size
    plain = trial.run(gradient=True, scale=scale)
    errors = []
    for outer in OUTER:
        try:
            run = trial.run(gradient=True, scale=scale, outer=outer, within=context)
        except Exception as error:
            return failed(f"{type(error).__name__} under float16: {error}", "convert: g.float()")
        errors.append(_difference(run.gradient, plain.gradient))
    worst = min(errors)
    found = f"an inner gradient of {UNDERFLOW:.0e} makes the parameter gradient {worst:.0%} wrong"
    if worst <= 0.1:
        return Check(f"{found}, under float16")
    return failed(
        f"{found}, under float16: it underflows",
        "scale the output before torch.autograd.grad, grad(scale * out, x), and divide the result, "
        "in float32; or leave autocast around the penalty, torch.autocast(..., enabled=False)",
    )


def _inner(trial: Trial) -> float:
    """Return the root mean square of the gradient of the net's output in its first input."""
    net = trial.like().net  # a copy: its buffers may move
    for call in trial.run().calls:
        if call.variables:
            x = call.tensors[call.variables[0]].requires_grad_()
            out = torch.cat([t.flatten() for t in tensors_of(net(*call.args, **call.kwargs))])
            (g,) = torch.autograd.grad(out.sum(), x)
            return float(g.square().mean().sqrt())
    return 0.0


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the relative difference of two gradients."""
    a, b = (torch.cat([g.double().flatten() for g in gs.values()]) for gs in (one, other))
    error = float((a - b).norm() / b.norm()) if b.any() else float(bool(a.any()))
    return error if error == error else float("inf")
