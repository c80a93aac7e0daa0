"""What Taylor mode's tensor subclass takes of torch beside its public API.

"Extending PyTorch" documents these, though the names have an underscore.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def wrapper_tensor(cls: type, like: Tensor) -> Any:
    """Return a tensor of a subclass without storage, with the shape and strides of ``like``."""
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    return Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), **options)


def no_torch_function() -> Any:
    """Return the ``__torch_function__`` of a subclass that only uses ``__torch_dispatch__``.

    torch recognises this one and does not call it. A function that runs the operation unchanged is
    slower; it is the fallback if a release renames this one.
    """
    return getattr(torch._C, "_disabled_torch_function_impl", classmethod(_as_it_is))


def _as_it_is(
    cls: type,
    func: Callable[..., Any],
    types: Sequence[type],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **(kwargs or {}))
