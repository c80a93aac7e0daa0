"""Finding: what is wrong with a net and a penalty, for errors, warnings and `gpkit.doctor`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SEVERITIES = ("error", "warning", "note")

# Every code, and what it stands for. docs/doctor.md has this table.
CODES = {
    "no-double-backward": "an operation that is differentiated twice has no second derivative",
    "once-differentiable": "a custom autograd Function is marked @once_differentiable",
    "compiled": "a compiled module is differentiated twice",
    "reentrant-checkpoint": "a module is checkpointed with use_reentrant=True",
    "wrong-derivative": "torch has a derivative, and it is wrong",
    "not-finite": "the penalty, its gradient or the output is NaN or infinite",
    "piecewise-linear": "order >= 2 of a piecewise-linear net, which is zero everywhere",
    "untrained": "the penalty depends on no trained parameter",
    "frozen": "parameters that do not require grad",
    "partial-gradient": "a layer on the way has a gradient of the loss and none of the penalty",
    "untracked": "a module with trained parameters runs without gradients, and nothing trains it",
    "reached": "which parameters the penalty trains, and which get no gradient of it",
    "tied": "a parameter that two modules share",
    "coupled-samples": "the output of one sample depends on the others",
    "random-forward": "two evaluations of the net differ",
    "in-place": "a module writes to its input, or to a tensor that a derivative needs",
    "integer-input": "a penalty in the input of samples that are not floating-point",
    "mean-loss": "an input penalty of a loss that is averaged over the batch",
    "biased-estimate": "a form that is not linear in n², of a random estimate of n²",
    "zero": "the penalty is zero at the start",
    "strength": "how the penalty's gradient compares with the loss's, and which weight to try",
    "convention": "a factor by which published code differs",
    "float16-underflow": "the inner gradient is too small for float16",
    "cost": "the time and memory of a training step, in steps without the penalty",
    "memory-freed": "a tensor or a graph that a derivative needs was freed",
    "trainer": "the trainer, its strategy or the module does not take the penalty, or the monitor",
    "call": "the penalty cannot be called with the example",
}


@dataclass(frozen=True)
class Finding:
    """One thing that a check has found.

    Args:
        code: a key of ``CODES``.
        severity: "error": training would stop, or train on a wrong gradient; "warning": it runs,
            and is probably not what was meant; "note": good to know.
        why: what was found, and why it matters.
        fix: what to do; "" if there is nothing to do.
        module: the name of the module in the net; "" if it is no single one.
        penalty: the name of the penalty; "" if it is about all.

    Raises:
        ValueError: if there is no such code or severity.
    """

    code: str
    severity: str
    why: str
    fix: str = ""
    module: str = ""
    penalty: str = ""

    def __post_init__(self) -> None:
        if self.code not in CODES or self.severity not in SEVERITIES:
            raise ValueError(f"no such finding: {self.severity} {self.code!r}")

    def __str__(self) -> str:
        return f"{self.why}: {self.fix}" if self.fix else self.why

    def to_dict(self) -> dict[str, str]:
        """Return plain strings, for JSON."""
        return asdict(self)


def error(code: str, said: str) -> Finding:
    """Return an error whose words are "why: fix"."""
    why, _, fix = said.partition(": ")
    return Finding(code, "error", why, fix)


class FoundError(RuntimeError):
    """An error that a finding explains.

    Args:
        finding: why.
        message: its line, if it is not that of the finding.
    """

    def __init__(self, finding: Finding, message: str = "") -> None:
        super().__init__(message or str(finding))
        self.finding = finding

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle, as for another process, as an error of this class."""
        return FoundError, (self.finding, str(self))


class FoundWarning(UserWarning):
    """A warning that a finding explains."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the finding."""
        return FoundWarning, (self.finding,)
