"""The base class of every data module: it makes the data loaders."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from gpkit import checks
from gpkit.data.loader import ResumableLoader


class DataModule(pl.LightningDataModule):
    """Data loaders over three map-style data sets of pairs (x, y).

    A subclass has one method, `datasets`, which returns the three data sets and sets the attributes
    below. A batch is x ``[B, *input_shape]``, float32, and y: classes ``[B]``, int64, or values
    ``[B, num_outputs]``, float32. The order of the training batches comes from a generator of its
    own: ``setup("fit")`` seeds it, and checkpoints keep its state, so a run that resumes sees the
    same batches as one that was never stopped, also from the middle of an epoch.

    Args:
        batch_size: the number of samples of a batch; the last batch of an epoch may be smaller.
        num_workers: the number of processes that load data; 0 loads in the main process.
        seed: of the split, the noise and the order.

    Attributes:
        input_shape: the shape of one x.
        num_outputs: the number of classes, or of values to predict.
        task: "classification" or "regression".
        passes: how often an epoch goes over the training set. A subclass for so few samples that a
            batch has all of them sets it, since an epoch of one step is mostly overhead.

    Raises:
        ValueError: if an option is out of its range.
    """

    input_shape: tuple[int, ...]
    num_outputs: int
    task: str
    passes: int = 1

    def __init__(self, *, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        owner = type(self).__name__
        self.batch_size = checks.integer(f"{owner}(batch_size=...)", batch_size, 1)
        self.num_workers = checks.integer(f"{owner}(num_workers=...)", num_workers, 0)
        self.seed = checks.integer(f"{owner}(seed=...)", seed, 0)
        self.order = torch.Generator().manual_seed(seed)
        self._sets: tuple[Dataset, Dataset, Dataset] | None = None

    def datasets(self) -> tuple[Dataset, Dataset, Dataset]:
        """Return the train, validation and test sets; the last two may be empty."""
        raise NotImplementedError(f"{type(self).__name__} must define datasets()")

    def setup(self, stage: str | None = None) -> None:
        """Load the data, once."""
        if self._sets is None:
            self._sets = self.datasets()
        if stage in ("fit", None):
            self.order.manual_seed(self.seed)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of the training set; it shuffles."""
        dataset, order = self._loaded()[0], self.order
        if self.passes == 1:
            return self._loader(dataset, ResumableLoader, shuffle=True, generator=order)
        count = self.passes * len(cast(Sized, dataset))
        sampler = RandomSampler(cast(Sized, dataset), num_samples=count, generator=order)
        return self._loader(dataset, ResumableLoader, sampler=sampler, generator=order)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the loader of the validation set, or [] if the set is empty."""
        return self._loader_unless_empty(self._loaded()[1])

    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Return the loader of the test set, or [] if the set is empty."""
        return self._loader_unless_empty(self._loaded()[2])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the generator of the order, for a checkpoint."""
        return {"order": self.order.get_state()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Restore the state of the generator of the order."""
        self.order.set_state(state_dict["order"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        """Store the generator as an array: a spawned process cannot load a generator."""
        return {**self.__dict__, "order": self.order.get_state().numpy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a generator with the stored state."""
        self.__dict__.update(state, order=torch.Generator())
        self.order.set_state(torch.from_numpy(state["order"]))

    def _loaded(self) -> tuple[Dataset, Dataset, Dataset]:
        if self._sets is None:
            raise RuntimeError(
                f"`{type(self).__name__}` must be set up before its loaders are used; "
                'call `setup("fit")` first'
            )
        return self._sets

    def _loader(self, dataset: Dataset, kind: Any = DataLoader, **options: Any) -> DataLoader:
        # An iterator draws a seed for its workers. From the global random numbers, a resumed run,
        # which makes new iterators, would have others than one that was never stopped.
        options.setdefault("generator", torch.Generator())
        return kind(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=getattr(dataset, "collate", None),
            **options,
        )

    def _loader_unless_empty(self, dataset: Dataset) -> DataLoader | list[DataLoader]:
        return self._loader(dataset) if len(cast(Sized, dataset)) else []
