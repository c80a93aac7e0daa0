"""`gpkit.load`: the trained net of a checkpoint, without executing anything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import gpkit.models
from gpkit import checks
from gpkit.app.checkpoints import NETS, read_checkpoint


def load(path: str | Path, net: nn.Module | None = None, *, part: str | None = None) -> nn.Module:
    """Return the trained net of a checkpoint of ``train.py``, in evaluation mode, on the CPU.

    A checkpoint may come from anywhere, so nothing in it is executed: nets of `gpkit.models` are
    made from the options that it holds; any other net must be given.

    Args:
        path: of the checkpoint, such as ``RUN/checkpoints/best.ckpt``.
        net: a net of the same shape, for a class of your own; it is filled and returned.
        part: for a pair "generator", "ema_generator", its average, or "critic". None is the net, or
            the average of the generator if there is one, or the generator.

    Raises:
        ValueError: if the file is no such checkpoint, ``part`` is not in it, or ``net`` is needed
            or does not fit.
    """
    saved = read_checkpoint(Path(path))
    weights: dict[str, Any] = saved["state_dict"]
    parts = [p for p in ("net", "ema_generator", "generator", "critic") if _below(weights, p)]
    if not parts:
        raise ValueError(f"{path} holds no net of gpkit's modules: its weights have other names")
    part = parts[0] if part is None else checks.choice("load(part=...)", part, parts)
    if net is None:
        recipe = dict(saved.get(NETS, {}).get(part.removeprefix("ema_"), {}))
        name = str(recipe.pop("_target_", "")).rpartition(".")
        if name[0] != "gpkit.models" or name[2] not in gpkit.models.__all__:
            made = f"a net of {'.'.join((name[0], name[2]))}" if name[2] else "an unknown net"
            raise ValueError(
                f"{path} holds {made}, which is not executed: give a net of the same shape, "
                "gpkit.load(path, MyNet())"
            )
        net = getattr(gpkit.models, name[2])(**recipe)
    found = _below(weights, part)
    try:
        net.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the net: {str(error).splitlines()[1].strip()}"
        ) from error
    return net.eval()


def _below(weights: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}
