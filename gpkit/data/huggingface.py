"""Any data set of the `datasets` library, by its name on the hub or from local files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gpkit import checks
from gpkit.data.decoders import Classes, Decoder, Numbers, Pictures, Rows
from gpkit.data.module import DataModule
from gpkit.data.splits import Size, split, split_sizes

TARGET_KEYS = ("label", "labels", "target", "y")


ALIASES = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}


class HuggingFace(DataModule):
    """A data set of images or of numeric columns, with classes or values to predict.

    A row is read and decoded when a batch needs it; only the labels are read all at once. Images
    become ``[C, H, W]``, float32; columns of numbers are concatenated. Labels that are not a
    `ClassLabel` (strings, integers) become classes in sorted order, over all parts.

    Args:
        path: a name on the hub, or a format of local files: parquet, csv, json, imagefolder.
        name: the configuration, for a data set that has several.
        data_files: local files, or a dict from the name of a part to its files.
        data_dir: a local folder.
        train_split: the name of the training part.
        val_split: the name of the validation part. None takes the one that exists; if there is
            none, it is cut from the training part (stratified).
        test_split: the name of the test part; None as for ``val_split``.
        val_size: the size of a validation part that is cut from the training part: a count, or a
            fraction of it.
        test_size: the size of a test part that is cut from the training part.
        input_key: the column of x, or several columns; None takes the image, or all numeric
            columns.
        target_key: the column of y; None takes the `ClassLabel`, or label, labels, target or y.
        image_size: the side, or the height and width, that images are resized to; None keeps
            theirs.
        grayscale: whether images have one channel; None takes the channels of the first image.
        normalise: whether images lie in [-1, 1] instead of [0, 1], and whether numeric columns and
            regression targets are standardised with the statistics of the training part.
        task: "classification" or "regression"; None is a regression for floats only.
        batch_size: the number of samples of a batch.
        num_workers: the number of processes that load data; 0 loads in the main process.
        seed: of the cut and the order.

    Attributes:
        class_names: the names of the classes, in order; empty for a regression.

    Raises:
        ModuleNotFoundError: if `datasets` is not installed.
        ValueError: if an option is out of its range, or (from ``setup``) does not fit the data.
    """

    class_names: list[str]

    def __init__(
        self,
        path: str,
        name: str | None = None,
        data_files: str | Sequence[str] | dict[str, Any] | None = None,
        data_dir: str | None = None,
        *,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        val_size: Size = 0.15,
        test_size: Size = 0.15,
        input_key: str | Sequence[str] | None = None,
        target_key: str | None = None,
        image_size: int | Sequence[int] | None = None,
        grayscale: bool | None = None,
        normalise: bool = True,
        task: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if task is not None:
            checks.choice("HuggingFace(task=...)", task, ("classification", "regression"))
        _library()
        self.source = {
            "path": path, "name": name, "data_files": data_files, "data_dir": data_dir
        }  # fmt: skip
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.val_size = val_size
        self.test_size = test_size
        self.input_key = input_key
        self.target_key = target_key
        self.image_size = _height_width(image_size)
        self.grayscale = grayscale
        self.normalise = normalise
        self.given_task = task

    def prepare_data(self) -> None:
        """Download the data, or convert local files, once on each node."""
        _library().load_dataset(**self.source)

    def datasets(self) -> tuple[Dataset, Dataset, Dataset]:
        """Choose the parts, the columns, and their decoders.

        Returns:
            The train, validation and test sets.

        Raises:
            ValueError: if an option does not fit the data set.
        """
        parts = self._parts(_library().load_dataset(**self.source))
        features = parts["train"].features
        target = self._target(features)
        inputs = self._inputs(features, target)
        self.task = self._task(target, features[target])

        decode_y: Decoder
        if self.task == "classification":
            decode_y = classes = self._classes(parts, target)
            self._cut(parts, strata=classes({target: list(parts["train"][target])}))
        else:
            self._cut(parts, strata=torch.zeros(len(parts["train"])))
            decode_y = self._numbers(parts["train"], [target])
            self.class_names = []
        is_image = _kind(features[inputs[0]]) == "Image"
        decode_x = (self._pictures if is_image else self._numbers)(parts["train"], inputs)

        columns = list(dict.fromkeys([*inputs, target]))
        train, val, test = (
            Rows(parts[part].select_columns(columns), decode_x, decode_y)
            for part in ("train", "val", "test")
        )
        x, y = train[0]
        self.input_shape = tuple(x.shape)
        self.num_outputs = len(self.class_names) or y.numel()
        return train, val, test

    def _parts(self, tables: Any) -> dict[str, Any]:
        """Find the parts that exist; None is one that will be cut."""
        names = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        for part, name in names.items():
            if name is None:
                names[part] = next((alias for alias in ALIASES[part] if alias in tables), None)
            else:
                checks.choice(f"HuggingFace({part}_split=...)", name, tables)
        return {part: None if name is None else tables[name] for part, name in names.items()}

    def _cut(self, parts: dict[str, Any], strata: Tensor) -> None:
        """Cut the parts that are None from the training part."""
        val_size = self.val_size if parts["val"] is None else 0
        test_size = self.test_size if parts["test"] is None else 0
        whole = parts["train"]
        counts = split_sizes("HuggingFace", len(whole), None, val_size, test_size)
        generator = torch.Generator().manual_seed(self.seed)
        for part, indices in zip(parts, split(strata, counts, generator), strict=True):
            if part == "train" or parts[part] is None:
                parts[part] = whole.select(indices.tolist())

    def _target(self, features: Any) -> str:
        """Find the column of y."""
        if self.target_key is not None:
            return checks.choice("HuggingFace(target_key=...)", self.target_key, features)
        labels = [key for key, feature in features.items() if _kind(feature) == "ClassLabel"]
        named = [key for key in TARGET_KEYS if key in features]
        if len(labels) == 1 or named:
            return labels[0] if len(labels) == 1 else named[0]
        raise ValueError(
            "`HuggingFace(target_key=None)` found neither one ClassLabel nor a column called "
            f"{', '.join(TARGET_KEYS)}: set target_key to one of {', '.join(features)}"
        )

    def _inputs(self, features: Any, target: str) -> list[str]:
        """Find the columns of x: one image, or columns of numbers."""
        keys = [self.input_key] if isinstance(self.input_key, str) else list(self.input_key or ())
        if keys:
            others = [key for key in features if key != target]  # the target must not be an input
            keys = [checks.choice("HuggingFace(input_key=...)", key, others) for key in keys]
        else:
            images = [key for key, feature in features.items() if _kind(feature) == "Image"]
            scalars = [key for key, feature in features.items() if _kind(feature) == "Value"]
            keys = images or [key for key in scalars if key != target and _numeric(features[key])]
        alone = len(keys) == 1 and _kind(features[keys[0]]) == "Image"
        if not keys or not (alone or all(_numeric(features[key]) for key in keys)):
            found = ", ".join(
                f"{key}: {feature.dtype if _kind(feature) == 'Value' else _kind(feature)}"
                for key, feature in features.items()
            )
            raise ValueError(
                f"`HuggingFace(input_key={self.input_key!r})` must be one image column, or columns "
                f"of numbers; choose from {found}"
            )
        return keys

    def _task(self, target: str, feature: Any) -> str:
        """Check the task against the type of the target, or infer it."""
        numeric = "regression" if _numeric(feature) else ""
        discrete = "classification" if _kind(feature) in ("ClassLabel", "Value") else ""
        is_float = "float" in str(getattr(feature, "dtype", ""))
        fitting = [task for task in sorted((discrete, numeric), reverse=is_float) if task]
        if not fitting or self.given_task not in (None, *fitting):
            raise ValueError(
                f"`HuggingFace(target_key={target!r}, task={self.given_task!r})` must be a column "
                f"that fits the task; got {feature}: choose another column"
                + (f" or task={fitting[0]!r}" if fitting else "")
            )
        return self.given_task or fitting[0]

    def _classes(self, parts: dict[str, Any], target: str) -> Classes:
        """Number the classes: as a ClassLabel does, or in sorted order."""
        tables = [table for table in parts.values() if table is not None]
        found = set().union(*(table.unique(target) for table in tables))
        feature = parts["train"].features[target]
        named = _kind(feature) == "ClassLabel"
        if None in found or (named and not found <= set(range(feature.num_classes))):
            raise ValueError(
                f"`HuggingFace(target_key={target!r})` needs a label in every row, but some have "
                "none: choose parts with labels by train_split, val_split and test_split"
            )
        if not named and self.given_task is None and 2 * len(found) > len(parts["train"]):
            raise ValueError(
                f"`HuggingFace(target_key={target!r}, task=None)` needs a column of few values; "
                f"got {len(found)} in {len(parts['train'])} rows: set task, or another target_key"
            )
        values = range(feature.num_classes) if named else sorted(found)
        self.class_names = list(feature.names) if named else [str(value) for value in values]
        return Classes(target, tuple(values))

    def _numbers(self, table: Any, keys: Sequence[str]) -> Numbers:
        """Return a decoder of numbers; with ``normalise`` by the statistics of this table."""
        raw = Numbers(tuple(keys))
        if not self.normalise:
            return raw
        columns = table.select_columns(list(keys))
        return raw.standardised(lambda: columns.iter(batch_size=1024), len(columns))

    def _pictures(self, table: Any, keys: Sequence[str]) -> Pictures:
        """Return a decoder of images; the first image decides what the options leave open."""
        (key,) = keys
        first = table[0][key]
        gray = first.mode in ("1", "L", "LA") or first.mode.startswith("I;16")
        mode = "L" if (gray if self.grayscale is None else self.grayscale) else "RGB"
        size = self.image_size or (first.height, first.width)
        return Pictures(key, mode, size, resize=self.image_size is not None, centre=self.normalise)


def _library() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ModuleNotFoundError(
            "`HuggingFace` needs the datasets library; run pip install 'gradpen[data]'",
            name="datasets",
        ) from None
    return datasets


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _numeric(feature: Any) -> bool:
    while hasattr(feature, "feature"):  # the elements of a list
        feature = feature.feature
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "float", "bool"))


def _height_width(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(
            f"`HuggingFace(image_size={size!r})` must be a side >= 1 or a height and a width, as "
            "32 or [32, 32]"
        )
    return sides[0], sides[1]
