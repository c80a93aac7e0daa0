"""Example: the samples that the doctor tries a net and a penalty on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpkit.losses import logits, per_sample

LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(eq=False)
class Example:
    """A batch.

    Args:
        inputs: what the net takes: a tensor, a tuple of several, or a dict of them by keyword.
        y: the targets; None if there are none.
        env: the environment of each sample; None if they are not known.
        fake: fake samples for critics, like the first floating-point input.
        loss: (output, y) -> a number or ``[B]``; None is the cross-entropy for classes, else the
            square.
        given: ``target=``, ``metric=`` and ``sample_weight=`` of the penalty's call.
    """

    inputs: Any
    y: Any = None
    env: Tensor | None = None
    fake: Tensor | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """The inputs, in their order."""
        values = self.inputs
        if isinstance(values, Mapping):
            values = list(values.values())
        values = values if isinstance(values, (list, tuple)) else [values]
        return [v for v in values if isinstance(v, Tensor)]

    @property
    def x(self) -> Tensor:
        """The input that penalties differentiate in: the first that is floating-point."""
        found = self.tensors
        return next((t for t in found if t.is_floating_point()), found[0])

    @property
    def fakes(self) -> Tensor:
        """The fake samples; where there are none that of x_i is x_{i-1}."""
        return self.x.roll(1, 0) if self.fake is None else self.fake

    def run(self, net: Callable[..., Any], z: Tensor | None = None) -> Any:
        """Return the output of the net, with ``z`` in the place of x."""
        x, inputs = self.x, self.inputs

        def placed(value: Any) -> Any:
            if z is None or not isinstance(value, Tensor):
                return value
            return z if value is x else repeated(value, len(x), len(z))

        if isinstance(inputs, Mapping):
            return net(**{key: placed(value) for key, value in inputs.items()})
        if isinstance(inputs, (list, tuple)):
            return net(*map(placed, inputs))
        return net(placed(inputs))

    def loss_of(self, output: Any) -> Tensor:
        """Return the loss as it is trained on: of the given function a number or ``[B]``."""
        output = logits(output)
        if self.loss is not None:
            return self._given(output)
        return self.losses_of(output)

    def losses_of(self, output: Any, points: int | None = None) -> Tensor:
        """Return the loss of each sample, ``[B]``.

        Args:
            output: of the net.
            points: how many points there are, if several belong to a sample.
        """
        output = logits(output)
        y = self.y if points is None else repeated(self.y, len(self.x), points)
        if self.loss is not None and y is not None:
            return per_sample(self.loss)(output, y)
        if self.loss is not None:
            return self._given(output)
        if not isinstance(y, Tensor):
            return output.flatten(1).square().mean(1) if output.ndim > 1 else output.square()
        if not y.is_floating_point():
            losses = F.cross_entropy(output, y, reduction="none")
        else:
            losses = (output - y.reshape(output.shape)).square()
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    def _given(self, output: Any) -> Tensor:
        function: Any = self.loss
        return function(output) if self.y is None else function(output, self.y)

    def training_loss(self, net: nn.Module) -> Tensor:
        """Return the number that is trained on without a penalty.

        Of scores without targets it is a critic's, mean softplus(D(fake)) + softplus(-D(real)).
        """
        output = self.run(net)
        alone = self.y is None and self.loss is None and self.fake is not None
        if alone and isinstance(output, Tensor) and output.numel() == len(output):
            return F.softplus(self.run(net, self.fake)).mean() + F.softplus(-output).mean()
        return self.loss_of(output).mean()

    def to(self, dtype: torch.dtype) -> Example:
        """Return the same batch with floating-point numbers of another type."""

        def moved(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {k: moved(v) for k, v in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(map(moved, value))
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        given = {k: moved(v) for k, v in self.given.items()}
        parts = moved(self.inputs), moved(self.y), self.env, moved(self.fake)
        return Example(*parts, self.loss, given)


def repeated(value: Any, samples: int, points: int) -> Any:
    """Return what belongs to the samples, for several points of each."""
    if points == samples or not isinstance(value, Tensor) or value.shape[:1] != (samples,):
        return value
    return value.repeat(points // samples, *[1] * (value.ndim - 1))


def as_example(example: Any, loss: Any, real: Any, fake: Any, given: Mapping[str, Any]) -> Example:
    """Return the batch that `gpkit.diagnose` was given.

    Args:
        example: x, (x, y), (x, y, env), or a mapping.
        loss: (output, y) -> loss.
        real: real samples, in the place of ``example``.
        fake: fake samples.
        given: ``target=``, ``metric=`` and ``sample_weight=``.

    Returns:
        The batch.

    Raises:
        TypeError: if there are no samples, or something else than tensors.
    """
    if (example is None) == (real is None):
        raise TypeError(
            "diagnose(net, penalty, example) takes the samples once: x, (x, y), or real="
        )
    found = real if example is None else example
    parts: tuple[Any, ...] = (found,)
    if isinstance(found, Mapping):
        label = next((k for k in LABELS if k in found), None)
        parts = ({k: v for k, v in found.items() if k != label}, found[label] if label else None)
    elif isinstance(found, (list, tuple)):
        parts = tuple(found)
    if not 1 <= len(parts) <= 3:
        raise TypeError(
            f"`example=...` must be x, (x, y) or (x, y, env), where x may be a tuple; got "
            f"{len(parts)} entries"
        )
    x, y, env = (*parts, None, None)[:3]
    made = Example(x, y, env, fake, loss, {k: v for k, v in given.items() if v is not None})
    if not made.tensors:
        raise TypeError(f"`example=...` must be tensors; got a {type(x).__name__}")
    return made
