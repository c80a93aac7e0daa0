"""The progress bar: the loss, the penalties, the gradient norm, and the accuracy at validation."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.callbacks import RichProgressBar

# What the bar shows, and the metrics that it may be: the first that there is.
SHOWN = {
    "loss": ("train/loss", "train/critic_loss"),
    "generator": ("train/generator_loss",),
    "grad norm": ("grad_norm/weight", "slope/interpolates"),
    "val/acc": ("val/acc",),
    "val/mae": ("val/mae",),
    "modes": ("modes/covered",),
}
ORDER = ("loss", "generator", "penalty", "grad norm", "val/acc", "val/mae", "modes")


class Bar(RichProgressBar):
    """Shows the latest losses, penalties (with their weights), gradient norm and accuracy."""

    def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        """Return what the bar shows, by name."""
        found = trainer.callback_metrics
        shown: dict[str, Any] = {}
        for name, keys in SHOWN.items():
            there = [key for key in keys if key in found]
            if there:
                shown[name] = float(found[there[0]])
        penalties = [k for k in found if k.startswith("penalty/") and k.count("/") == 1]
        if penalties:
            shown["penalty"] = sum(float(found[k]) for k in penalties)
        return {name: shown[name] for name in ORDER if name in shown}
