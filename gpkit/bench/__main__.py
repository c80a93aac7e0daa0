"""``python -m gpkit.bench model=mlp penalty=r1``; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from rich.console import Console

from gpkit.app.data import built, loader_of
from gpkit.app.overrides import CONFIG_DIR, explain
from gpkit.bench.measure import Benchmark, bench
from gpkit.bench.shown import chart, notes, tables
from gpkit.lightning.batches import unpack


def main(words: Sequence[str] | None = None) -> None:
    """Measure the penalty of a config. Wrong input prints one line, and exits with code 1."""
    parser = argparse.ArgumentParser("python -m gpkit.bench", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for train.py: model=..., penalty=...")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--png", type=Path, help="write a bar chart to this file")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each that are timed")
    parser.add_argument(
        "--eager", action="store_true", help="leave out what takes longest: compiling each step"
    )
    parser.add_argument("--within", type=float, default=0.1, help="the error that is tolerated")
    options = parser.parse_args(words)
    logging.getLogger("hydra").addHandler(logging.NullHandler())  # errors are said in one line here
    try:
        if options.png:
            require_chart(options.png)
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3", job_name="bench"):
            try:
                chosen = {name: getattr(options, name) for name in ("rounds", "within")}
                found = measured(options.overrides, compile=not options.eager, **chosen)
            except Exception as error:
                raise ValueError(explain(error, options.overrides)) from error
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if options.png:
        chart(found, options.png)
    if options.json:
        print(json.dumps(found.as_dict()))
        return
    console = Console()
    for table in tables(found):
        console.print(table)
    for line in (*notes(found), *found.advice()):
        console.print(line, highlight=False)


def require_chart(path: Path) -> None:
    """Refuse a file for the chart that cannot be written, before anything is measured.

    Raises:
        ValueError: if its folder does not exist, or its name has another ending.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--png needs a folder that exists; got {path.parent}")
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--png needs a name that ends in .png, .pdf or .svg; got {path.name}")


def measured(overrides: Sequence[str], **options: Any) -> Benchmark:
    """Return the benchmark of a config's net and penalty on its first batch.

    Raises:
        ValueError: if the config trains a pair of nets, or has no penalty.
    """
    _, data, module = built(overrides)
    if not hasattr(module, "net"):
        raise ValueError("the benchmark is of one net: use module=penalized and a critic as model=")
    if not any(callable(p.weight) or p.weight for p in module.penalties.values()):
        raise ValueError("there is no penalty: use penalty=r1, or another one of configs/penalty")
    batch = unpack(next(iter(loader_of(data, "train"))), module.net)
    return bench(module.net, dict(module.penalties), (batch.x, batch.y), **options)


if __name__ == "__main__":
    main()
