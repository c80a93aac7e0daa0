"""Which files of gpkit a call goes through, in order.

    python docs/walk.py [checkout]

It follows three calls, each of them twice, because the first one does some work once: an input
penalty, a weight penalty, and the training step of a small Lightning fit with a callback. Imports
and constructors are left out.

A file is entered when one of its functions is called from another file of gpkit; code of other
libraries in between is skipped. Returning into a file, or resuming a generator, is not an entry. An
entry is a way back, marked "<", if a call in that file is already running further up. A line is
indented by the number of files that are running; "x3" means three entries in a row.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
import warnings
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """That a function is called from another file."""

    depth: int  # of changes of file that are under way
    file: str
    function: str
    back: bool


class Walk:
    """Follows one call.

    Args:
        package: the folder of the package.
    """

    def __init__(self, package: Path) -> None:
        self.package = f"{package}/"
        self.entries: list[Entry] = []
        self._base: FrameType | None = None
        self._generators: set[FrameType] = set()

    def follow(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make the call, and return what it gives."""
        self._base = sys._getframe()
        sys.setprofile(self._event)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(None)
            self._base = None
            self._generators.clear()

    def _file(self, frame: FrameType) -> str | None:
        """Return the file of a frame, or None if it is not the package's."""
        path = frame.f_code.co_filename
        return path.removeprefix(self.package) if path.startswith(self.package) else None

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        """Take in what Python does, if it is an entry."""
        file, code = self._file(frame), frame.f_code
        if event != "call" or file is None or code.co_name == "<genexpr>":
            return
        if code.co_flags & inspect.CO_GENERATOR:
            if frame in self._generators:
                return  # it goes on
            self._generators.add(frame)
        under_way, above = [frame], frame.f_back
        while above is not None and above is not self._base:
            under_way.append(above)
            above = above.f_back
        if any(f.f_code.co_name == "<module>" for f in under_way):
            return  # an import
        files = [name for f in under_way[1:] if (name := self._file(f))]  # the caller's first
        if files[:1] != [file]:
            depth = sum(1 for _ in groupby(files))
            function = getattr(code, "co_qualname", code.co_name)  # full from Python 3.11 on
            self.entries.append(Entry(depth, file, function, file in files))


def calls(package: Path) -> dict[str, list[Walk]]:
    """Make the calls, and return the walks of each, in order."""
    import pytorch_lightning as pl
    import torch
    from pytorch_lightning.demos.boring_classes import BoringModel
    from pytorch_lightning.strategies import SingleDeviceStrategy

    import gpkit

    if Path(gpkit.__file__).parent != package:
        sys.exit(f"gpkit is {gpkit.__file__}, not {package}")
    inputs, weights, steps = [Walk(package) for _ in "12"], [Walk(package) for _ in "12"], []
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    real, fake = torch.randn(4, 2), torch.randn(4, 2)

    penalty = gpkit.wgan_gp()
    for walk in inputs:
        walk.follow(penalty, net, real=real, fake=fake)
    penalty = gpkit.weight_grad_norm()
    for walk in weights:
        walk.follow(penalty, net(real).square().mean(), list(net.parameters()))

    class Followed(SingleDeviceStrategy):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            steps.append(Walk(package))
            return steps[-1].follow(super().training_step, *args, **kwargs)

    penalty = gpkit.weight_grad_norm(weight=0.1, estimator="finite_difference")
    callback, device = gpkit.GradientPenaltyCallback(penalty), torch.device("cpu")
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    plain = {"max_steps": 2, "limit_val_batches": 0, **dict.fromkeys(quiet, False)}
    pl.Trainer(strategy=Followed(device), callbacks=[callback], **plain).fit(BoringModel())
    return {
        "gpkit.wgan_gp()(critic, real=real, fake=fake)": inputs,
        "gpkit.weight_grad_norm()(loss, params)": weights,
        "the training step, with a GradientPenaltyCallback by finite differences": steps,
    }


if __name__ == "__main__":
    raw, here = argparse.RawDescriptionHelpFormatter, Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("checkout", nargs="?", type=Path, default=here, help="its root")
    root = parser.parse_args().checkout.resolve()
    sys.path.insert(0, str(root))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for title, walks in calls(root / "gpkit").items():
        for time, walk in zip(("first", "second"), walks, strict=True):
            entries, backs = walk.entries, sum(entry.back for entry in walk.entries)
            files = len({entry.file for entry in entries})
            print(f"{title}, {time} time: {files} files, {len(entries)} entries, {backs} ways back")
            for entry, same in groupby(entries):
                place = "  " * entry.depth + entry.file
                times = f"  x{n}" if (n := len(list(same))) > 1 else ""
                print(f"  {'<' if entry.back else ' '} {place:<48}{entry.function}{times}")
            print()
