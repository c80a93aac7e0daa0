"""What the callback costs over the same penalty written by hand in the module's training_step.

    python benchmarks/callback.py

Both train the same small MLP with the same Trainer, in turns in one process; the cost is the median
over the rounds of the ratio of the median times of a step, but for the first 20 steps of each fit.
Of each there are two runs: one logs nothing, the other the four numbers that the callback logs, on
every 50th step, as is the default; a 50th of what these steps take longer is added. One more run
has the callback's shortcut for plain penalties switched off: `GradientPenalty` then reads its
arguments at every step.
"""

import itertools
import logging
import statistics
import time
import warnings
from dataclasses import replace
from functools import partial
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpkit
from gpkit.needs import needs_of

STEPS, ROUNDS, WARM = 220, 24, 20
LOGS = 50  # steps from one that is logged to the next
SIZES = {"MLP 64-128-128-10, batch 64": (128, 64), "MLP 64-512-512-10, batch 128": (512, 128)}


class Plain(pl.LightningModule):
    """A classifier."""

    def __init__(self, width, logs=False):
        super().__init__()
        self.logs = logs
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

    def logs_now(self):
        """Whether it logs, on the steps on which the callback does."""
        return self.logs and (self.trainer.global_step + 1) % LOGS == 0

    def log_by_hand(self, total, value, norm):
        """Log what the callback logs."""
        self.log("train/loss_total", total.detach())
        self.log("penalty", 0.1 * value.detach())
        self.log("penalty/weight", 0.1)
        self.log("penalty/norm", norm.detach())

    def configure_optimizers(self):
        """Return the optimiser."""
        return torch.optim.SGD(self.parameters(), 1e-3)


class Weight(Plain):
    """The same, with ‖∇_θ L‖² by hand."""

    def training_step(self, batch, batch_idx):
        """Return the loss and the penalty."""
        loss = super().training_step(batch, batch_idx)
        grads = torch.autograd.grad(loss, list(self.net.parameters()), create_graph=True)
        value = sum(g.square().sum() for g in grads)
        total = loss + 0.1 * value
        if self.logs_now():
            self.log_by_hand(total, value, value.sqrt())
        return total


class Input(Plain):
    """The same, with mean ‖∇_x ℓ_i‖² by hand."""

    def training_step(self, batch, batch_idx):
        """Return the loss and the penalty."""
        x, y = batch
        x = x.detach().requires_grad_()
        loss = F.cross_entropy(self.net(x), y)
        (grad,) = torch.autograd.grad(len(x) * loss, x, create_graph=True)
        values = grad.flatten(1).square().sum(1)
        total = loss + 0.1 * values.mean()
        if self.logs_now():
            self.log_by_hand(total, values.mean(), values.sqrt().mean())
        return total


class Clock(pl.Callback):
    """Times each step, from one to the next."""

    def __init__(self):
        self.times = []

    def on_train_batch_start(self, *args):
        """Note the time."""
        self.times.append(time.perf_counter())


def step_time(make, callbacks, loader, *, logs=False):
    """Return the time of a step of a fit, in seconds."""
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        log_every_n_steps=LOGS if logs else 10 * STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *callbacks],
    )
    trainer.fit(make(), loader)
    times = [b - a for a, b in itertools.pairwise(clock.times)]
    middle = statistics.median(times[WARM:])
    logged = statistics.median(times[LOGS - 1 :: LOGS])
    return middle + (logged - middle) / LOGS if logs else middle


def without_shortcut(run):
    """Return the time of a step of a run in which every penalty is called with arguments."""
    step = "gpkit.lightning.callback.step.needs_of"
    with mock.patch(step, lambda penalty: replace(needs_of(penalty), plain=False)):
        return run()


def ratios(width, batch, hand, penalty, module):
    """Return the ratios of the callback to the penalty by hand: lists, of all rounds."""
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(STEPS * batch, 64), torch.randint(10, (STEPS * batch,)))
    loader = DataLoader(data, batch)

    def callback():
        return gpkit.GradientPenaltyCallback(penalty(0.1), module)

    runs = {
        "hand": lambda: step_time(partial(hand, width), [], loader),
        "empty": lambda: step_time(partial(hand, width), [pl.Callback()], loader),
        "callback": lambda: step_time(partial(Plain, width), [callback()], loader),
        "called": lambda: without_shortcut(runs["callback"]),
        "hand logs": lambda: step_time(partial(hand, width, True), [], loader, logs=True),
        "callback logs": lambda: step_time(partial(Plain, width), [callback()], loader, logs=True),
    }
    found = {"callback": [], "called": [], "callback logs": [], "empty": []}
    for i in range(ROUNDS):
        first = i % len(runs)
        order = [*runs][first:] + [*runs][:first]
        took = {name: runs[name]() for name in order}
        for name, row in found.items():
            row.append(took[name] / took["hand logs" if "logs" in name else "hand"])
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
    print("| net | penalty | callback / by hand | no shortcut | both log | empty callback / none |")
    print("| --- | --- | --- | --- | --- | --- |")
    for title, (width, batch) in SIZES.items():
        for kind, (hand, penalty, module) in kinds.items():
            found = ratios(width, batch, hand, penalty, module)
            cells = [quartiles(row) for row in found.values()]
            print(f"| {title} | `{kind}` | {' | '.join(cells)} |", flush=True)


def quartiles(values):
    """Return the median of values, with the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
