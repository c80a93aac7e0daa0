"""What a penalty leaves behind: buffers, .grad, flags, modes, samples, random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpkit.doctor.gradcheck.report import Check, failed
from gpkit.doctor.gradcheck.trial import Trial, tensors_of

FIXES = {
    "buffers": "batch norm statistics or the like move with every forward pass of the penalty: run "
    "it in eval mode, or on copies of the buffers; if a training forward pass is meant, "
    'skip=["side_effects"]',
    ".grad": "use torch.autograd.grad, not .backward(), inside of the penalty",
    "requires_grad": "set it on a copy: x = x.detach().requires_grad_()",
    "training": "put the mode back at the end",
    "values": "it changes a tensor in place: take a copy",
    "the mode of autograd": "put it back at the end",
    "the random state": "it seeds torch's generator, so every call, and the step after it, draws "
    "the same numbers: draw from a torch.Generator of its own, or do not seed",
}


def side_effects(given: Trial) -> Check:
    """A call leaves the net, the samples and the random numbers as they were."""
    trial = given.like(dtype=None)
    before = dict(_state(trial))
    kept = torch.is_grad_enabled()
    try:
        torch.set_grad_enabled(True)
        with trial.drawing(0):
            trial.fn(trial.net, *trial.samples, **trial.named)
        grad_mode = torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(kept)
    now = dict(_state(trial))
    changed = {key for key in before.keys() | now.keys() if not _equal(before, now, key)}
    kinds: dict[str, list[str]] = {}
    for kind, name in sorted(changed):
        kinds.setdefault(kind, []).append(name)
    if not grad_mode:
        kinds["the mode of autograd"] = [""]
    one, two = (given.run(seed).after for seed in (1, 2))
    if one is not None and two is not None and torch.equal(one, two):
        kinds["the random state"] = [""]
    if not kinds:
        return Check("none: buffers, .grad, requires_grad, modes, samples, random state")
    found = [f"{kind} {_listed(names)}".strip() for kind, names in kinds.items()]
    return failed("it changes " + "; ".join(found), "; ".join(FIXES[kind] for kind in kinds))


def _listed(names: list[str]) -> str:
    if not any(names):
        return ""
    return f"of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"


def _state(trial: Trial) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield what may not change, by kind and name."""
    for name, module in trial.net.named_modules():
        yield ("training", name or "the net"), module.training
    for name, buffer in trial.net.named_buffers():
        yield ("buffers", name), buffer.detach().clone()
    samples = tensors_of((trial.samples, trial.named))
    named = {f"sample {i}": x for i, x in enumerate(samples)}
    for name, x in [*trial.net.named_parameters(), *named.items()]:
        yield ("values", name), x.detach().clone()
        yield ("requires_grad", name), x.requires_grad
        yield (".grad", name), None if x.grad is None else x.grad.detach().clone()


def _equal(before: dict[Any, Any], now: dict[Any, Any], key: Any) -> bool:
    if key not in before or key not in now:
        return False
    a, b = before[key], now[key]
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
