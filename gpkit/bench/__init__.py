"""What penalties and estimators cost and how exact they are, on a net and a machine of your own.

``python -m gpkit.bench model=mlp penalty=r1`` takes the options of ``train.py``, and
``gpkit.bench(net, penalties, example)`` takes a net. ``variants`` makes the estimators, ``steps``
the training steps, ``measure`` times them.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Bench(ModuleType):
    """The package itself can be called, so that ``gpkit.bench`` is both it and the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `gpkit.bench.measure.bench`."""
        from gpkit.bench.measure import bench

        return bench(*args, **kwargs)


sys.modules[__name__].__class__ = _Bench
