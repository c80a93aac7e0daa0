"""Every named penalty: error against the float64 oracle, and cost in plain training steps.

The errors are those of the table of test cases (tests/support: cases.py, oracles.py). The cost is
the time of a training step with the penalty over that of one without, each penalty as its YAML in
configs/penalty has it: MLP 64-512-512-10, with one output for critics and fields, GELU, batch 128,
float32, runs interleaved in one process, the median of the ratios.

    python benchmarks/catalogue.py         two minutes; writes catalogue.md
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

import gpkit
from gpkit.app.overrides import CONFIG_DIR
from gpkit.models import MLP
from gpkit.presets import PRESETS

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "support"))

from cases import ROWS, evaluated, expected  # noqa: E402
from compare import gradients, relative_error  # noqa: E402

ROUNDS = 30
COMPARED = {"sobolev": "target", "right_reasons": "mask"}
CRITICS = {
    name for name, f in PRESETS.items() if f.__module__.endswith((".critics", ".approximations"))
}


def errors() -> dict[str, tuple[float, float]]:
    """Return the relative errors of value and parameter gradient for every row of the table."""
    found = {}
    for row in ROWS:
        s = row.scene()
        terms, z = evaluated(row, s)
        _, _, penalty, gradient = expected(row, s, z)
        total = sum(t.penalty for t in terms)
        value = relative_error(total, penalty)
        found[row.name] = float(value), float(relative_error(gradients(total, s.net), gradient))
    return found


def step(penalty: object, *, score: bool) -> Callable[[], None]:
    """Return one training step with a penalty, of a classifier or of a net with one output."""
    torch.manual_seed(0)
    net, loss = MLP((64,), 1 if score else 10, width=512), nn.CrossEntropyLoss()
    module = gpkit.PenalizedModule(
        net, nn.MSELoss() if score else loss, penalty, gradient_norms=False
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    batch = torch.rand(128, 64), torch.rand(128, 1) if score else torch.randint(10, (128,))

    def run() -> None:
        loss = module.penalized_loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def costs() -> dict[str, float]:
    """Return the cost of each penalty's step in plain steps."""
    steps = {}
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        for path in sorted((CONFIG_DIR / "penalty").glob("*.yaml")):
            cfg = compose("train", [f"penalty={path.stem}", "++penalty.every=1"])
            if path.stem == "fishr":  # its own weight is zero for the first steps
                cfg.penalty.weight = 1.0
            if path.stem == "sum":
                cfg = compose("train", ["penalty=sum"])
            if path.stem in COMPARED:  # with an entry of the batch: here the samples
                cfg.penalty[COMPARED[path.stem]] = {
                    "_target_": "hydra.utils.get_method",
                    "path": "modules.first",
                }
            score = path.stem in ("eikonal", "sobolev", "laplacian", "amp", *CRITICS)
            steps[path.stem] = step(instantiate(cfg.penalty, _convert_="all"), score=score)
    plain = step(None, score=False)
    for run in (plain, *steps.values()):
        run()
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, run in steps.items():
            ratios[name].append(seconds(run) / seconds(plain))
    return {name: statistics.median(values) for name, values in ratios.items()}


def seconds(run: Callable[[], None]) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Write and print the table."""
    cost = costs()
    rows = ["| case | value error | gradient error |", "| --- | --- | --- |"]
    rows += [f"| `{name}` | {v:.0e} | {g:.0e} |" for name, (v, g) in errors().items()]
    rows += ["", "| penalty | cost, plain steps |", "| --- | --- |"]
    rows += [f"| `{name}` | {ratio:.1f} |" for name, ratio in cost.items()]
    (HERE / "catalogue.md").write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
