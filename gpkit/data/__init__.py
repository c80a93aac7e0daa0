"""Lightning data modules that know their `input_shape`, `num_outputs` and `task`."""

from gpkit.data.arrays import ArrayDataModule
from gpkit.data.breast_cancer import BreastCancer
from gpkit.data.diabetes import Diabetes
from gpkit.data.digits import Digits
from gpkit.data.gaussian import Gaussian
from gpkit.data.gaussians import EightGaussians, TwentyFiveGaussians
from gpkit.data.huggingface import HuggingFace
from gpkit.data.module import DataModule
from gpkit.data.swiss_roll import SwissRoll
from gpkit.data.two_moons import TwoMoons

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
