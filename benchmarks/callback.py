"""What the callback costs over the same penalty written by hand in the module's training_step.

    python benchmarks/callback.py

Both train the same small MLP with the same Trainer, in turns in one process; the cost is the median
over the rounds of the ratio of the median times of a step, but for the first 20 steps of each fit.
"""

import itertools
import logging
import statistics
import time
import warnings
from functools import partial

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpkit

STEPS, ROUNDS, WARM = 220, 15, 20
SIZES = {"MLP 64-128-128-10, batch 64": (128, 64), "MLP 64-512-512-10, batch 128": (512, 128)}


class Plain(pl.LightningModule):
    """A classifier."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 10),
        )

    def training_step(self, batch, batch_idx):
        """Return the loss."""
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        """Return the optimiser."""
        return torch.optim.SGD(self.parameters(), 1e-3)


class Weight(Plain):
    """The same, with ‖∇_θ L‖² by hand."""

    def training_step(self, batch, batch_idx):
        """Return the loss and the penalty."""
        loss = super().training_step(batch, batch_idx)
        grads = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
        return loss + 0.1 * sum(g.square().sum() for g in grads)


class Input(Plain):
    """The same, with mean ‖∇_x ℓ_i‖² by hand."""

    def training_step(self, batch, batch_idx):
        """Return the loss and the penalty."""
        x, y = batch
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(self.net(x), y)
        (grad,) = torch.autograd.grad(len(x) * loss, x, create_graph=True)
        return loss + 0.1 * grad.flatten(1).square().sum(1).mean()


class Clock(pl.Callback):
    """Times each step, from one to the next."""

    def __init__(self):
        self.times = []

    def on_train_batch_start(self, *args):
        """Note the time."""
        self.times.append(time.perf_counter())


def step_time(make, callbacks, loader):
    """Return the median time of a step, in seconds, of a fit."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        log_every_n_steps=10 * STEPS,  # what is logged is not a cost of the penalty
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *callbacks],
    )
    trainer.fit(make(), loader)
    ticks = clock.times[WARM:]
    return statistics.median(b - a for a, b in itertools.pairwise(ticks))


def ratios(width, batch, hand, penalty, module):
    """Return the ratios to the penalty by hand, of all rounds: of the callback, of an empty one."""
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(STEPS * batch, 64), torch.randint(10, (STEPS * batch,)))
    loader = DataLoader(data, batch)
    runs = {
        "hand": lambda: (hand, []),
        "empty": lambda: (hand, [pl.Callback()]),
        "callback": lambda: (Plain, [gpkit.GradientPenaltyCallback(penalty(0.1), module)]),
    }
    found = []
    for i in range(ROUNDS):
        took = {}
        for name in list(runs)[i % 3 :] + list(runs)[: i % 3]:
            make, callbacks = runs[name]()
            took[name] = step_time(partial(make, width), callbacks, loader)
        found.append((took["callback"] / took["hand"], took["empty"] / took["hand"]))
    return found


def main():
    """Print the table."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    kinds = {
        "weight_grad_norm": (Weight, gpkit.weight_grad_norm, None),
        "input_grad_norm": (Input, gpkit.input_grad_norm, "net"),
    }
    print("| net | penalty | callback / by hand, median (quartiles) | an empty callback / none |")
    print("| --- | --- | --- | --- |")
    for title, (width, batch) in SIZES.items():
        for kind, (hand, penalty, module) in kinds.items():
            whole, empty = zip(*ratios(width, batch, hand, penalty, module), strict=True)
            low, middle, high = statistics.quantiles(whole, n=4)
            print(
                f"| {title} | `{kind}` | {middle:.3f} ({low:.3f} to {high:.3f}) | "
                f"{statistics.median(empty):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
