"""The base of every data module: it owns the data loaders."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gpkit import checks


class DataModule(pl.LightningDataModule):
    """Data loaders over three map-style data sets of pairs (x, y).

    A subclass gives `datasets`, which returns the three and sets the attributes below. Batches are
    x float32 [B, *input_shape] and y int64 [B] (classification) or float32 [B, num_outputs]
    (regression). The order of the training batches comes from a generator that `setup("fit")` seeds
    with `seed` and that checkpoints keep, so that a run that goes on sees the same batches as one
    that was never stopped.

    Attributes:
        input_shape: The shape of one x.
        num_outputs: The number of classes, or of regression targets.
        task: "classification" or "regression".

    Args:
        batch_size: The samples of a batch; the last one of an epoch may be smaller.
        num_workers: The processes that load data; 0 loads in the main process.
        seed: Seeds the split, the noise and the order.

    Raises:
        ValueError: If an option is out of range.
    """

    input_shape: tuple[int, ...]
    num_outputs: int
    task: str

    def __init__(self, *, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        """Keep the options; the data is loaded by `setup`."""
        super().__init__()
        owner = type(self).__name__
        self.batch_size = checks.integer(f"{owner}(batch_size=...)", batch_size, 1)
        self.num_workers = checks.integer(f"{owner}(num_workers=...)", num_workers, 0)
        self.seed = checks.integer(f"{owner}(seed=...)", seed, 0)
        self.order = torch.Generator().manual_seed(seed)
        self._sets: tuple[Dataset, Dataset, Dataset] | None = None

    def datasets(self) -> tuple[Dataset, Dataset, Dataset]:
        """Return the train, validation and test sets; an empty one means that there is none."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load the data, once."""
        if self._sets is None:
            self._sets = self.datasets()
        if stage in ("fit", None):
            self.order.manual_seed(self.seed)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training set, which shuffles."""
        return self._loader(self._loaded()[0], shuffle=True, generator=self.order)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the loader of the validation set, or [] when there is none."""
        return self._loader_unless_empty(self._loaded()[1])

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the loader of the test set, or [] when there is none."""
        return self._loader_unless_empty(self._loaded()[2])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the order, for a checkpoint."""
        return {"order": self.order.get_state()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Go on with the order of a checkpoint."""
        self.order.set_state(state_dict["order"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        """Give the order as an array: a spawned process cannot unpickle a generator."""
        return {**self.__dict__, "order": self.order.get_state().numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the generator anew."""
        self.__dict__.update(state, order=torch.Generator())
        self.order.set_state(torch.from_numpy(state["order"]))

    def _loaded(self) -> tuple[Dataset, Dataset, Dataset]:
        if self._sets is None:
            raise RuntimeError(
                f"`{type(self).__name__}` must be set up before its loaders are asked for; "
                'call `setup("fit")` first'
            )
        return self._sets

    def _loader(self, dataset: Dataset, **options: Any) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )

    def _loader_unless_empty(self, dataset: Dataset) -> DataLoader | list[DataLoader]:
        return self._loader(dataset) if len(cast(Sized, dataset)) else []
