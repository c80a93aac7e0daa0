"""Nets and samples that penalties are tried on, and the ways of calling a penalty with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import oracles
import torch
from nets import Witness
from torch import Tensor, nn
from torch.func import functional_call

import gpkit
from gpkit.autodiff.activations import classifier_inputs

B = 5


@dataclass
class Scene:
    """A net, and samples of unequal slopes."""

    net: Witness
    real: Tensor  # [B, *S]
    fake: Tensor  # [B, *S]
    target: Tensor  # [B, m]
    given: oracles.Params = field(default_factory=dict)  # parameters instead of the net's own
    labels: Tensor | None = None  # as drawn from the model, once: [B]

    @property
    def f(self) -> Callable[[Tensor], Tensor]:
        return partial(functional_call, self.net, self.given) if self.given else self.net

    @property
    def weights(self) -> Any:
        return list(self.given.values()) if self.given else self.net

    @property
    def params(self) -> oracles.Params:
        return {name: p.detach() for name, p in self.net.named_parameters()}

    def apply(self, params: oracles.Params, x: Tensor) -> Tensor:
        """Return the outputs for samples ``[B, *S]`` as a function of the parameters."""
        return functional_call(nn.Sequential(*self.net), params, (x,))

    def part(self, rows: slice) -> Scene:
        return replace(self, real=self.real[rows], fake=self.fake[rows], target=self.target[rows])


def scene(
    *layers: nn.Module, shape: tuple[int, ...], dtype: torch.dtype = torch.float64, zero: bool
) -> Scene:
    """Return a scene whose samples have slopes from far below one to far above."""
    net = Witness(*layers).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0 if zero else 2.5)
    rng = torch.Generator().manual_seed(1)
    size = torch.tensor([0.05, 2.0, 0.5, 8.0, 1.0], dtype=torch.float64)
    real, fake = torch.randn(2, B, *shape, generator=rng, dtype=torch.float64)
    size = size.reshape(B, *[1] * len(shape))
    real, fake = real * size, fake * size.flip(0)
    target = torch.randn(B, layers[-1].out_features, generator=rng, dtype=torch.float64) * (
        not zero
    )
    return Scene(net, real.to(dtype), fake.to(dtype), target.to(dtype))


def images(
    outputs: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    zero: bool = False,
    stateful: bool = False,
) -> Scene:
    """Return images ``[5, 2, 3, 3]`` and a smooth convolutional net; it may have side effects."""
    torch.manual_seed(0)
    return scene(
        nn.Conv2d(2, 3, 3, padding=1),
        *[nn.BatchNorm2d(3), nn.Dropout(0.3)][: 2 * stateful],
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, outputs),
        shape=(2, 3, 3),
        dtype=dtype,
        zero=zero,
    )


def vectors(
    outputs: int = 1,
    *,
    dtype: torch.dtype = torch.float64,
    zero: bool = False,
    stateful: bool = False,
) -> Scene:
    """Return vectors ``[5, 3]`` and a tiny net, for derivatives of high order."""
    torch.manual_seed(0)
    return scene(
        nn.Linear(3, 2),
        *[nn.BatchNorm1d(2), nn.Dropout(0.3)][: 2 * stateful],
        nn.Tanh(),
        nn.Linear(2, outputs),
        shape=(3,),
        dtype=dtype,
        zero=zero,
    )


def numbers(
    *, dtype: torch.dtype = torch.float64, zero: bool = False, stateful: bool = False
) -> Scene:
    """Return samples ``[5, 1]`` of one number."""
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(3), nn.Dropout(0.3)][: 2 * stateful]
    layers = nn.Linear(1, 3), *middle, nn.Tanh(), nn.Linear(3, 1)
    return scene(*layers, shape=(1,), dtype=dtype, zero=zero)


def squared_errors(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(-1)  # [B, m] -> [B]


def on_weights(act: Any, s: Scene) -> Any:
    f, x, target = s.f, s.real, s.target
    return act(lambda: squared_errors(f(x), target).mean(), s.weights)


def on_weights_losses(act: Any, s: Scene) -> Any:
    f, x, target = s.f, s.real, s.target
    return act(lambda: squared_errors(f(x), target), s.weights)


def on_losses(act: Any, s: Scene) -> Any:
    f, target = s.f, s.target
    return act(lambda x: squared_errors(f(x), target), s.real)


def on_outputs(act: Any, s: Scene) -> Any:
    return act(s.f, s.real)


def on_target(act: Any, s: Scene) -> Any:
    return act(s.f, s.real, target=s.fake)


def on_mask(act: Any, s: Scene) -> Any:
    return act(s.f, s.real, metric=s.fake > 0)


def target_graph(act: Any, s: Scene) -> Any:
    x = s.real.clone().requires_grad_()
    return act(s.f(x), x, target=s.fake)


def mask_graph(act: Any, s: Scene) -> Any:
    x = s.real.clone().requires_grad_()
    return act(s.f(x), x, metric=s.fake > 0)


def on_steps(act: Any, s: Scene) -> Any:
    """With the losses of steps [B, T], whose sum is `squared_errors`."""
    f, target = s.f, s.target
    return act(lambda x: (f(x) - target).square(), s.real)


def steps_graph(act: Any, s: Scene) -> Any:
    x = s.real.clone().requires_grad_()
    return act((s.f(x) - s.target).square(), x)


def sample_weights(count: int) -> Tensor:
    return torch.linspace(0.0, 2.0, B, dtype=torch.float64)[:count]


def on_weighted(act: Any, s: Scene) -> Any:
    return act(s.f, s.real, sample_weight=sample_weights(len(s.real)))


def weighted_graph(act: Any, s: Scene) -> Any:
    x = s.real.clone().requires_grad_()
    return act(s.f(x), x, sample_weight=sample_weights(len(x)))


def on_entries(act: Any, s: Scene) -> Any:
    """With a dict, of which one entry is a constant."""
    f = s.f
    return act(lambda batch: f(batch["x"] + 0 * batch["c"]), {"c": s.fake, "x": s.real})


def on_activations(act: Any, s: Scene) -> Any:
    return act(s.f, s.real, s.net) if s.given else act(s.net, s.real)


def on_critic(act: Any, s: Scene) -> Any:
    return act(s.f, real=s.real, fake=s.fake)


def weights_graph(act: Any, s: Scene) -> Any:
    parameters = s.given.values() if s.given else s.net.parameters()
    return act(squared_errors(s.f(s.real), s.target).mean(), parameters)


def weights_losses_graph(act: Any, s: Scene) -> Any:
    return act(squared_errors(s.f(s.real), s.target), s.weights)


def losses_graph(act: Any, s: Scene) -> Any:
    x = s.real.clone().requires_grad_()
    return act(squared_errors(s.f(x), s.target), x)


def outputs_graph(act: Any, s: Scene, of: str = "real") -> Any:
    x = getattr(s, of).clone().requires_grad_()
    return act(s.f(x), x)


def on_sampled(act: Any, s: Scene, *, graph: bool = False) -> Any:
    original = gpkit.axes.call.draw_labels

    def draw(logits: Tensor, rng: Any) -> Tensor:
        s.labels = original(logits, rng) if s.labels is None else s.labels
        return s.labels

    with mock.patch("gpkit.axes.call.draw_labels", draw):
        return act(s.f(s.real) if graph else lambda: s.f(s.real), s.weights)


def on_environments(act: Any, s: Scene, *, graph: bool = False, features: bool = False) -> Any:
    def given() -> Any:
        with classifier_inputs(s.net) as found:
            logits = s.f(s.real)
        return (logits, found[0]) if features else logits

    return act(given() if graph else given, *classes(s))


def classes(s: Scene) -> tuple[Tensor, Tensor]:
    """Return classes and environments, of two and of three samples: ``[B]`` each."""
    return s.target.argmax(1), torch.tensor([7, 3, 3, 7, 3])[: len(s.target)]
