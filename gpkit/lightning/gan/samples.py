"""Samples of a GAN, a tensor or entries by name, and the nets as functions of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from gpkit import checks
from gpkit.autodiff.compat import tree_map_only
from gpkit.lightning.batches import TARGETS, repeated

Samples = Tensor | dict[str, Tensor]  # [B, *S], or entries by name, [B, *S] each


class MicroBatch(NamedTuple):
    """Real samples and their labels.

    Args:
        samples: ``[B, *S]``, or a dict of them.
        labels: of the samples, or None.
        batch: as it came from the DataLoader.
    """

    samples: Samples
    labels: Any
    batch: Any = None


def first(samples: Any) -> Tensor:
    """Return the first tensor of samples: it has their number and their device."""
    found: Tensor = next(iter(samples.values())) if isinstance(samples, Mapping) else samples
    return found


def called_with(net: nn.Module, samples: Samples) -> list[str] | None:
    """Return the entries that a net takes by keyword; None if it takes the samples themselves."""
    if not isinstance(samples, Mapping):
        return None
    parameters = inspect.signature(net.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return list(samples)
    return [name for name in samples if name in parameters] or None


def conditioned(net: nn.Module, labels: Any, samples: Any = None) -> Callable[[Any], Any]:
    """Return a net as a function of its first input alone.

    Args:
        net: ``net(x)``, or with labels ``net(x, labels)``.
        labels: ``[B, ...]`` or None. They are repeated if x has a multiple of B points.
        samples: that the net scores. Where they have names, x is a dict, and the net is called
            by keyword if its ``forward`` has these names, else with the dict. Their labels are an
            entry.

    Returns:
        A function ``x -> net output``.
    """
    names = called_with(net, samples)
    if names is not None:
        return lambda x: net(**{name: x[name] for name in names})
    if labels is None or isinstance(samples, Mapping):
        return net
    return lambda x: net(x, repeated(labels, len(labels), len(x)))


def unpack_samples(batch: Any, *, conditional: bool) -> MicroBatch:
    """Return the samples of a batch, and their labels if the generator takes labels.

    Args:
        batch: ``x``, ``(x,)`` or ``(x, y)``; or a dict of tensors, whose labels are an entry.
        conditional: whether the nets take labels, so that the batch must have them.

    Returns:
        The samples ``[B, *S]``, and the labels y; None if the nets take none.

    Raises:
        TypeError: if the batch is anything else.
    """
    parts = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
    head = parts[0] if parts else None
    if isinstance(head, Mapping):
        entries = {key: v for key, v in head.items() if isinstance(v, Tensor) and v.ndim}
        floating = any(v.is_floating_point() for v in entries.values())
        label = next((key for key in TARGETS if key in entries), None)
        labels = parts[1] if len(parts) == 2 else entries.get(str(label))
        if floating and len(parts) < 3 and not (conditional and labels is None):
            if not conditional:
                entries.pop(str(label), None)
            return MicroBatch(entries, labels if conditional else None, batch)
    fits = isinstance(head, Tensor) and head.is_floating_point() and head.ndim > 0
    if not fits or len(parts) not in ((2,) if conditional else (1, 2)):
        expected = "(x, y)" if conditional else "x, (x,) or (x, y)"
        got = ", ".join(
            f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            for part in parts
        )
        raise TypeError(
            f"GANModule{'(conditional=True)' if conditional else ''} takes batches {expected} "
            f"with floating-point samples x [B, ...], or a dict of them; got ({got})"
        )
    return MicroBatch(parts[0], parts[1] if conditional else None, batch)


def packed(samples: Any, pac: int) -> Any:
    """Return samples in packs of ``pac``, which the critic scores as one: PacGAN.

    Args:
        samples: a tensor ``[B, C, *S]``, or labels: a tensor or a nested structure of them.
        pac: the number of samples in a pack.

    Returns:
        ``[B / pac, pac * C, *S]``; labels ``[B]`` become ``[B / pac, pac]``.

    Raises:
        ValueError: if ``pac`` does not divide B.

    >>> import torch
    >>> packed(torch.arange(6.0).reshape(6, 1), 3)
    tensor([[0., 1., 2.],
            [3., 4., 5.]])
    """

    def pack(t: Tensor) -> Tensor:
        if len(t) % pac:
            raise ValueError(
                f"`pac={pac}` needs batches whose size is a multiple of {pac}; got {len(t)} "
                "samples: choose such a batch_size, and drop_last=True in the DataLoader"
            )
        return t.reshape(len(t) // pac, -1, *t.shape[2:])

    return samples if pac == 1 else tree_map_only(Tensor, pack, samples)


def generate(generator: nn.Module, z: Tensor, real: Samples, labels: Any) -> Samples:
    """Return the generator's samples for latents, with the dtype of the real samples.

    Args:
        generator: ``generator(z)``, or with labels ``generator(z, labels)``.
        z: latents, ``[B, latent_dim]``.
        real: real samples, ``[B, *S]``. Entries of a dict that the generator does not return,
            such as labels and masks, are those of the real samples.
        labels: of the samples, or None.

    Returns:
        Fake samples, ``[B, *S]``.

    Raises:
        ValueError: if its output does not have the shape of the real samples.
    """
    fake = conditioned(generator, labels)(z)
    if not isinstance(real, Mapping):
        if not isinstance(fake, Tensor) or fake.shape != real.shape:
            got = list(fake.shape) if isinstance(fake, Tensor) else type(fake).__name__
            raise ValueError(
                f"the generator must return samples of the shape of the data, {list(real.shape)}; "
                f"got {got}: change the generator or the data"
            )
        return fake.to(real.dtype)
    varied = floating(real)
    if isinstance(fake, Tensor) and len(varied) == 1:
        fake = {next(iter(varied)): fake}
    made: dict[str, Any] = dict(fake) if isinstance(fake, Mapping) else {type(fake).__name__: None}
    for name, part in made.items():
        if not isinstance(part, Tensor) or name not in real or part.shape != real[name].shape:
            shapes = {key: list(v.shape) for key, v in varied.items()}
            raise ValueError(
                f"the generator must return a dict of entries of the samples, {shapes}; got "
                f"{name!r}{checks.nearest(name, varied)}, or another shape: change the generator"
            )
    return {**real, **{name: part.to(real[name].dtype) for name, part in made.items()}}


def floating(samples: Samples) -> dict[str, Tensor]:
    """Return the floating-point entries of a dict of samples; a tensor goes by the name ""."""
    named = samples if isinstance(samples, Mapping) else {"": samples}
    return {name: x for name, x in named.items() if x.is_floating_point()}


def at_points(samples: Samples, points: Mapping[str, Tensor]) -> Samples:
    """Return samples with other entries, by the names of `floating`."""
    return {**samples, **points} if isinstance(samples, Mapping) else points[""]
