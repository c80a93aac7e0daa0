"""A command line in this process, and a process that is gone, for tests of the application."""

import logging
import subprocess
import sys

import pytest
from hydra.core.global_hydra import GlobalHydra

from gpkit.app.cli import main


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run a command line in an empty folder; return the exit code, the output and the errors."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    for name in ("HYDRA_FULL_ERROR", "GPKIT_ONE_LINE_ERRORS"):
        monkeypatch.setenv(name, "0")  # so that monkeypatch puts back what main sets
        monkeypatch.delenv(name)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()

    yield run
    GlobalHydra.instance().clear()
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers = handlers


@pytest.fixture(scope="session")
def dead():
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
