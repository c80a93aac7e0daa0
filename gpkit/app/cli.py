"""The command line: ``python train.py`` and ``gpkit-train``.

Nothing here imports torch before a job runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gpkit.app.overrides import CONFIG_DIR, check_types, explain

# Hydra shows a traceback when this is set. We set it to see errors, and say them in a line.
FULL_ERROR = "HYDRA_FULL_ERROR"


ONE_LINE = "GPKIT_ONE_LINE_ERRORS"


def main() -> None:
    """Run the application on ``sys.argv``; a mistake ends it with one line and exit code 1."""
    sys.path.insert(0, os.getcwd())  # model._target_=my_package.MyNet of the current directory
    # Hydra's parser loses overrides that stand before an option: options first.
    words = sys.argv[1:]
    sys.argv[1:] = sorted(words, key=lambda w: not w.startswith("-") and ("=" in w or w[:1] == "~"))
    if os.environ.get(FULL_ERROR, "0") == "0":
        os.environ[ONE_LINE] = os.environ[FULL_ERROR] = "1"  # processes of ddp inherit both
    if ONE_LINE not in os.environ:
        _job()
        return
    try:
        _job()
    except Exception as error:
        if not getattr(error, "said", False):
            _say(explain_composed(error))
        sys.exit(1)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def _job(cfg: DictConfig) -> float | None:
    """Run one job; what it returns goes to the sweeper."""
    overrides = list(HydraConfig.get().overrides.task)
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        check_types(cfg, overrides)
        from gpkit.app.train import run

        metrics = run(cfg, HydraConfig.get().runtime.output_dir, overrides, sweep=sweep)
        return metrics.get(cfg.optimized_metric)
    except Exception as error:
        if ONE_LINE not in os.environ:
            raise
        line = explain(error, overrides)
        if sweep:  # the other jobs run; the exit code tells at the end
            _say(f"{' '.join(overrides)}: {line}")
            error.said = True  # type: ignore[attr-defined]
            raise
        _say(line)
        sys.exit(1)


def explain_composed(error: Exception) -> str:
    """Return the line for an error from outside of a job, where Hydra is no longer initialised."""
    from hydra import initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra

    # hydra.main reads the command line itself, and hands none of it out once composing has failed;
    # its parser of options is private. tests/app/test_cli.py fails where it is gone.
    typed = get_args_parser().parse_args(sys.argv[1:])
    overrides = list(typed.overrides)
    if typed.config_dir:
        overrides.append(f"hydra.searchpath=[{Path(typed.config_dir).absolute().as_uri()}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return explain(error, overrides)


def _say(line: str) -> None:
    print(f"error: {line} ({FULL_ERROR}=1 shows the traceback)", file=sys.stderr)
