"""Lightning data modules that know their `input_shape`, `num_outputs` and `task`."""

from gpkit.data.arrays import ArrayDataModule
from gpkit.data.curves import SwissRoll, TwoMoons
from gpkit.data.digits import Digits
from gpkit.data.gaussians import EightGaussians, Gaussian, TwentyFiveGaussians
from gpkit.data.huggingface import HuggingFace
from gpkit.data.module import DataModule
from gpkit.data.tables import BreastCancer, Diabetes

__all__ = [
    "ArrayDataModule",
    "BreastCancer",
    "DataModule",
    "Diabetes",
    "Digits",
    "EightGaussians",
    "Gaussian",
    "HuggingFace",
    "SwissRoll",
    "TwentyFiveGaussians",
    "TwoMoons",
]
