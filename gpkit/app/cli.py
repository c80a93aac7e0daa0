"""The command line: ``python train.py`` and ``gpkit-train``.

torch is imported only when a job runs, so that ``--help`` is fast.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

import gpkit
from gpkit.app.overrides import CONFIG_DIR, check_types, explain
from gpkit.app.result import LAST, recorded
from gpkit.app.signals import stops_at_signals
from gpkit.app.sweep import NoteSweep, claim, describe, left_by, say_end

# Without this variable Hydra prints an error and exits. It is set here, so that Hydra raises the
# error and gpkit can report it in one line.
FULL_ERROR = "HYDRA_FULL_ERROR"
ONE_LINE = "GPKIT_ONE_LINE_ERRORS"


def main() -> None:
    """Run the application on ``sys.argv``. An error prints one line and exits with code 1."""
    sys.path.insert(0, os.getcwd())  # for model._target_=my_package.MyNet
    # Hydra's parser loses overrides that come before an option, so options go first.
    words = sys.argv[1:]
    if words == ["--version"]:
        print(f"gpkit {gpkit.__version__}")
        return
    sys.argv[1:] = sorted(words, key=lambda w: not w.startswith("-") and ("=" in w or w[:1] == "~"))
    if os.environ.get(FULL_ERROR, "0") == "0":
        os.environ[ONE_LINE] = os.environ[FULL_ERROR] = "1"  # the processes of ddp inherit both
    NoteSweep.folder = None
    try:
        _job()
    except Exception as error:
        if ONE_LINE not in os.environ:
            raise
        _report(explain_composed(error))
        sys.exit(1)
    finally:
        unfinished = 0 if NoteSweep.folder is None else say_end(NoteSweep.folder)
    if unfinished:
        sys.exit(1)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")
def _job(cfg: DictConfig) -> float | None:
    """Run one job and return its metric to the sweeper."""
    hydra_cfg = HydraConfig.get()
    overrides = list(hydra_cfg.overrides.task)
    folder, sweep = Path(hydra_cfg.runtime.output_dir), hydra_cfg.mode == RunMode.MULTIRUN
    shared = hydra_cfg.job.config.override_dirname.exclude_keys
    result = describe(cfg, overrides, hydra_cfg.runtime.choices, shared)
    left = left_by(folder, result) if sweep else None
    done = claim(folder, result) if sweep else None
    if done is not None:
        print(f"\n  done before: {done.same_as or folder.name}")
        return done.metrics.get(cfg.optimized_metric)
    try:
        with (
            stops_at_signals(folder / LAST, overrides),
            recorded(result, folder, lambda error: explain(error, overrides)),
        ):
            from gpkit.app.train import run  # it loads torch, which takes seconds

            check_types(cfg, overrides)
            if left is not None:
                print(f"\n  goes on from {left}: the job was stopped")
            metrics = run(cfg, folder, overrides, sweep=sweep, result=result, resume=left)
        return metrics.get(cfg.optimized_metric)
    except Exception as error:
        if not sweep:
            if ONE_LINE not in os.environ:
                raise
            _report(str(result.error))
            sys.exit(1)
        # The other jobs still run, here or in other processes, and `main` exits with code 1.
        if ONE_LINE not in os.environ:
            traceback.print_exception(error)
        _report(f"{' '.join(overrides)}: {result.error}")
        return None  # which a search takes for a failure; NaN would stop it


def explain_composed(error: Exception) -> str:
    """Return the line for an error outside of a job, when Hydra is no longer initialised."""
    from hydra import initialize_config_dir
    from hydra._internal.utils import get_args_parser
    from hydra.core.global_hydra import GlobalHydra

    # hydra.main parses the command line itself, and gives no access to it when composing fails. Its
    # parser is private; tests/app/test_cli.py fails if it disappears.
    typed = get_args_parser().parse_args(sys.argv[1:])
    overrides = list(typed.overrides)
    if typed.config_dir:
        overrides.append(f"hydra.searchpath=[{Path(typed.config_dir).absolute().as_uri()}]")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return explain(error, overrides)


def _report(line: str) -> None:
    print(f"error: {line} ({FULL_ERROR}=1 shows the traceback)", file=sys.stderr)


if __name__ == "__main__":
    main()
