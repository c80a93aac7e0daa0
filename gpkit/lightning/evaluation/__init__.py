"""Callbacks that evaluate a net at the test: robustness, smoothness, calibration, sharpness.

Their metrics are those of the test: ``trainer.test`` returns them, and ``metrics.json`` has them.
"""

from gpkit.lightning.evaluation.inputs import Calibration, Robustness, Smoothness
from gpkit.lightning.evaluation.weights import Sharpness

__all__ = ["Calibration", "Robustness", "Sharpness", "Smoothness"]
