"""Data sets: Lightning data modules with ``input_shape``, ``num_outputs`` and ``task``.

``module`` has the data loaders, ``arrays`` the data that fits into memory, ``splits`` cuts it into
train, validation and test. The data sets are in ``digits``, ``colored_digits``, ``tables``,
``gaussians`` and ``curves``; ``huggingface``, with ``decoders``, reads any data set of the
`datasets` library.

What belongs here: real data that comes with scikit-learn, so that it needs no download, and toy
data whose true answer is known.

To add one:

1. a class, in the file of its kind or in a new one, exported below: subclass `ArrayDataModule` for
   tensors, `DataModule` for anything else;
2. ``configs/data/<name>.yaml``: the class and its own options, the rest is in ``_data.yaml``;
3. a row in ``MODULES`` of ``tests/data/test_data.py``, which checks shapes, seeds and loaders;
4. its name in the README's table of groups.

>>> import torch
>>> from gpkit.data import ArrayDataModule
>>> class Line(ArrayDataModule):
...     task, num_outputs = "regression", 1
...
...     def arrays(self, generator):
...         x = torch.linspace(0, 1, 20)[:, None]
...         return self.cut(x, 2 * x, generator)
>>> data = Line(batch_size=14)
>>> data.setup("fit")
>>> [tuple(t.shape) for t in next(iter(data.train_dataloader()))]
[(14, 1), (14, 1)]
"""

from gpkit.data.arrays import ArrayDataModule
from gpkit.data.colored_digits import ColoredDigits
from gpkit.data.curves import CirclePoints, NoisyCurve, SwissRoll, TwoMoons
from gpkit.data.digits import Digits
from gpkit.data.gaussians import EightGaussians, Gaussian, TwentyFiveGaussians
from gpkit.data.huggingface import HuggingFace
from gpkit.data.module import DataModule
from gpkit.data.tables import BreastCancer, Diabetes

__all__ = [
    "ArrayDataModule",
    "BreastCancer",
    "CirclePoints",
    "ColoredDigits",
    "DataModule",
    "Diabetes",
    "Digits",
    "EightGaussians",
    "Gaussian",
    "HuggingFace",
    "NoisyCurve",
    "SwissRoll",
    "TwentyFiveGaussians",
    "TwoMoons",
]
