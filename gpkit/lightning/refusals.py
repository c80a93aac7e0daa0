"""Refusals: all that keeps penalties or norms from a fit, told at once, in one line."""

from __future__ import annotations

from collections.abc import Iterable


class RefusalError(ValueError):
    """A fit that was refused.

    Args:
        title: what cannot be done.
        found: a line for each finding.
    """

    def __init__(self, title: str, found: list[str]) -> None:
        super().__init__(title, found)
        self.title = title
        self.found = found

    def __str__(self) -> str:
        return f"{self.title}: {'; '.join(self.found)}"


def refuse(title: str, found: Iterable[str], cause: Exception | None = None) -> None:
    """Refuse a fit with all that was found, if there is any.

    Args:
        title: what cannot be done.
        found: a line for each finding; the same line is told once.
        cause: the error that led to it, if one did.

    Raises:
        RefusalError: in one line.
    """
    lines = list(dict.fromkeys(found))
    if lines:
        raise RefusalError(title, lines) from cause
