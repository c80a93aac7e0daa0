"""Refusals of what the modules and callbacks are given, and one error for all findings of a fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gpkit.finding import Finding

# Titles of the errors of the two callbacks.
CALLBACK_REFUSAL = "GradientPenaltyCallback cannot add its penalties"
MONITOR_REFUSAL = "GradientNormMonitor cannot log its norms"


class RefusalError(ValueError):
    """A fit cannot start, or cannot go on after its first step, for all the reasons in ``found``.

    Args:
        title: what cannot be done.
        found: one line for each finding.
        findings: those of them that a check has found, as `gpkit.diagnose` reports them.
    """

    def __init__(self, title: str, found: list[str], findings: tuple[Finding, ...] = ()) -> None:
        super().__init__(title, found, findings)
        self.title = title
        self.found = found
        self.findings = findings

    def __str__(self) -> str:
        return f"{self.title}: {'; '.join(self.found)}"


def refuse(title: str, found: Iterable[Finding | str], cause: Exception | None = None) -> None:
    """Raise one error for all findings; do nothing if there are none.

    Args:
        title: what cannot be done.
        found: findings, or a line for each. Repeated ones are dropped.
        cause: an error that led to the findings, if any.

    Raises:
        RefusalError: if there is a finding. Its message is a single line.
    """
    each: dict[str, Finding | str] = {}
    for one in found:
        each.setdefault(_line(one), one)
    if each:
        findings = tuple(f for f in each.values() if isinstance(f, Finding))
        raise RefusalError(title, list(each), findings) from cause


def _line(found: Finding | str) -> str:
    named = isinstance(found, Finding) and found.penalty
    return f"penalty {named!r}: {found}" if named else str(found)


def require_functions(**functions: Any) -> None:
    """Check that optimisers and schedulers are functions that create them.

    Args:
        **functions: by argument name; names that end in "scheduler" take an optimiser, the others
            parameters.

    Raises:
        TypeError: if one of them is neither None nor callable.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            given = "an optimiser" if name.endswith("scheduler") else "parameters"
            example = (
                "ExponentialLR, gamma=0.999" if name.endswith("scheduler") else "Adam, lr=1e-4"
            )
            raise TypeError(
                f"`{name}=...` must be a function of {given}, such as "
                f"functools.partial({example}); got {function!r}"
            )
