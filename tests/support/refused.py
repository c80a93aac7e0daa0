"""Fits that are refused, before the first optimiser step and in one line."""

import pytest
import pytorch_lightning as pl
import torch
from fits import batches, loader
from modules import QUIET, Plain
from nets import net

import gpkit


class Backwards(pl.Callback):
    """Counts what must not come: backward passes."""

    def __init__(self):
        self.count = 0

    def on_after_backward(self, trainer, module):
        self.count += 1


def refusal(module, *callbacks, micro=None, error=ValueError, **options):
    """Return the line with which a fit is refused, and check what it leaves behind."""
    before = {k: v.clone() for k, v in module.state_dict().items()}
    backwards = Backwards()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*callbacks, backwards],
        logger=False,
        **{"devices": 1, **QUIET, **options},
    )
    with pytest.raises(error) as raised:
        trainer.fit(module, loader(micro or batches(2)))
    assert backwards.count == 0
    assert not {"training_step", "manual_backward", "log"} & set(module.__dict__)
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    (line,) = str(raised.value).splitlines()
    return line


def refused(made, module=None, lightning_module=None, **options):
    """Return the line for one callback."""
    cb = gpkit.GradientPenaltyCallback(made, module, **options)
    return refusal(lightning_module or Plain(net()), cb)
