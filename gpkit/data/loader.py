"""A data loader that goes on in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader


class ResumableLoader(DataLoader):
    """A `DataLoader` whose state says where it is in its epoch. Lightning saves it in checkpoints.

    After `load_state_dict` the next epoch is the one that was interrupted: it has the same order,
    and starts after the batches that were already used. The order comes from ``generator``, and
    nothing else does: the seeds of workers come from a generator of their own. Without a
    generator, such as under a distributed sampler, the batches that were used are skipped.

    >>> from torch.utils.data import TensorDataset
    >>> def loader():
    ...     data = TensorDataset(torch.arange(6))
    ...     return ResumableLoader(data, 2, shuffle=True, generator=torch.Generator())
    >>> first, batches = loader(), []
    >>> for batch in first:
    ...     batches.append(batch[0].tolist())
    ...     if len(batches) == 1:
    ...         state = first.state_dict()
    >>> again = loader()
    >>> again.load_state_dict(state)
    >>> [batch[0].tolist() for batch in again] == batches[1:]
    True
    """

    _order: torch.Generator | None = None
    _start: torch.Tensor | None = None  # the state of the generator at the start of the epoch
    _used = 0
    _skip = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._order = self.generator
        # The sampler has the generator. The iterator would draw the seed of workers from it too,
        # once for each iterator, and so a resumed run would have another order.
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        skip, self._skip = self._skip, 0
        if self._order is not None:
            self._start = self._order.get_state()
        self._used = skip
        for batch in islice(super().__iter__(), skip, None):
            self._used += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the batches used in this epoch, and the state of the order at its start."""
        if self._used < len(self):
            return {"used": self._used, "order": self._start}
        return {"used": 0, "order": None if self._order is None else self._order.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next epoch go on where a state was taken."""
        self._skip = state_dict["used"]
        if self._order is not None and state_dict["order"] is not None:
            self._order.set_state(state_dict["order"].cpu())
