"""Build the data module of a config, and check what a run needs of it."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any, cast

import pytorch_lightning as pl
import torch
from hydra import compose
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from gpkit.app.build import below, build_module, recipe, trains_pair
from gpkit.app.overrides import check_types, set_keys, signature_of
from gpkit.app.settings import check_values, quiet

# What a run may need of a data module beside its loaders, and what it is.
CONTRACT = {
    "input_shape": "the shape of one x, as (1, 8, 8)",
    "num_outputs": "the number of classes, or of values to predict",
    "task": '"classification" or "regression", which chooses the loss (or give loss._target_)',
}


def build_data(cfg: DictConfig, chosen: set[str]) -> pl.LightningDataModule:
    """Return the data module, set up. A class of the user's own gets those options that it takes.

    Args:
        cfg: the composed config.
        chosen: the keys that the user set, such as ``{"data.batch_size"}``; the class must take
            these.

    Raises:
        TypeError: if the target gives no data module.
        ValueError: if an option must be given, or the data lack what the run needs, or are empty.
    """
    for key in sorted(OmegaConf.missing_keys(cfg.data)):
        raise ValueError(f"{key} must be given: {key}=...")
    plain = OmegaConf.create(OmegaConf.to_container(cfg.data, resolve=True))
    assert isinstance(plain, DictConfig)
    data = instantiate(OmegaConf.create(recipe(plain, {}, below("data", chosen))))
    if not isinstance(data, pl.LightningDataModule):
        raise TypeError(
            f"data._target_={cfg.data._target_} must give a pytorch_lightning.LightningDataModule; "
            f"got a {type(data).__name__}"
        )
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    _require_contract(cfg, data)
    loader = loader_of(data, "train")
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, Sized) and not len(dataset):
        raise ValueError(f"{type(data).__name__}: the training set is empty: give it samples")
    if isinstance(loader, Sized) and _has_length(loader) and not len(loader):
        raise ValueError(
            f"{type(data).__name__}: the training set has {_count(dataset)} samples, fewer than a "
            "batch, and drop_last leaves none: use a smaller data.batch_size"
        )
    return data


def built(overrides: Sequence[str]) -> tuple[DictConfig, Any, Any]:
    """Return the config of overrides, its data, set up, and its module, not trained.

    Args:
        overrides: as for ``train.py``, where Hydra is initialised.
    """
    cfg = compose("train", list(overrides), return_hydra_config=True)
    with open_dict(cfg):
        del cfg["hydra"]
    check_types(cfg, list(overrides))
    check_values(cfg)
    quiet()
    torch.manual_seed(cfg.seed or 0)
    chosen = set_keys(overrides)
    data = build_data(cfg, chosen)
    return cfg, data, build_module(cfg, data, chosen)


def loader_of(data: pl.LightningDataModule, stage: str) -> Any:
    """Return the loader of train, val, test or predict; None without one, or if it is empty."""
    name = f"{stage}_dataloader"
    inherited = getattr(type(data), name) is getattr(pl.LightningDataModule, name)
    loader = None if inherited and name not in vars(data) else getattr(data, name)()
    empty = stage != "train" and isinstance(loader, Sized) and _has_length(loader)
    return None if empty and not len(cast(Sized, loader)) else loader


def loader_of_task(cfg: DictConfig, data: pl.LightningDataModule) -> Any:
    """Return the loader of the samples that a run tests, or predicts; None if there is none.

    Of ``task=predict`` it is the data's ``predict_dataloader()``, or the test set.

    Raises:
        ValueError: if the task is to test or to predict, and there is none.
    """
    own = loader_of(data, "predict") if cfg.task == "predict" else None
    loader = loader_of(data, "test") if own is None else own
    if loader is None and cfg.task != "train":
        also = " or predict_dataloader()" * (cfg.task == "predict")
        raise ValueError(
            f"task={cfg.task}: {type(data).__name__} has no test set: give it test_dataloader()"
            f"{also}, or data.test_size > 0"
        )
    return loader


def batches_of(cfg: DictConfig, data: pl.LightningDataModule) -> int:
    """Return the number of batches of an epoch.

    Raises:
        ValueError: if the training set has no length, and no limit is set.
    """
    loader = loader_of(data, "train")
    if _has_length(loader):
        return len(loader)
    limit = cfg.trainer.get("limit_train_batches")
    if isinstance(limit, int):
        return limit
    raise ValueError(
        f"{type(data).__name__}: the training set has no length: give the batches of an epoch, "
        "+trainer.limit_train_batches=100"
    )


def sizes(data: pl.LightningDataModule) -> str:
    """Return the sizes of the training, validation and test set."""
    loaders = {stage: loader_of(data, stage) for stage in ("train", "val", "test")}
    sets = {
        stage: loader.dataset for stage, loader in loaders.items() if hasattr(loader, "dataset")
    }
    return ", ".join(f"{_count(dataset)} {stage}" for stage, dataset in sets.items())


def _count(dataset: Any) -> str:
    return f"{len(dataset):,}" if isinstance(dataset, Sized) else "?"


def _has_length(loader: Any) -> bool:
    try:
        len(loader)
    except TypeError:  # of an iterable data set; the loader has the method, and asks the data set
        return False
    return True


def _require_contract(cfg: DictConfig, data: pl.LightningDataModule) -> None:
    """Ask for everything that the run needs and the data module lacks, at once."""
    needed = ["train_dataloader()"] if loader_of(data, "train") is None else []
    if trains_pair(cfg):
        names = ["input_shape", *(["num_outputs", "task"] if cfg.module.get("conditional") else [])]
    else:
        taken = signature_of(get_object(cfg.model._target_))
        names = [n for n in ("input_shape", "num_outputs") if n in taken and n not in cfg.model]
        names += ["task"] if cfg.loss._target_ is None else []
    missing = [f"{name}: {CONTRACT[name]}" for name in names if not hasattr(data, name)]
    if needed or missing:
        raise ValueError(
            f"data._target_={cfg.data._target_} lacks {'; '.join([*needed, *missing])}. Set them "
            "in __init__ or setup"
        )
