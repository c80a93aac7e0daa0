"""Build the module, its nets, and the callbacks from a config."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from torch import nn

from gpkit.app.overrides import signature_of
from gpkit.lightning.monitor import GradientNormMonitor

PAIR = ("generator", "critic")


def build_module(cfg: DictConfig, data: Any, chosen: set[str]) -> pl.LightningModule:
    """Return the module to train, with its nets, penalty and optimiser.

    Args:
        cfg: the composed config.
        data: a data module that is set up; the nets get its shapes.
        chosen: the keys that the user set, such as ``{"model.width"}``.

    Raises:
        ValueError: if the module does not fit the rest of the config.
    """
    make = instantiate(cfg.module, _convert_="all", _partial_=True)
    penalty = instantiate(cfg.penalty, _convert_="all")
    optimizer = instantiate(cfg.optimizer, _convert_="all")
    nets = {name: make_net(name, made) for name, made in recipes(cfg, data, chosen).items()}
    if trains_pair(cfg):
        _check_gan(cfg)
        own = {
            f"{net}_optimizer": make.keywords.get(f"{net}_optimizer") or optimizer for net in PAIR
        }
        own |= pair_schedulers(cfg, make.keywords)
        return make(**nets, penalty=penalty, **own)
    if cfg.loss._target_ is not None:
        loss = instantiate(cfg.loss)
    else:
        loss = nn.CrossEntropyLoss() if data.task == "classification" else nn.MSELoss()
    scheduler = build_scheduler(cfg.scheduler)
    return make(nets["net"], loss, penalty, optimizer=optimizer, scheduler=scheduler)


def build_scheduler(cfg: DictConfig) -> Callable[[torch.optim.Optimizer], Any] | None:
    """Return a function of an optimiser that makes a scheduler, as Lightning takes it; or None.

    One that reduces on a plateau is stepped every epoch, with val/loss, the others every step.
    """
    if cfg._target_ is None:
        return None
    make = instantiate(cfg, _convert_="all")
    plateau = get_object(cfg._target_) is torch.optim.lr_scheduler.ReduceLROnPlateau
    options = {"monitor": "val/loss"} if plateau else {"interval": "step"}
    return lambda optimizer: {"scheduler": make(optimizer), **options}


def pair_schedulers(cfg: DictConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schedulers of a critic and a generator: those of the module's options first.

    Args:
        cfg: the composed config.
        given: the module's options.

    Raises:
        ValueError: for one that reduces on a plateau of val/loss, which a pair does not have.
    """
    if cfg.scheduler._target_ is None:
        return {}
    if cfg.scheduler._target_.endswith("ReduceLROnPlateau"):
        raise ValueError(
            "scheduler=plateau needs val/loss, which a generator and a critic do not have: use "
            "scheduler=cosine, step, one_cycle or warm_up"
        )
    steps = {
        "critic": cfg.total_steps,
        "generator": max(1, cfg.total_steps // cfg.module.critic_steps),
    }
    made = {}
    for net, total in steps.items():
        own = OmegaConf.merge(cfg, {"total_steps": total})
        made[f"{net}_scheduler"] = given.get(f"{net}_scheduler") or instantiate(
            own.scheduler, _convert_="all"
        )
    return made


def trains_pair(cfg: DictConfig) -> bool:
    """Whether the module takes a generator and a critic, as `GANModule` does."""
    return all(net in signature_of(get_object(cfg.module._target_)) for net in PAIR)


def recipes(cfg: DictConfig, data: Any, chosen: set[str]) -> dict[str, dict[str, Any]]:
    """Return how each net is made: its ``_target_`` and arguments, by its name in the module.

    A net gets ``input_shape`` and ``num_outputs`` if it takes them. Of a pair, the generator gets
    those of the arguments below that it takes: ``latent_dim`` and ``output_shape``, the shape of a
    sample; or ``input_shape`` and ``num_outputs``, so that any net can generate flat samples. The
    critic gets ``input_shape`` and ``num_outputs``, which is 1. With ``module.conditional`` both
    get ``num_classes``.

    Args:
        cfg: the composed config.
        data: a data module that is set up.
        chosen: the keys that the user set, such as ``{"model.width", "model.critic.width"}``.
    """
    if not trains_pair(cfg):
        given = {k: getattr(data, k) for k in ("input_shape", "num_outputs") if hasattr(data, k)}
        if "input_shape" in given:
            given["input_shape"] = tuple(given["input_shape"])
        return {"net": recipe(cfg.model, given, below("model", chosen))}
    shape = tuple(data.input_shape)
    labelled = cfg.module.conditional and data.task == "classification"
    labels = {"num_classes": data.num_outputs} if labelled else {}
    latents = cfg.module.latent_dim
    of_pair = {
        "generator": {
            "latent_dim": latents,
            "output_shape": shape,
            "input_shape": (latents,),
            "num_outputs": math.prod(shape),
            **labels,
        },
        "critic": {"input_shape": shape, "num_outputs": 1, **labels},
    }
    return {
        net: recipe(cfg.model[net], of_pair[net], below(f"model.{net}", chosen)) for net in PAIR
    }


def below(key: str, chosen: set[str]) -> set[str]:
    """Return the chosen options of a part of the config, without its name."""
    return {name.removeprefix(f"{key}.") for name in chosen if name.startswith(f"{key}.")}


def recipe(cfg: DictConfig, given: Mapping[str, Any], chosen: set[str]) -> dict[str, Any]:
    """Return how a net is made: its ``_target_`` and its arguments.

    Args:
        cfg: the ``_target_`` and options of the net.
        given: more arguments. The net gets those that it takes and that ``cfg`` does not set.
        chosen: the options that the user set, which the net always gets. The other options of
            ``cfg`` are defaults of its file: a net that does not take one does not get it.
    """
    known = signature_of(get_object(cfg._target_))
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    options = {
        str(k): v
        for k, v in cfg.items()
        if str(k).startswith("_") or any_name or k in known or k in chosen
    }
    plain = OmegaConf.to_container(OmegaConf.create(options), resolve=True)
    return {**plain, **{k: v for k, v in given.items() if k in known and k not in cfg}}  # type: ignore[dict-item]


def make_net(name: str, made: Mapping[str, Any]) -> nn.Module:
    """Return a net.

    Args:
        name: of the net in the module, for the message.
        made: its `recipe`.

    Raises:
        TypeError: if the target does not return a `torch.nn.Module`.
    """
    # Shapes go directly into the call: Hydra would turn a tuple into a list.
    shapes = {k: v for k, v in made.items() if isinstance(v, tuple)}
    options = OmegaConf.create({k: v for k, v in made.items() if k not in shapes})
    net = instantiate(options, _convert_="all", _partial_=True)(**shapes)
    if not isinstance(net, nn.Module):
        key = "model" if name == "net" else f"model.{name}"
        raise TypeError(
            f"{key}._target_={made['_target_']} must give a torch.nn.Module; got a "
            f"{type(net).__name__}"
        )
    return net


def build_loggers(cfg: DictConfig, purge_step: int | None = None) -> list[Logger] | bool:
    """Return the loggers of the config, or False for none.

    Args:
        cfg: for each name a ``_target_`` with options.
        purge_step: from which on TensorBoard forgets what an earlier run in the folder has logged.

    Raises:
        ValueError: if the package of a logger is not installed, or it is no logger.
    """
    for name, each in zip(map(str, cfg), cfg.values(), strict=True):
        if each and not (isinstance(each, DictConfig) and "_target_" in each):
            raise ValueError(f"logger.{name} must be null or have a _target_; got {each!r}")
    try:
        made = []
        for each in cfg.values():
            if each:
                board = each._target_.endswith(".TensorBoardLogger") and purge_step is not None
                own = {"purge_step": purge_step} if board else {}
                made.append(instantiate(each, _convert_="all", **own))
        return made or False
    except Exception as error:
        if not isinstance(error.__cause__ or error, ImportError):
            raise
        raise ValueError(
            f"logger={','.join(map(str, cfg))} needs a package that is not installed: "
            f"{error.__cause__ or error}"
        ) from error


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """Return the callbacks of the config.

    A `GradientNormMonitor` logs under the names of `PenalizedModule`'s norms, and replaces them.

    Args:
        cfg: the composed config; ``callbacks`` has for each name a ``_target_`` with options, or
            null for no callback.

    Raises:
        TypeError: if a target does not return a callback.
    """
    made = {
        str(name): instantiate(each, _convert_="all") if isinstance(each, DictConfig) else each
        for name, each in cfg.callbacks.items()
        if each is not None
    }
    if any(isinstance(each, GradientNormMonitor) for each in made.values()):
        cfg.module = {**cfg.module, **{k: False for k in cfg.module if k == "gradient_norms"}}
    for name, callback in made.items():
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks.{name} must give a pytorch_lightning Callback, as _target_: "
                f"gpkit.lightning.gan.figures.GANFigures does; got a {type(callback).__name__}"
            )
    return list(made.values())


def check_nets(cfg: DictConfig) -> None:
    """Refuse one net for a module that takes two, and two nets for a module that takes one.

    Raises:
        ValueError: for these.
    """
    found = [net for net in PAIR if net in cfg.model]
    if trains_pair(cfg) and len(found) < len(PAIR):
        raise ValueError(
            f"module._target_={cfg.module._target_} trains a generator and a critic; got "
            f"model._target_={cfg.model.get('_target_')}: use model=gan_points or model=gan_images"
        )
    if not trains_pair(cfg) and found and "_target_" not in cfg.model:
        raise ValueError(
            f"module._target_={cfg.module._target_} trains one net; got a model of "
            f"{' and '.join(found)}: use module=gan, or a net as model=mlp"
        )


def _check_gan(cfg: DictConfig) -> None:
    """Refuse options that only a module of one net has."""
    if cfg.loss._target_ is not None:
        raise ValueError(
            f"loss._target_={cfg.loss._target_} is a loss of outputs and targets; for a "
            "generator and a critic use module.loss=wasserstein, non_saturating, ..."
        )
    if cfg.trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={cfg.trainer.accumulate_grad_batches} is for one "
            f"optimiser: use module.accumulate={cfg.trainer.accumulate_grad_batches}"
        )
    if cfg.trainer.gradient_clip_val is not None:
        raise ValueError(
            f"trainer.gradient_clip_val={cfg.trainer.gradient_clip_val} is for one optimiser: use "
            f"module.gradient_clip={cfg.trainer.gradient_clip_val}"
        )
