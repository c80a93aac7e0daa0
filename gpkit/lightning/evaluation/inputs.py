"""`Robustness`, `Smoothness` and `Calibration`: a net at the test samples and near them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassCalibrationError

from gpkit import checks
from gpkit.lightning.batches import Batch
from gpkit.lightning.evaluation.attacks import fgsm, pgd
from gpkit.lightning.evaluation.base import Evaluation, outputs_of
from gpkit.lightning.evaluation.smoothness import local_lipschitz, squared_jacobian


class Robustness(Evaluation):
    """Logs the accuracy on inputs with noise, and on inputs that are moved to raise the loss.

    ``test/acc/noise_<σ>``: Gaussian noise of standard deviation σ, not clipped.
    ``test/acc/fgsm_<ε>`` and ``test/acc/pgd_<ε>``: see `fgsm` and `pgd`; the loss is the
    cross-entropy.

    Args:
        noise: σ, several.
        fgsm: ε of FGSM, several, in the maximum norm.
        pgd: ε of PGD, several.
        steps: of PGD.
        step: the length of its steps, in ε / steps.
        low: the least value of an input.
        high: the largest value of an input.
        seed: of the random numbers.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        noise: Sequence[float] = (0.3,),
        fgsm: Sequence[float] = (0.1,),
        pgd: Sequence[float] = (0.1, 0.2),
        steps: int = 20,
        step: float = 2.5,
        low: float = 0.0,
        high: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.noise = [checks.number("Robustness(noise=...)", s, 0) for s in noise]
        self.fgsm = [checks.number("Robustness(fgsm=...)", e, 0) for e in fgsm]
        self.pgd = [checks.number("Robustness(pgd=...)", e, 0) for e in pgd]
        self.steps = checks.integer("Robustness(steps=...)", steps, 1)
        self.step = checks.number("Robustness(step=...)", step, 0, strict=True)
        self.low, self.high = low, high
        if not low < high:
            raise ValueError(f"`Robustness(low={low}, high={high})` must have low < high")

    def measure(self, module: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the accuracies of a batch."""
        x, y = batch.x, batch.y

        def net(moved: Tensor) -> Tensor:
            return outputs_of(module, batch, moved)

        def losses(moved: Tensor) -> Tensor:
            return F.cross_entropy(net(moved), y, reduction="none")

        found: dict[str, Tensor] = {}
        for sigma in self.noise:
            drawn = torch.randn(x.shape, generator=self._rng).to(x)
            found[f"acc/noise_{sigma:g}"] = x + sigma * drawn
        for epsilon in self.fgsm:
            found[f"acc/fgsm_{epsilon:g}"] = fgsm(losses, x, epsilon, self.low, self.high)
        for epsilon in self.pgd:
            options = {"steps": self.steps, "step_size": self.step * epsilon / self.steps}
            moved = pgd(losses, x, epsilon, self.low, self.high, rng=self._rng, **options)  # type: ignore[arg-type]
            found[f"acc/pgd_{epsilon:g}"] = moved
        return {name: _accuracy(net(moved), y) for name, moved in found.items()}


class Smoothness(Evaluation):
    """Logs how steep a net is at the test samples.

    ``test/jacobian``: the mean of ‖∂f/∂x‖_F², exact. ``test/lipschitz``: the mean over samples of a
    local Lipschitz estimate, a lower bound, see `local_lipschitz`; ``test/lipschitz/max`` is the
    largest of a batch, averaged over batches.

    Args:
        radius: of the neighbourhood, in the l2 norm.
        steps: of the search for the steepest direction.
        seed: of the random numbers.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(self, radius: float = 0.1, steps: int = 10, seed: int = 0) -> None:
        super().__init__(seed)
        self.radius = checks.number("Smoothness(radius=...)", radius, 0, strict=True)
        self.steps = checks.integer("Smoothness(steps=...)", steps, 0)

    def measure(self, module: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the numbers of a batch."""

        def net(x: Tensor) -> Tensor:
            return outputs_of(module, batch, x)

        bounds = local_lipschitz(net, batch.x, self.radius, steps=self.steps, rng=self._rng)
        return {
            "jacobian": squared_jacobian(net, batch.x).mean(),
            "lipschitz": bounds.mean(),
            "lipschitz/max": bounds.max(),
        }


class Calibration(Evaluation):
    r"""Logs ``test/calibration_error``, of a classifier's probabilities (Guo et al. 2017).

    .. math:: \sum_b \frac{n_b}{n} \, |\text{acc}_b - \text{conf}_b|

    over bins b of equal width in the probability of the predicted class.

    Args:
        bins: the number of bins.

    Raises:
        ValueError: if it is out of its range.
    """

    def __init__(self, bins: int = 15) -> None:
        super().__init__()
        self.bins = checks.integer("Calibration(bins=...)", bins, 1)
        self._error: MulticlassCalibrationError | None = None

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the samples of an earlier test."""
        self._error = None

    def measure(self, module: Any, batch: Batch) -> dict[str, Tensor]:
        """Add a batch."""
        with torch.no_grad():
            out = outputs_of(module, batch, batch.x)
        if self._error is None:
            self._error = MulticlassCalibrationError(out.shape[1], self.bins).to(out.device)
        self._error.update(out.softmax(1), batch.y)
        return {}

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the error of all samples."""
        if self._error is not None:
            pl_module.log("test/calibration_error", self._error.compute())


def _accuracy(out: Tensor, y: Tensor) -> Tensor:
    return (out.argmax(1) == y).float().mean()
