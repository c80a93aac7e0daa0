"""What each estimator must give, from the full derivative and the numbers that were drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.property.config import Config
from tests.property.drawn import Draws


@dataclass
class Field:
    """A derivative ``D [G, m, n, ..., n]`` in n variables, which lie in parts of some shapes."""

    D: Tensor
    sizes: list[int]
    shapes: list[Any]
    flat: Tensor  # the variables: [G, n], or [n]
    value: Callable[[Tensor], Tensor] | None  # [G, n] -> [G, m], inputs only
    gradient: Callable[[Tensor], Tensor] | None  # [G, n] -> [G, n], inputs only
    slopes: Any = None  # weights only: [n] -> gradients in all leaves
    leaves: Any = None
    target: Tensor | None = None  # g, in the shape of D, or [1, ...]
    metric: Tensor | None = None  # A, which broadcasts to D
    each_group: bool = False  # whether each group draws its own numbers, one after another


def root(n2: Tensor) -> Tensor:
    """Return √n², with derivative zero at zero."""
    positive = n2 > 0
    return torch.where(positive, torch.where(positive, n2, 1.0).sqrt(), 0.0)


def squared(entries: Tensor, norm: str) -> Tensor:
    """Return n² ``[G]`` of entries ``[G, ...]``."""
    entries = entries.flatten(1)
    if norm == "l2":
        return (entries * entries).sum(1)
    if norm == "l1":
        return entries.abs().sum(1) ** 2
    return entries.abs().amax(1) ** 2


def difference(f: Field) -> Tensor:
    """Return A ∘ (D - g)."""
    D = f.D if f.target is None else f.D - f.target
    return D if f.metric is None else D * f.metric


def squared_norms(c: Config, f: Field, draws: Draws) -> Tensor:
    """Return n² ``[G]``, with its graph."""
    if c.estimator == "exact":
        return squared(pixels(f, difference(f)) if c.scope == "pixel" else difference(f), c.norm)
    if c.estimator == "finite_difference":
        return of_difference(c, f)
    return ESTIMATES[c.estimator](c, f, draws)


def pixels(f: Field, D: Tensor) -> Tensor:
    """Return ``[B, m, n]`` as ``[B·P, m, channels]``."""
    found = []
    for part, shape in zip(D.split(f.sizes, 2), f.shapes, strict=True):
        part = part.reshape(*part.shape[:2], shape[0], -1)  # [B, m, C, P]
        found.append(part.permute(0, 3, 1, 2).flatten(0, 1))
    return torch.cat(found, 2)


def directions(c: Config, f: Field, shapes: list[int], draws: Draws) -> Tensor:
    """Return v ``[G, sum of shapes]``: drawn for all groups at once, or for one after another."""
    groups = 1 if f.each_group else len(f.D)
    v = torch.cat([draws.normal(groups, n) for n in shapes], 1)
    if c.distribution == "rademacher":
        v = torch.where(v < 0, -1.0, 1.0).double()
    elif c.distribution == "sphere":
        v = v / v.norm(dim=1, keepdim=True) * v.shape[1] ** 0.5
    return v


def by_group(estimate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let groups that draw one after another be estimated one after another."""

    def estimated(c: Config, f: Field, draws: Draws) -> Tensor:
        if not f.each_group:
            return estimate(c, f, draws)
        one = [replace(f, D=D[None]) for D in f.D]
        return torch.cat([estimate(c, field, draws) for field in one])

    return estimated


@by_group
def of_projection(c: Config, f: Field, draws: Draws) -> Tensor:
    """Mean over j of ‖∇ D_v ... D_v <v, f>‖²."""
    m, total = f.D.shape[1], 0.0
    count = c.count if c.order > 1 or m > 1 else 1
    for _ in range(count):
        rows = f.D.new_ones(len(f.D), 1) if m == 1 else directions(c, f, [m], draws)
        D = f.D if f.target is None else f.D - f.target
        found = (D * rows.reshape(*rows.shape, *[1] * (f.D.ndim - 2))).sum(1)  # [G, n, ..., n]
        found = found if f.metric is None else found * f.metric[:, 0]
        for _ in range(c.order - 1):
            alone = f.sizes == [1]
            v = f.D.new_ones(len(f.D), 1) if alone else directions(c, f, f.sizes, draws)
            found = (found * v.reshape(*v.shape, *[1] * (found.ndim - 2))).sum(1)
        found = pixels(f, found[:, None]) if c.scope == "pixel" else found
        total = total + squared(found, "l2")
    return total / count


def of_taylor(c: Config, f: Field, draws: Draws) -> Tensor:
    """Mean over j of Σ_o (D^k f_o[v, ..., v])²."""
    alone, total = sum(f.sizes) == 1, 0.0
    count = 1 if alone else c.count
    for _ in range(count):
        v = directions(c, f, f.sizes, draws)
        v = torch.ones_like(v) if alone else v
        found = f.D
        for _ in range(c.order):
            found = (found * v.reshape(len(v), 1, -1, *[1] * (found.ndim - 3))).sum(2)
        total = total + squared(found, "l2")
    return total / count


@by_group
def of_gaussian(c: Config, f: Field, draws: Draws) -> Tensor:
    """Σ over the variables of ‖Jᵀy‖² / L."""
    y = draws.normal(len(f.D), f.D.shape[1])
    pulled = (f.D * y[:, :, None]).sum(1)
    parts = zip(pulled.split(f.sizes, 1), f.shapes, strict=True)
    rows = [1 if f.each_group else torch.Size(shape[:-1]).numel() for _, shape in parts]
    parts = zip(pulled.split(f.sizes, 1), rows, strict=True)
    return torch.stack([(part**2).sum(1) / n for part, n in parts]).sum(0)


@by_group
def of_power(c: Config, f: Field, draws: Draws) -> Tensor:
    """‖Jᵀu‖², u ∝ J Jᵀ w of the best w in the span of u₁, JJᵀu₁, ..."""
    J, m = f.D, f.D.shape[1]
    if m == 1:
        return squared(J, "l2")
    u1 = draws.normal(len(J), m)
    K = (J @ J.mT).detach()  # [G, m, m]
    vectors = [u1]
    for _ in range(min(c.count, m) - 1):
        vectors.append((K @ vectors[-1].unsqueeze(2)).squeeze(2))
        vectors[-1] = vectors[-1] / vectors[-1].norm(dim=1, keepdim=True).clamp(min=1e-300)
    basis = torch.linalg.qr(torch.stack(vectors, 2))[0]  # [G, m, K]
    best = torch.linalg.eigh(basis.mT @ K @ basis)[1][:, :, -1:]
    u = K @ basis @ best
    u = u / u.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return squared(J.mT @ u, "l2")


def of_curvature(c: Config, f: Field, draws: Draws) -> Tensor:
    """‖∇f(x + h z) - ∇f(x)‖², z the unit vector of the signs."""
    assert f.gradient is not None
    here = f.gradient(f.flat)
    signs = here.detach().sign()
    z = signs / signs.norm(dim=1, keepdim=True).clamp(min=1)
    there = f.gradient(f.flat + (c.length or 1.5) * z)
    return squared(there - here, c.norm)


def of_steps(c: Config, f: Field, draws: Draws) -> Tensor:
    """Mean over j of ‖(f(x + σ A ∘ ε) - f(x)) / σ - <g, A ∘ ε>‖²."""
    assert f.value is not None
    sigma, total = c.length or 0.01, 0.0
    for _ in range(c.count):
        parts = [draws.normal(len(f.D), *shape).reshape(len(f.D), -1) for shape in f.shapes]
        u = scaled(f, torch.cat(parts, 1))
        change = (f.value(f.flat + sigma * u) - f.value(f.flat)) / sigma
        total = total + squared(change - aimed(f, u), "l2")
    return total / c.count


def of_jvp(c: Config, f: Field, draws: Draws) -> Tensor:
    """Mean over j of ‖J (A ∘ v) - <g, A ∘ v>‖²."""
    total = 0.0
    for _ in range(c.count):
        u = scaled(f, directions(c, f, f.sizes, draws))
        total = total + squared((f.D @ u.unsqueeze(2)).squeeze(2) - aimed(f, u), "l2")
    return total / c.count


def scaled(f: Field, v: Tensor) -> Tensor:
    """Return A ∘ v ``[G, n]``."""
    return v if f.metric is None else v * f.metric[:, 0]


def aimed(f: Field, u: Tensor) -> Tensor:
    """Return <g, u> ``[G, m]``."""
    return u.new_zeros(()) if f.target is None else (f.target @ u.unsqueeze(2)).squeeze(2)


def of_stencil(c: Config, f: Field, draws: Draws) -> Tensor:
    """The norm of A ∘ (D - g), with D by differences along each axis."""
    assert f.value is not None
    h, columns = c.length or 1e-3, []
    for i in range(f.flat.shape[1]):
        e = torch.zeros_like(f.flat[0])
        e[i] = h
        ends = {k: f.value(f.flat + k * e) for k in (-2, -1, 1, 2)}
        two, four = ends[1] - ends[-1], ends[2] - ends[-2]
        columns.append(two / (2 * h) if taps(c) == 2 else (8 * two - four) / (12 * h))
    entries = difference(replace(f, D=torch.stack(columns, 2)))
    return squared(pixels(f, entries) if c.scope == "pixel" else entries, c.norm)


def taps(c: Config) -> int:
    """Return the number of points of a stencil."""
    return 2 if c.count % 2 else 4


ENDS = {"forward": (0.0, 1.0), "backward": (-1.0, 0.0), "central": (-1.0, 1.0)}


def of_difference(c: Config, f: Field) -> Tensor:
    """The quotient over a given step; over the default step, the derivative itself."""
    if c.length is None:
        return squared(difference(f), c.norm)
    whole = difference(f)[:, 0]  # A ∘ (∇f - g), [G, n]
    n2 = squared(whole, c.norm)
    v = steepest(whole.detach(), c.norm)
    h = c.length / v.norm(dim=1, keepdim=True).clamp(min=1e-300)  # h‖v‖ is the step
    u = v if f.metric is None else v * f.metric[:, 0]
    a, b = ENDS[c.side]
    if f.value is not None:
        ends = [f.value(f.flat + s * h * u)[:, 0] for s in (a, b)]
        quotient = (ends[1] - ends[0]) / ((b - a) * h[:, 0])
        if f.target is not None:
            quotient = quotient - (f.target[:, 0] * u).sum(1)
        return torch.where(n2 > 0, quotient, 0.0) ** 2
    found = []
    for i in range(len(v)):  # n is exact, and its gradient is a quotient of gradients
        value, n = n2[i].detach(), root(n2[i]).detach()
        if value > 0:
            moved = [(f.flat + s * h[i] * u[i]).detach() for s in (a, b)]
            before, after = (f.slopes(vector) for vector in moved)
            for name, leaf in f.leaves.items():
                if name in before:
                    slope = (after[name][i] - before[name][i]).detach() / ((b - a) * h[i])
                    value = value + (2 * n * slope * (leaf - leaf.detach())).sum()
            if f.target is not None:
                g = f.target[i if len(f.target) > 1 else 0, 0]
                value = value - 2 * n * ((g - g.detach()) * u[i]).sum()
        found.append(value)
    return torch.stack(found)


def steepest(g: Tensor, norm: str) -> Tensor:
    """Return v with <g, v> = ‖g‖."""
    if norm == "l2":
        length = g.norm(dim=1, keepdim=True)
        return torch.where(length > 0, g / length.clamp(min=1e-300), 0.0)
    if norm == "l1":
        return g.sign()
    top = g.sign() * (g.abs() == g.abs().amax(1, keepdim=True))
    return top / top.abs().sum(1, keepdim=True).clamp(min=1)


ESTIMATES: dict[str, Callable[..., Tensor]] = {
    "projection": of_projection,
    "taylor": of_taylor,
    "gaussian_product": of_gaussian,
    "power_iteration": of_power,
    "curvature_difference": of_curvature,
    "random_difference": of_steps,
    "jvp": of_jvp,
    "stencil": of_stencil,
}
