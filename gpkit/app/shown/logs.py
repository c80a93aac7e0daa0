"""What loggers get beside the metrics: the config, its options, and plots of several curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from gpkit.app.shown.lines import results

FIRST = ("penalty", "penalty/weight", "seed")
LEFT_OUT = ("hydra", "ckpt_path", "trainer", "run_dir", "total_steps", "logger", "task")
# Of TensorBoard's tab "custom scalars": a title, and the curves that share each of its plots. Their
# names are patterns there, so they get an end: train/loss would draw train/loss_total too.
LAYOUT = {
    "gradient norms, in training and at validation": {
        "in the weights": ["grad_norm/weight", "val/grad_norm/weight"],
        "in the inputs": ["grad_norm/input", "val/grad_norm/input"],
    },
    "loss, in training and at validation": {"loss": ["train/loss", "val/loss"]},
}
OF_PAIR = {
    "slopes of the critic": {
        "mean": [f"slope/{where}" for where in ("real", "fake", "interpolates")],
    },
    "Wasserstein distance, in training and at validation": {
        name: [f"wasserstein/{name}", f"val/wasserstein/{name}"] for name in ("raw", "debiased")
    },
    "loss, in training and at validation": {
        net: [f"train/{net}_loss", f"val/{net}_loss"] for net in ("critic", "generator")
    },
}


def log_start(logger: Any, cfg: DictConfig, *, pair: bool) -> None:
    """Give TensorBoard the config as text, and the plots that have several curves.

    Args:
        logger: of the trainer.
        cfg: the composed config.
        pair: whether a generator and a critic are trained.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("config", f"```yaml\n{OmegaConf.to_yaml(cfg)}```")
        layout = {
            title: {name: ["Multiline", [f"{t}$" for t in tags]] for name, tags in plots.items()}
            for title, plots in (OF_PAIR if pair else LAYOUT).items()
        }
        logger.experiment.add_custom_scalars(layout)


def log_result(logger: Any, cfg: DictConfig, final: dict[str, float], last: int) -> None:
    """Give a logger the options and the final metrics.

    Args:
        logger: of the trainer.
        cfg: the composed config.
        final: the metrics.
        last: the last step. A GAN logs some of the metrics as curves, and without a step they would
            get a point at 0.
    """
    options, shown = hyperparameters(cfg), results(final)
    logger.log_hyperparams(options)
    logger.log_metrics(shown, step=last)
    if isinstance(logger, TensorBoardLogger) and shown:  # else its file is closed
        for summary in summaries(options, shown):
            logger.experiment.file_writer.add_summary(summary)
    logger.finalize("success")


def summaries(options: Mapping[str, Any], metrics: Mapping[str, float]) -> list[Any]:
    """Return what TensorBoard's tab HPARAMS reads of a run.

    It sorts its columns by name, those first that are said to differ between runs: these are the
    penalty, its weight and the seed.

    Args:
        options: by name.
        metrics: by name.
    """
    plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in options.items()}
    of_experiment, *of_session = hparams(plain, dict(metrics))
    (value,) = of_experiment.value
    found = HParamsPluginData.FromString(value.metadata.plugin_data.content)
    for info in found.experiment.hparam_infos:
        info.differs = info.name in FIRST
    value.metadata.plugin_data.content = found.SerializeToString()
    return [of_experiment, *of_session]


def hyperparameters(cfg: DictConfig) -> dict[str, Any]:
    """Return what describes a run: the penalty, its weight, the seed, and then all options.

    Args:
        cfg: the composed config.

    Returns:
        Plain values by their names, which have slashes.
    """
    with open_dict(cfg):
        plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    rest = flat({str(k): v for k, v in plain.items() if k not in LEFT_OUT})
    target = str(rest.get("penalty/_target_"))
    first = {"penalty": target.removeprefix("gpkit.")}
    first |= {k: rest[k] for k in FIRST if k in rest}
    return {**first, **rest}


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested options as one dict.

    >>> flat({"model": {"width": 3}, "seed": 0})
    {'model/width': 3, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in options.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return found
