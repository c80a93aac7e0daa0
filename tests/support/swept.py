"""Sweeps of tiny jobs: a net that fails at a width, and what the jobs leave."""

import json
from pathlib import Path

from torch import nn

FAST = ["device=cpu", "trainer=fast_dev_run", "trainer.enable_progress_bar=false"]
SWEEP = "hydra.sweep.dir=sweep"


class Brittle(nn.Sequential):
    """A net of ten outputs that does not run at some widths, unless a file is there."""

    def __init__(self, num_outputs, width=3):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, num_outputs))
        self.width = width

    def forward(self, x):
        if self.width == 5 and not Path("repaired").exists():
            raise RuntimeError("the power is gone")
        return super().forward(x)


BRITTLE = [*FAST, "model._target_=swept.Brittle", SWEEP]


def strictly(constant):
    raise AssertionError(f"{constant} is not JSON")


def results():
    """Return the results of the sweep by job number, as plain JSON."""
    paths = sorted(Path("sweep").glob("*/result.json"))
    return {
        int(path.parent.name.partition("-")[0]): json.loads(
            path.read_text(), parse_constant=strictly
        )
        for path in paths
    }
