"""Runs every result of docs/results.md again, and compares it: ``python -m gpkit.reproduce``.

``row`` says what a result is, ``rows`` lists them all, ``run`` makes their runs, each row a sweep
of the application over seeds, and ``shown`` prints and writes the table. ``modified_flow`` is the
one result that is no training.

To add one: an experiment in ``configs/experiment/``, and a row in ``rows``.
"""

from gpkit.reproduce.row import Number, Row

__all__ = ["Number", "Row"]
