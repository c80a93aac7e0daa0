"""All private API of Lightning and torchmetrics that gpkit uses, in one place.

Each entry says why the public API is not enough. `tests/lightning/test_lightning_compat.py` fails
with the name of the entry when a release removes it. Torch's own private API is in
`gpkit.autodiff.compat`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
else:
    # `lightning.pytorch` is the same library as `pytorch_lightning` with its own classes, and its
    # trainer accepts only its own Callback. If both are installed, ours inherits from both.
    # (A folder of that name without an __init__.py, in a user's project, has no origin.)
    _both = getattr(find_spec("lightning"), "origin", None) is not None
    _names = ["pytorch_lightning", *["lightning.pytorch"] * _both]
    Callback = type("Callback", tuple(import_module(name).Callback for name in _names), {})


def trainer_of(module: Any) -> Any:
    """Return the trainer of a LightningModule, or None; ``module.trainer`` raises without one."""
    return module._trainer


def scaler_of(trainer: Any) -> Any:
    """Return the gradient scaler of precision "16-mixed", or None; ``trainer`` may be None.

    Lightning has no accessor for it; the precision plugin has it as an attribute.
    """
    return getattr(getattr(trainer, "precision_plugin", None), "scaler", None)


def scale_of(scaler: Any, device: torch.device) -> Tensor | None:
    """Return the current scale of a gradient scaler as a tensor; None without a scaler.

    ``scaler.get_scale()`` waits for the device; to scale a tensor of one does not.

    Args:
        scaler: a gradient scaler, or None.
        device: the device of the loss.
    """
    return None if scaler is None else scaler.scale(torch.ones((), device=device))


def steps_of(trainer: Any) -> int:
    """Return the step number under which the trainer logs now.

    Lightning's loggers get the number of batches after which an optimiser has stepped.
    ``global_step`` counts the steps of all optimisers, and a GAN has two of them.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def logs_now(trainer: Any, ahead: int = 1) -> bool:
    """Whether the trainer logs the current step, or one of the next few.

    Lightning's own callbacks ask its logger connector, which is private and knows one step only.

    Args:
        trainer: the trainer of the fit.
        ahead: the number of steps to look at; 1 is the current step only.

    Returns:
        Whether one of these steps is logged.
    """
    every, done = trainer.log_every_n_steps, steps_of(trainer)
    due = every and ((done + ahead) // every > done // every or trainer.should_stop)
    return bool(due or trainer.fast_dev_run)


def last_of_step(trainer: Any) -> bool:
    """Whether this micro-batch is the last one of an optimiser step.

    Only the fit loop knows: it depends on the end of the epoch and on accumulation schedules.

    Returns:
        False if more micro-batches are accumulated before the optimiser steps.
    """
    return trainer.accumulate_grad_batches == 1 or not trainer.fit_loop._should_accumulate()


def state_key(callback: Any, **arguments: Any) -> str:
    """Return the key of a callback's state in a checkpoint; it depends on the arguments.

    Lightning's documentation tells callbacks to call this method, though it has an underscore.
    """
    return str(callback._generate_state_key(**arguments))


# Attributes that an update of a metric changes, beside its states. torchmetrics has no function
# that copies only these, and a `deepcopy` of a metric copies the modules inside it.
# (`_update_called` is an attribute of old releases; it has become a property of the count.)
METRIC_CACHES = ("_update_count", "_computed", "_forward_cache", "_update_called")


def metric_state(metric: Any, *, caches: bool = True) -> dict[str, Any]:
    """Return the attributes of a torchmetrics metric that an update changes."""
    names = [*metric._defaults, *(METRIC_CACHES if caches else ())]
    return {k: metric.__dict__[k] for k in names if k in metric.__dict__}
