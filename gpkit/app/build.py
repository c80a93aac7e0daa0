"""From a config to the module that is trained, its nets made for the data, and to callbacks."""

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
    """Return the module of the config with its nets, made for the data, penalty and optimiser.

    Args:
        cfg: the composed config.
        data: a data module that is set up.
        chosen: the keys that the user set.

    Returns:
        The module to train.

    Raises:
        ValueError: if the module and the rest of the config do not go together.
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
    """Whether the module of the config takes a generator and a critic, as `GANModule` does."""
    return all(net in _parameters(get_object(cfg.module._target_)) for net in PAIR)


def build_pair(cfg: DictConfig, data: Any, chosen: set[str]) -> dict[str, nn.Module]:
    """Return a generator and a critic, given what they take of the following.

    The generator makes samples of ``output_shape``, which is the data's, of ``latent_dim`` numbers;
    a net for any data, called with ``input_shape`` and ``num_outputs``, does where samples are
    flat. The critic takes samples of ``input_shape`` and gives ``num_outputs`` = 1. A conditional
    pair takes labels of ``num_classes``.

    Args:
        cfg: the composed config.
        data: a data module that is set up.
        chosen: the options of the model that the user set: ``{"critic.width"}``.

    Returns:
        The nets by name.
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
        key: where the config has it, for the message.
        cfg: its ``_target_`` and options.
        given: options that are for it if it takes them, and has none of its own of that name.
        chosen: the options that the user set. Others, which the config has for its own target, are
            left out where a target of the user's own does not take them.

    Returns:
        The net.

    Raises:
        TypeError: if the target gives something else than a module.
    """
    known = _parameters(get_object(cfg._target_))
    any_name = any(p.kind is p.VAR_KEYWORD for p in known.values())
    given = {k: v for k, v in given.items() if k in known and k not in cfg}
    options = {
        k: v
        for k, v in cfg.items()
        if str(k).startswith("_") or any_name or k in known or k in chosen
    }
    # Given to the call itself: Hydra would make a list of a tuple.
    net = instantiate(OmegaConf.create(options), _convert_="all", _partial_=True)(**given)
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"{key}._target_={cfg._target_} must give a torch.nn.Module; got a {type(net).__name__}"
        )
    return net


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """Return the callbacks of the config.

    Args:
        cfg: by name a ``_target_`` with options, or null for none.

    Returns:
        The callbacks.

    Raises:
        TypeError: if a target gives something else.
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
    """Return the parameters of a target; none if it does not show them."""
    try:
        return inspect.signature(target).parameters
    except ValueError:
        return {}


def _check_nets(cfg: DictConfig) -> None:
    """Refuse one net where there must be two, and two where there must be one."""
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
    """Refuse options that are for one net with one optimiser."""
    if cfg.loss._target_ is not None:
        raise ValueError(
            f"loss._target_={cfg.loss._target_} is the loss of a net that is given targets; a "
            "generator and a critic have module.loss=wasserstein, non_saturating, ..."
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
