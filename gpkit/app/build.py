"""Build the module, its nets, and the callbacks from a config."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback
from torch import nn

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
    _check_nets(cfg)
    make = instantiate(cfg.module, _convert_="all", _partial_=True)
    penalty = instantiate(cfg.penalty, _convert_="all")
    optimizer = instantiate(cfg.optimizer, _convert_="all")
    options = {key.removeprefix("model.") for key in chosen if key.startswith("model.")}
    if trains_pair(cfg):
        _check_gan(cfg)
        nets = build_pair(cfg, data, options)
        names = ("critic_optimizer", "generator_optimizer")
        own = {name: make.keywords.get(name) or optimizer for name in names}
        return make(**nets, penalty=penalty, **own)
    shape = {"input_shape": tuple(data.input_shape), "num_outputs": data.num_outputs}
    net = build_net("model", cfg.model, shape, options)
    if cfg.loss._target_ is not None:
        loss = instantiate(cfg.loss)
    else:
        loss = nn.CrossEntropyLoss() if data.task == "classification" else nn.MSELoss()
    return make(net, loss, penalty, optimizer=optimizer)


def trains_pair(cfg: DictConfig) -> bool:
    """Whether the module takes a generator and a critic, as `GANModule` does."""
    return all(net in _parameters(get_object(cfg.module._target_)) for net in PAIR)


def build_pair(cfg: DictConfig, data: Any, chosen: set[str]) -> dict[str, nn.Module]:
    """Return a generator and a critic, by name.

    Each gets the arguments below that it takes. The generator: ``latent_dim`` and
    ``output_shape``, the shape of a sample; or ``input_shape`` and ``num_outputs``, so that any net
    can generate flat samples. The critic: ``input_shape`` and ``num_outputs``, which is 1. With
    ``module.conditional`` both: ``num_classes``.

    Args:
        cfg: the composed config.
        data: a data module that is set up.
        chosen: the options of the model that the user set, such as ``{"critic.width"}``.
    """
    shape, latents = tuple(data.input_shape), cfg.module.latent_dim
    labelled = cfg.module.conditional and data.task == "classification"
    labels = {"num_classes": data.num_outputs} if labelled else {}
    given = {
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
        net: build_net(
            f"model.{net}",
            cfg.model[net],
            given[net],
            {key.removeprefix(f"{net}.") for key in chosen if key.startswith(f"{net}.")},
        )
        for net in PAIR
    }


def build_net(key: str, cfg: DictConfig, given: Mapping[str, Any], chosen: set[str]) -> nn.Module:
    """Return a net.

    Args:
        key: its place in the config, for the message.
        cfg: its ``_target_`` and options.
        given: more arguments. The net gets those that it takes and that ``cfg`` does not set.
        chosen: the options that the user set, which the net always gets. The other options of
            ``cfg`` are defaults of its file: a net that does not take one does not get it.

    Raises:
        TypeError: if the target does not return a `torch.nn.Module`.
    """
    known = _parameters(get_object(cfg._target_))
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    given = {k: v for k, v in given.items() if k in known and k not in cfg}
    options = {
        k: v
        for k, v in cfg.items()
        if str(k).startswith("_") or any_name or k in known or k in chosen
    }
    # These go directly into the call: Hydra would turn a tuple into a list.
    net = instantiate(OmegaConf.create(options), _convert_="all", _partial_=True)(**given)
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"{key}._target_={cfg._target_} must give a torch.nn.Module; got a {type(net).__name__}"
        )
    return net


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """Return the callbacks of the config.

    Args:
        cfg: for each name a ``_target_`` with options, or null for no callback.

    Raises:
        TypeError: if a target does not return a callback.
    """
    made = {
        str(name): instantiate(each, _convert_="all") if isinstance(each, DictConfig) else each
        for name, each in cfg.items()
        if each is not None
    }
    for name, callback in made.items():
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks.{name} must give a pytorch_lightning Callback, as _target_: "
                f"gpkit.lightning.gan.figures.GANFigures does; got a {type(callback).__name__}"
            )
    return list(made.values())


def _parameters(target: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a target; none if it has no signature."""
    try:
        return inspect.signature(target).parameters
    except ValueError:
        return {}


def _check_nets(cfg: DictConfig) -> None:
    """Refuse one net for a module that takes two, and two nets for a module that takes one."""
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
