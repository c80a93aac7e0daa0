"""What each penalty must be, as a function of the parameters: norms [G] and values [G]."""

from __future__ import annotations

from collections.abc import Callable

import oracles
import torch
import torch.nn.functional as F
from scenes import Scene, classes, squared_errors
from torch import Tensor, nn
from torch.func import functional_call

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


def of_compared(weight: float, *, mask: bool = False) -> Oracle:
    """‖∇f - fake‖, or the norm where fake > 0 of the gradient of the sum of log-probabilities."""

    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        def f(x: Tensor) -> Tensor:
            output = s.apply(params, x[None])[0]
            return output.log_softmax(0).sum() if mask else output[0]

        g = torch.func.vmap(torch.func.grad(f))(z[0])
        norms = (g * (s.fake > 0) if mask else g - s.fake).flatten(1).norm(dim=1)
        return weight, norms, norms**2

    return oracle


def of_change(weight: float, sigma: float) -> Oracle:
    """The change of the score between the two points, over σ."""

    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        change = (s.apply(params, z[-1]) - s.apply(params, z[0]))[:, 0]
        return weight, change.abs() / sigma, change**2

    return oracle


def of_quotients(weight: float, h: float) -> Oracle:
    """The norm of the central quotients, of the points in pairs: -h, then +h along each axis."""

    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        z = [p for p, last in zip(z, [None, *z], strict=False) if last is None or (p != last).any()]
        y = torch.stack([s.apply(params, points)[:, 0] for points in z])  # a first use repeats one
        n2 = ((y[1::2] - y[::2]) / (2 * h)).square().sum(0)
        return weight, n2.sqrt(), n2

    return oracle


def of_trace(weight: float) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        hessian = torch.func.hessian(lambda x: s.apply(params, x[None])[0, 0])
        norms = torch.stack([hessian(x).trace().abs() for x in z[0]])
        return weight, norms, norms

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


def of_activations(weight: float) -> Oracle:
    """‖(∂y/∂h, ∂y/∂k)‖ for the outputs h of the first layer and k of the second."""

    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        first, others = s.net[0], nn.Sequential(*s.net[2:])
        h = functional_call(first, {n[2:]: p for n, p in params.items() if n[0] == "0"}, (z[0],))
        own = {f"{int(n[0]) - 2}{n[1:]}": p for n, p in params.items() if n[0] not in "01"}

        def after(k: Tensor) -> Tensor:
            return functional_call(others, own, (k[None],))[0].sum()

        slopes = [
            torch.func.vmap(torch.func.grad(lambda h: after(torch.tanh(h))))(h),
            torch.func.vmap(torch.func.grad(after))(torch.tanh(h)),
        ]
        n2 = torch.stack([g.flatten(1).square().sum(1) for g in slopes]).sum(0)
        return weight, n2.sqrt(), n2

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
        return weight, by_environment(s, slope, z[0]).abs(), values

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
        values = (variances - variances.mean(0)).square().mean(1)
        return weight, values.detach().sqrt(), values

    return oracle


def of_spectrum(weight: float) -> Oracle:
    def oracle(s: Scene, params: oracles.Params, z: list[Tensor]) -> tuple[float, Tensor, Tensor]:
        norms = oracles.spectral_norms(lambda x: s.apply(params, x[None])[0], z[0])
        return weight, norms, norms**2

    return oracle
