"""All that gpkit uses of Lightning and torchmetrics beside their public API, in one place.

Each entry says why the public way does not do. `tests/lightning/test_compat.py` fails with the name
of the entry when a release takes it away. What is torch's own is in `gpkit.autodiff.compat`.
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
    # `lightning.pytorch` is the same library as `pytorch_lightning`, with classes of its own, and
    # its trainer takes callbacks of its own class. Where both are installed we are of both.
    # (A folder of that name without an __init__.py, in a user's project, has no origin.)
    _both = getattr(find_spec("lightning"), "origin", None) is not None
    _names = ["pytorch_lightning", *["lightning.pytorch"] * _both]
    Callback = type("Callback", tuple(import_module(name).Callback for name in _names), {})


def is_a(thing: Any, *names: str) -> bool:
    """Whether a class of one of these names is among those of ``thing``, of either package."""
    # isinstance would take the classes of both, and import both.
    return any(c.__name__ in names for c in type(thing).__mro__)


def trainer_of(module: Any) -> Any:
    """Return the trainer of a LightningModule, or None. ``module.trainer`` raises without one."""
    return module._trainer


def scaler_of(trainer: Any) -> Any:
    """Return the gradient scaler of float16 training, or None; ``trainer`` may be None.

    Lightning has no accessor for it; the precision plugin holds it as an attribute.
    """
    return getattr(getattr(trainer, "precision_plugin", None), "scaler", None)


def scale_of(scaler: Any, device: torch.device) -> Tensor | None:
    """Return the scale that a scaler has now, without waiting for the device; None for none.

    ``scaler.get_scale()`` waits for the device; scaling a one does not.

    Args:
        scaler: of gradients, or None.
        device: where the loss is.
    """
    return None if scaler is None else scaler.scale(torch.ones((), device=device))


def steps_of(trainer: Any) -> int:
    """Return the step under which the trainer logs numbers now.

    Lightning's loggers get this count, of batches after which an optimiser stepped.
    ``global_step`` counts the steps of every optimiser, of which a GAN has two a batch.
    """
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def logs_now(trainer: Any, ahead: int = 1) -> bool:
    """Whether the trainer logs the step that is under way, or one of several from it on.

    Lightning's own monitors ask its logger connector, which is private and looks at one step.

    Args:
        trainer: of a fit.
        ahead: how many steps, this one included.

    Returns:
        Whether one of them is logged.
    """
    every, done = trainer.log_every_n_steps, steps_of(trainer)
    due = every and ((done + ahead) // every > done // every or trainer.should_stop)
    return bool(due or trainer.fast_dev_run)


def last_of_step(trainer: Any) -> bool:
    """Whether this micro-batch is the last before an optimiser's step.

    Only the fit loop knows: the end of an epoch and schedules of accumulation count.

    Returns:
        False while an optimiser step still waits for micro-batches.
    """
    return trainer.accumulate_grad_batches == 1 or not trainer.fit_loop._should_accumulate()


def state_key(callback: Any, **arguments: Any) -> str:
    """Return the name of a callback's state in a checkpoint, one for each choice of arguments.

    Lightning advises callbacks to call this method of theirs, which has an underscore.
    """
    return str(callback._generate_state_key(**arguments))


# What an update of a metric changes beside its states. torchmetrics has no copy of a state that
# leaves out constants, and `deepcopy` of a metric copies its modules.
# (`_update_called` is an attribute of old releases; it has become a property of the count.)
METRIC_CACHES = ("_update_count", "_computed", "_forward_cache", "_update_called")


def metric_state(metric: Any, *, caches: bool = True) -> dict[str, Any]:
    """Return the attributes of a torchmetrics metric that an update changes."""
    names = [*metric._defaults, *(METRIC_CACHES if caches else ())]
    return {k: metric.__dict__[k] for k in names if k in metric.__dict__}
