"""What `gpkit.check_penalty` found: one line for each check."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One check of a penalty.

    Args:
        found: what was measured; or why it was not checked.
        passed: whether it passed; None if it was not checked.
        cause: the likely cause of a failure, and what to do.
        name: the name of the check.
    """

    found: str
    passed: bool | None = True
    cause: str = ""
    name: str = ""

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAILED", None: "not checked"}[self.passed]
        line = f"{self.name:<13} {mark:<11} {self.found}"
        return f"{line}\n{'':<13} {'':<11} -> {self.cause}" if self.cause else line


@dataclass(frozen=True)
class PenaltyReport:
    """The checks of a penalty, in the order in which they ran.

    Args:
        checks: one for each property.
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> dict[str, Check]:
        """The checks that failed, by name."""
        return {c.name: c for c in self.checks if c.passed is False}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


class PenaltyError(RuntimeError):
    """A penalty failed a check.

    Args:
        report: all checks.
    """

    def __init__(self, report: PenaltyReport) -> None:
        count, total = len(report.failures), len(report.checks)
        shown = "\n".join(map(str, report.failures.values()))
        super().__init__(f"the penalty failed {count} of {total} checks:\n{shown}")
        self.report = report


def failed(found: str, cause: str) -> Check:
    """Return a check that failed."""
    return Check(found, False, cause)


def unchecked(why: str) -> Check:
    """Return a check that could not be made."""
    return Check(why, None)
