"""The one table of penalties: how each is built and called, and what it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import gpkit
from gpkit.autodiff.activations import classifier_inputs
from gpkit.formula import Terms

torch.set_num_threads(1)  # the nets are small: threads would only wait for each other
B = 5


class Net(nn.Sequential):
    """Layers that keep a record of where they are evaluated."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return super().forward(x)


@dataclass
class Scene:
    """A net, and samples of unequal slopes."""

    net: Net
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
    net = Net(*layers).to(dtype)
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


def squared_errors(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(-1)  # [B, m] -> [B]


# How a penalty is called: `act` is the penalty itself, or its `terms`.


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
    original = gpkit.axes.of.draw_labels

    def draw(logits: Tensor, rng: Any) -> Tensor:
        s.labels = original(logits, rng) if s.labels is None else s.labels
        return s.labels

    with mock.patch("gpkit.axes.of.draw_labels", draw):
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


def hidden_graph(act: Any, s: Scene) -> Any:
    x, caught = s.real.clone().requires_grad_(), []
    hook = s.net[1].register_forward_hook(lambda module, args, h: caught.append(h))
    s.f(x)
    hook.remove()
    return act(caught[0], x)


# What it must be: norms [G] of the points z, and values [G], of the parameters.

Oracle = Callable[[Scene, oracles.Params, list[Tensor]], tuple[float, Tensor, Tensor]]


def of_inputs(
    weight: float,
    value: Callable[[Tensor], Tensor],
    *,
    order: int = 1,
    norm: str = "l2",
    loss: bool = False,
    z_index: int = 0,
    of: Callable[[Tensor], Tensor] = lambda output: output,
) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        def f(x: Tensor, target: Tensor) -> Tensor:  # of one sample
            output = s.apply(params, x[None])[0]
            return squared_errors(output, target) if loss else of(output)

        points = z[z_index]
        target = torch.cat([s.target] * (len(points) // len(s.target)))
        norms = oracles.input_norms(f, order, points, target, norm=norm)
        return weight, norms, value(norms)

    return oracle


def of_cure(weight: float, h: float) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        def f(x: Tensor, target: Tensor) -> Tensor:
            return squared_errors(s.apply(params, x[None])[0], target)

        norms = oracles.gradient_change(f, h, z[0], s.target)
        return weight, norms, norms**2

    return oracle


def of_gnp(r: float, alpha: float) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        def loss(params: oracles.Params) -> Tensor:
            return squared_errors(s.apply(params, z[0]), s.target).mean()

        norms = oracles.weight_norm_by_difference(loss, params, r)
        return alpha * r, norms, norms

    return oracle


def of_weights(weight: float, *, order: int = 1, per_sample: bool = False) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        def loss(params: oracles.Params, rows: slice) -> Tensor:
            return squared_errors(s.apply(params, z[0][rows]), s.target[rows]).mean()

        groups = [slice(i, i + 1) for i in range(len(z[0]))] if per_sample else [slice(None)]
        norms = torch.cat(
            [oracles.weight_norm(lambda p, g=g: loss(p, g), params, order) for g in groups]
        )
        return weight, norms, norms**2

    return oracle


def of_sampled(weight: float) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        def loss(params: oracles.Params) -> Tensor:
            return F.cross_entropy(s.apply(params, z[0]), s.labels)

        norms = oracles.weight_norm(loss, params)
        return weight, norms, norms**2

    return oracle


def of_hidden(weight: float, layers: int = 2) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        first = nn.Sequential(*s.net[:layers])
        own = {name: params[name] for name, _ in first.named_parameters()}
        norms = oracles.input_norms(lambda x: functional_call(first, own, (x[None],))[0], 1, z[0])
        return weight, norms, norms**2

    return oracle


def by_environment(s: Scene, of: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``of(x, y)`` of each environment's samples, ``[E, ...]``."""
    y, env = classes(s)
    return torch.stack([of(x[env == e], y[env == e]) for e in env.unique()])


def of_scale(weight: float, *, halves: bool = False) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        def slope(x: Tensor, y: Tensor) -> Tensor:
            logits = s.apply(params, x)
            return torch.func.grad(lambda w: F.cross_entropy(w * logits, y))(x.new_ones(()))

        def product(x: Tensor, y: Tensor) -> Tensor:
            return slope(x[::2], y[::2]) * slope(x[1::2], y[1::2])

        values = by_environment(s, product if halves else lambda x, y: slope(x, y) ** 2, z[0])
        return weight, by_environment(s, slope, z[0]).abs(), 2 * values  # whose mean is the sum

    return oracle


def of_variance(weight: float) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        last = str(len(s.net) - 1)
        head = {name: p for name, p in params.items() if name.startswith(last)}

        def risk(head: oracles.Params, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(s.apply({**params, **head}, x[None]), y[None])

        def variance(x: Tensor, y: Tensor) -> Tensor:
            grads = torch.func.vmap(torch.func.grad(risk), (None, 0, 0))(head, x, y)
            return torch.cat([g.flatten(1) for g in grads.values()], 1).var(0, correction=0)

        variances = by_environment(s, variance, z[0])
        values = (variances - variances.mean(0)).square().sum(1)
        return weight, values.detach().sqrt(), values

    return oracle


def of_spectrum(weight: float) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        norms = oracles.spectral_norms(lambda x: s.apply(params, x[None])[0], z[0])
        return weight, norms, norms**2

    return oracle


@dataclass(frozen=True)
class Row:
    """A penalty: how it is built and called, and what it must be."""

    name: str
    build: Callable[..., Any]  # takes axes, such as every=4
    call: Callable[[Any, Scene], Any]  # with a callable
    graph: Callable[[Any, Scene], Any] | None  # with a tensor whose graph is there
    oracles: tuple[Oracle, ...]
    scene: Callable[..., Scene] = images
    where: tuple[str, ...] = ("real",)  # the samples at which the net is evaluated
    per_sample: bool = True
    groups: int = 1  # where they are not the samples
    twice: bool = True  # whether the penalty's own second derivative is exact
    points: int = 1  # for each sample
    reduce: Callable[[Tensor], Tensor] = torch.mean  # of the values

    @property
    def drawn(self) -> bool:
        """Whether the points are random even where real and fake are equal."""
        return "near" in self.where

    consistent: bool = True  # the gradient is that of the value, not an estimate of it


def preset(name: str, weight: float, **chosen: Any) -> Callable[..., Any]:
    return lambda **axes: getattr(gpkit, name)(weight=weight, **{**chosen, **axes})


def input_row(norm: str) -> Row:
    return Row(
        f"input_grad_norm_{norm}",
        preset("input_grad_norm", 0.7, norm=norm),
        on_losses,
        losses_graph,
        (of_inputs(0.7, lambda n: n**2, norm=norm, loss=True),),
        scene=partial(images, 3),
    )


ROWS = [
    Row(
        "weight_grad_norm",
        preset("weight_grad_norm", 0.3),
        on_weights,
        weights_graph,
        (of_weights(0.3),),
        scene=partial(images, 3),
        per_sample=False,
    ),
    Row(
        "per_sample_grad_norm",
        preset("per_sample_grad_norm", 0.3),
        on_weights_losses,
        weights_losses_graph,
        (of_weights(0.3, per_sample=True),),
        scene=partial(images, 3),
    ),
    Row(
        "weight_grad_norm_order2",
        preset("weight_grad_norm", 0.3, order=2, estimator="exact"),
        on_weights,
        weights_graph,
        (of_weights(0.3, order=2),),
        scene=vectors,
        per_sample=False,
    ),
    Row(
        "fisher",
        preset("fisher", 0.3),
        on_sampled,
        partial(on_sampled, graph=True),
        (of_sampled(0.3),),
        scene=partial(images, 3),
        per_sample=False,
    ),
    Row(
        "irm",
        preset("irm", 0.7),
        on_environments,
        partial(on_environments, graph=True),
        (of_scale(0.7),),
        scene=partial(images, 3),
        per_sample=False,
        groups=2,
    ),
    Row(
        "irm_halves",
        preset("irm", 0.7, halves=True),
        on_environments,
        partial(on_environments, graph=True),
        (of_scale(0.7, halves=True),),
        scene=partial(images, 3),
        per_sample=False,
        groups=2,
    ),
    Row(
        "fishr",
        preset("fishr", 0.7),
        partial(on_environments, features=True),
        partial(on_environments, features=True, graph=True),
        (of_variance(0.7),),
        scene=partial(images, 3),
        per_sample=False,
        groups=2,
    ),
    Row(
        "gnp",
        lambda **axes: gpkit.gnp(r=0.3, alpha=0.7, **axes),
        on_weights,
        None,
        (of_gnp(0.3, 0.7),),
        scene=partial(images, 3),
        where=("real", "real"),
        per_sample=False,
        consistent=False,
    ),
    Row(
        "cure",
        preset("cure", 0.7, h=0.4),
        on_losses,
        None,
        (of_cure(0.7, 0.4),),
        scene=partial(images, 3),
        where=("real", "moved"),
    ),
    *map(input_row, ("l2", "l1", "linf")),
    Row(
        "jacobian",
        preset("jacobian", 0.7, estimator="exact"),
        on_outputs,
        outputs_graph,
        (of_inputs(0.7, lambda n: n**2 / 2),),
        scene=partial(images, 3),
    ),
    Row(
        "spectral_jacobian",
        preset("spectral_jacobian", 0.7, estimator=gpkit.power_iteration(60)),
        on_outputs,
        outputs_graph,
        (of_spectrum(0.7),),
        scene=partial(images, 3),
        twice=False,
    ),
    Row(
        "contractive",
        preset("contractive", 0.7, activation="1", estimator="exact"),
        on_outputs,
        hidden_graph,
        (of_hidden(0.7),),
        scene=partial(images, 3),
    ),
    Row(
        "curvature",
        preset("curvature", 0.7),
        on_outputs,
        outputs_graph,
        (of_inputs(0.7, lambda n: n**2, order=2),),
    ),
    Row(
        "curvature_order3",
        preset("curvature", 0.7, order=3),
        on_outputs,
        outputs_graph,
        (of_inputs(0.7, lambda n: n**2, order=3),),
        scene=partial(vectors, 2),
    ),
    Row(
        "eikonal",
        preset("eikonal", 0.7),
        on_outputs,
        outputs_graph,
        (of_inputs(0.7, lambda n: (n - 1) ** 2),),
    ),
    Row(
        "path_length",  # of one product with a Gaussian, and a moving average: test_path_length.py
        preset(
            "path_length",
            7.0,
            every=1,
            estimator="exact",
            form=gpkit.two_sided(gpkit.running_average(1.0, 1.5)),
        ),
        on_outputs,
        None,
        (of_inputs(7.0, lambda n: (n - 1.5) ** 2),),
        scene=partial(images, 3),
    ),
    Row(
        "wgan_gp",
        preset("wgan_gp", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: (n - 1) ** 2),),
        where=("between",),
    ),
    Row(
        "wgan_lp",
        preset("wgan_lp", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: (n - 1).clamp(min=0) ** 2),),
        where=("between",),
    ),
    Row(
        "r1",
        preset("r1", 7.0),
        on_critic,
        outputs_graph,
        (of_inputs(7.0, lambda n: n**2 / 2),),
    ),
    Row(
        "r2",
        preset("r2", 7.0),
        on_critic,
        partial(outputs_graph, of="fake"),
        (of_inputs(7.0, lambda n: n**2 / 2),),
        where=("fake",),
    ),
    Row(
        "r1_r2",
        preset("r1_r2", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: n**2),),  # 7/2 of two means of B are 7 of the mean of 2 B
        where=("real+fake",),
        points=2,
    ),
    Row(
        "dragan",
        preset("dragan", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: (n - 1) ** 2),),
        where=("near",),
    ),
    Row(
        "zero_gp",
        preset("zero_gp", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: n**2),),
        where=("between",),
    ),
    Row(
        "wgan_div",
        preset("wgan_div", 3.0),
        on_critic,
        None,
        (of_inputs(3.0, lambda n: n**6),),
        where=("between",),
    ),
    Row(
        "max_gp",
        preset("max_gp", 7.0),
        on_critic,
        None,
        (of_inputs(7.0, lambda n: n**2),),
        where=("between",),
        reduce=torch.max,
    ),
    Row(
        "duq",
        preset("duq", 0.7),
        on_outputs,
        outputs_graph,
        (of_inputs(0.7, lambda n: (n - 1) ** 2, of=lambda output: output.sum()),),
        scene=partial(images, 3),
    ),
    Row(
        "hessian",
        preset("hessian", 0.3, estimator="exact"),
        on_weights,
        weights_graph,
        (of_weights(0.3, order=2),),
        scene=vectors,
        per_sample=False,
    ),
    Row(
        "sum",
        lambda **axes: gpkit.sum(
            {"r1": {"weight": 7.0, **axes}, "mine": {"preset": "r2", "weight": 3.0, **axes}}
        ),
        on_critic,
        None,
        (
            of_inputs(7.0, lambda n: n**2 / 2),
            of_inputs(3.0, lambda n: n**2 / 2, z_index=1),
        ),
        where=("real", "fake"),
    ),
]


def rows(choose: Callable[[Row], Any] = lambda row: True) -> pytest.MarkDecorator:
    """Run a test for every row of the table, or for those chosen."""
    chosen = [row for row in ROWS if choose(row)]
    return pytest.mark.parametrize("row", chosen, ids=[row.name for row in chosen])


def each_terms(terms: Any) -> list[Terms]:
    """Return the terms of a penalty, or of each part of a sum."""
    return list(terms.values()) if isinstance(terms, dict) else [terms]


def gradients(value: Tensor, net: nn.Module) -> Tensor:
    """Return the gradient in all parameters, ``[n]``; zero where there is none."""
    grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True)
    pairs = zip(grads, net.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def relative_error(found: Tensor, true: Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()
