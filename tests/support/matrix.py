"""The cells of the callback's test matrix, and how one of them is trained with Lightning."""

import itertools
from dataclasses import astuple, dataclass

import by_hand
import nets
import pytorch_lightning as pl
import torch
from modules import QUIET, SGD, Plain
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, Subset, TensorDataset

import gpkit

EPOCHS, BATCHES, B = 2, 4, 6  # micro-batches of an epoch, and samples of a micro-batch
WEIGHT = 0.3


@dataclass(frozen=True)
class Cell:
    where: str
    estimator: str
    precision: str
    accumulate: str
    strategy: str
    returns: str

    def __str__(self):
        return "-".join(astuple(self))


WHERE = ("weight", "input", "activation")
ESTIMATORS = ("exact", "difference")
PRECISIONS = ("32", "bf16", "16", "64")
ACCUMULATE = ("1", "2", "schedule")
DDP = ("ddp", "find_unused", "static_graph", "bucket_view")
RETURNS = ("tensor", "dict")
AXES = (WHERE, ESTIMATORS, PRECISIONS, ACCUMULATE, ("one", *DDP), RETURNS)
CELLS = [Cell(*choice) for choice in itertools.product(*AXES)]


def pairwise(cells):
    """Of all cells, so many that every pair of choices on two axes is in one of them."""
    chosen, missing = [], {p for cell in cells for p in pairs(cell)}
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pairs(cell):
    return set(itertools.combinations(enumerate(astuple(cell)), 2))


def data(dtype=torch.float32, ranks=1):
    """(x, y), B samples for each rank and micro-batch of an epoch."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(ranks * BATCHES * B, 5, generator=rng, dtype=torch.float64).to(dtype)
    return x, torch.randint(3, (len(x),), generator=rng)


class Shares(pl.LightningDataModule):
    """Every rank its own samples, in order."""

    def __init__(self, dtype=torch.float32, ranks=1):
        super().__init__()
        self.dtype, self.ranks = dtype, ranks

    def train_dataloader(self):
        x, y = data(self.dtype, self.ranks)
        mine = range(self.trainer.global_rank, len(x), self.ranks)
        return DataLoader(Subset(TensorDataset(x, y), mine), B)


def penalty(cell):
    """The callback of a cell."""
    estimator = gpkit.finite_difference(by_hand.STEP) if cell.estimator == "difference" else "exact"
    if cell.where == "weight":
        made, module = gpkit.weight_grad_norm(WEIGHT, estimator=estimator), None
    elif cell.where == "input":
        made, module = gpkit.input_grad_norm(WEIGHT, estimator=estimator), "net"
    else:
        wrt = gpkit.activation("backbone")
        made = gpkit.input_grad_norm(WEIGHT, wrt=wrt, estimator=estimator)
        module = "net"
    return gpkit.GradientPenaltyCallback(made, module)


def trainer(cell, **options):
    """The trainer of a cell."""
    precision = {"32": "32-true", "bf16": "bf16-mixed", "64": "64-true"}.get(cell.precision)
    if cell.precision == "16":
        scaler = torch.amp.GradScaler("cpu", init_scale=by_hand.SCALE)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    else:
        options["precision"] = precision
    callbacks = options.pop("callbacks", [penalty(cell)])
    if cell.accumulate == "schedule":
        callbacks.append(GradientAccumulationScheduler({0: 1, 1: 2}))
    elif cell.accumulate == "2":
        options["accumulate_grad_batches"] = 2
    if cell.strategy != "one":
        chosen = {
            "ddp": {},
            "find_unused": {"find_unused_parameters": True},
            "static_graph": {"static_graph": True},
            "bucket_view": {"gradient_as_bucket_view": True},
        }[cell.strategy]
        options |= {"strategy": DDPStrategy(**chosen), "devices": 2}
        options["use_distributed_sampler"] = False
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        callbacks=callbacks,
        **{"log_every_n_steps": 1, "devices": 1, "logger": False, **QUIET, **options},
    )


def trained(cell):
    """Return the parameters of a cell, trained with Lightning: a list."""
    dtype = torch.float64 if cell.precision == "64" else torch.float32
    module = Plain(nets.net(dtype), cell.returns)
    trainer(cell).fit(module, Shares(dtype, 1 if cell.strategy == "one" else 2))
    return [p.detach().clone() for p in module.parameters()]


def expected(cell, total=None):
    """Return the parameters of a cell, trained by hand; with another total if one is given."""
    dtype = torch.float64 if cell.precision == "64" else torch.float32
    ranks = 1 if cell.strategy == "one" else 2
    x, y = data(dtype, ranks)
    epoch = []
    for i in range(BATCHES):
        mine = [slice(i * B * ranks + r, (i + 1) * B * ranks, ranks) for r in range(ranks)]
        epoch.append([(x[s], y[s]) for s in mine])
    windows = {"1": [1] * BATCHES * 2, "2": [2] * BATCHES, "schedule": [1] * BATCHES + [2, 2]}
    made = by_hand.train(
        nets.net(dtype),
        epoch * EPOCHS,
        total or by_hand.TOTALS[cell.where, cell.estimator],
        WEIGHT,
        SGD,
        precision=cell.precision,
        windows=windows[cell.accumulate],
    )
    return [p.detach() for p in made.parameters()]


def difference(mine, true):
    """The largest difference of any parameter."""
    return max((a - b).abs().max().item() for a, b in zip(mine, true, strict=True))


def table(found):
    """Return the lines of a table of what was found, the worst over what the steps return.

    Args:
        found: str(cell) -> the largest difference of any parameter, or a word instead of one.
    """
    worst = {}
    for name, value in found.items():
        *row, accumulate, strategy, _ = name.split("-")
        place = tuple(row), (strategy, accumulate)
        worst[place] = max(worst.get(place, value), value, key=severity)
    kinds = itertools.product(WHERE, ESTIMATORS, PRECISIONS)
    rows = [row for row in kinds if any(r == row for r, _ in worst)]
    strategies = [s for s in ("one", *DDP) if any(c[0] == s for _, c in worst)]
    heads = "".join(f"{a[:5]:>6}" for a in ACCUMULATE)
    lines = [f"{'':26}" + "".join(f" |{s:>18}" for s in strategies)]
    lines += [f"{'micro-batches of a step':26}" + f" |{heads}" * len(strategies)]
    for row in rows:
        places = [[(row, (s, a)) for a in ACCUMULATE] for s in strategies]
        cells = ["".join(f"{shown(worst.get(p)):>6}" for p in group) for group in places]
        lines.append("{:11}{:11}{:4}".format(*row) + "".join(f" |{c}" for c in cells))
    return lines if rows else []


def severity(value):
    """A word is worse than a number, and NaN is the worst."""
    return (2, 0) if value != value else (1, 0) if isinstance(value, str) else (0, value)


def shown(value):
    """As 2e-07; nothing for a cell that did not run."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0e}" if value else "0"
