"""The penalty of a configuration, and its call, as users write it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gpkit
from gpkit.axes.at import computed, data, fake, real
from gpkit.estimators.curvature_difference import curvature_difference
from tests.property import compared, drawn
from tests.property.config import CENTERED, Config
from tests.property.estimates import taps
from tests.property.nets import KINDS
from tests.property.oracle import DECAY, each
from tests.property.problem import Problem, dimensions, losses

FORMS: dict[str, Any] = {
    "squared": gpkit.squared,
    "norm": gpkit.norm,
    "two_sided": gpkit.two_sided,
    "one_sided": gpkit.one_sided,
    "absolute": gpkit.absolute,
    "power": gpkit.power,
}


@dataclass
class Found:
    """What a penalty gave: one number, and the terms where the call returns them."""

    penalty: Tensor
    norms: Tensor | None = None
    values: Tensor | None = None


def points_of(c: Config) -> int:
    """Return the number of points."""
    return c.batch * {"mixture": 2, "triple": 3}.get(c.at, 1)


def groups(c: Config, p: Problem) -> int:
    """Return the number of groups G."""
    if c.in_weights:
        return c.batch if c.scope == "sample" else 1
    count = points_of(c)
    return count * (p.base[0][0][0, 0].numel() if c.scope == "pixel" else 1)


def form(c: Config, p: Problem) -> Any:
    if c.form == "function":
        return lambda n: (n - 1).tanh() + n**2 / 3
    options: dict[str, Any] = {"norm": c.norm, "scale": c.factor}
    if c.form != "squared":
        options["eps"] = c.eps
    if c.form == "power":
        return gpkit.power(c.exponent, **options)
    if c.form not in CENTERED:
        plain = c.norm == "l2" and c.factor == 1 and not c.eps
        return c.form if plain and c.seed % 2 else FORMS[c.form](**options)
    center: Any = c.center
    if c.centered == "tensor":
        center = torch.tensor(c.center, dtype=p.shift.dtype)
    elif c.centered == "each":
        center = each(c.center, groups(c, p)).to(p.shift.dtype)
    elif c.centered != "number":
        center = gpkit.running_average(DECAY, c.center, c.centered)
    return FORMS[c.form](center, **options)


def at(c: Config) -> Any:
    d = {"detach": c.detach}
    makes: dict[str, Callable[[], Any]] = {
        "real": lambda: real(**d),
        "fake": lambda: fake(**d),
        "interpolate": lambda: gpkit.interpolate(**d),
        "uniform": lambda: gpkit.uniform(drawn.LOW, drawn.HIGH, **d),
        "mixture": lambda: gpkit.mixture(real(**d), fake(**d)),
        "triple": lambda: gpkit.mixture(
            real(**d), gpkit.uniform(drawn.LOW, drawn.HIGH), gpkit.interpolate(**d)
        ),
        "perturb_normal": lambda: gpkit.perturb(drawn.SCALE, **d),
        "perturb_uniform": lambda: gpkit.perturb(drawn.SCALE, noise="uniform", **d),
        "perturb_relative": lambda: gpkit.perturb(drawn.SCALE, relative=True, **d),
        "perturb_along": lambda: gpkit.perturb(drawn.SCALE, relative=True, along=True, **d),
    }
    if c.at == "box":
        x = torch.zeros(1, KINDS[c.net].shapes[0][-1])
        return gpkit.uniform(drawn.low(x).tolist(), drawn.high(x), **d)
    if c.at == "midpoint":
        return computed(midpoint, **d)
    if c.at == "data":
        return "data" if c.detach else data(**d)
    return c.at if c.detach and c.at in ("real", "fake", "interpolate") else makes[c.at]()


def midpoint(x: Any, y: Any) -> Any:
    if isinstance(x, Tensor):
        return (x + y) / 2
    return [(a + b) / 2 for a, b in zip(x, y, strict=True)]


def estimator(c: Config) -> Any:
    makes: dict[str, Callable[[], Any]] = {
        "projection": lambda: gpkit.projection(c.count, c.distribution),
        "taylor": lambda: gpkit.taylor(c.count, c.distribution),
        "power_iteration": lambda: gpkit.power_iteration(c.count),
        "finite_difference": lambda: gpkit.finite_difference(c.length, c.side, cross_kinks=c.cross),
        "curvature_difference": lambda: curvature_difference(c.length or 1.5),
        "random_difference": lambda: gpkit.random_difference(c.length or 0.01, c.count),
        "jvp": lambda: gpkit.jvp(c.count, c.distribution),
        "stencil": lambda: gpkit.stencil(c.length or 1e-3, taps(c)),
    }
    return makes[c.estimator]() if c.estimator in makes else c.estimator


OF: dict[str, Any] = {
    "column": lambda y: y.reshape(len(y), -1)[:, 0],
    "total": lambda y: y.reshape(len(y), -1).sum(1),
    "logits": lambda y: y["logits"],
    "activation": gpkit.activation("act"),
}


def penalty(c: Config, p: Problem) -> gpkit.GradientPenalty:
    wrt: Any = c.wrt
    if c.wrt.startswith("weight:"):
        wrt = gpkit.weights(c.wrt.partition(":")[2])
    elif c.wrt == "activation":
        wrt = gpkit.activation("act")
    elif c.wrt == "activations":
        wrt = [gpkit.activation("body"), gpkit.activation("act")]
    return gpkit.GradientPenalty(
        of=OF.get(c.of, c.of),
        wrt=wrt,
        scope=c.scope,
        order=c.order,
        form=form(c, p),
        at=at(c),
        estimator=estimator(c),
        forward=c.forward,
        reduce=c.reduce,
        metric=compared.factor if c.metric == "axis" else None,
        weight=c.weight,
        every=c.every,
        seed=c.seed,
    )


class Calls:
    """One call of a penalty."""

    def __init__(self, c: Config, p: Problem) -> None:
        self.c, self.p, self.penalty = c, p, penalty(c, p)
        self.given: dict[str, Any] = {}
        if c.target or c.metric or c.weigh:
            m, shapes = dimensions(c, p)
            found = compared.given(c, shapes, m, points_of(c), p.shift, p.shift.dtype)
            self.given = compared.as_arguments(c, found, p.shift.dtype)

    def __call__(self) -> Found:
        half = self.c.dtype == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            return self.in_weights() if self.c.in_weights else self.in_inputs()

    def output(self, *xs: Tensor) -> Any:
        """Return the output of the net, as its user asks for it."""
        y = self.p.net(*xs)
        flat = self.c.flat and isinstance(y, Tensor)
        return y.squeeze(1) if flat and y.shape[1:] == (1,) else y

    def result(self, *xs: Tensor) -> Any:
        """Return the losses, or the output."""
        c, p, y = self.c, self.p, self.output(*xs)
        if c.of != "loss":
            return y
        y = y["logits"] if isinstance(y, dict) else y
        times = len(y) // len(p.target)
        found = losses(c, y, p.target.repeat(times, 1), p.labels.repeat(times))
        return found if c.flat else found.unsqueeze(1)

    def asked(self, f: Any, *args: Any, **samples: Any) -> Found:
        c = self.c
        samples |= self.given
        if c.call == "terms":
            terms = self.penalty.terms(f, *args, step=c.step, **samples)
            return Found(terms.penalty, terms.norms, terms.values)
        acts = c.seed % 2 and (c.step or 0) % c.every == 0
        if not acts:
            return Found(self.penalty(f, *args, step=c.step, scale=c.scaler, **samples))
        terms = self.penalty.act(f, *args, step=c.step, scale=c.scaler, **samples)
        return Found(terms.penalty, terms.norms, terms.values)

    def in_inputs(self) -> Found:
        c, p = self.c, self.p
        xs, ys = p.samples()
        if c.call == "tensor":
            return self.of_graph()
        named = c.of == "activation" or c.wrt.startswith("activation")
        plain = c.call in ("module", "terms") and c.of != "loss" and not c.flat
        f = p.net if plain else lambda *zs: self.result(*zs)
        more = (p.net,) if named and not plain else ()
        x, y = ((s if len(s) > 1 else s[0]) for s in (xs, ys))
        if c.at in ("data", "uniform", "box") or c.at.startswith("perturb"):
            if c.seed % 3 == 0 and not more:
                return self.asked(f, real=x)
            return self.asked(f, x, *more)
        return self.asked(f, *more, real=x, fake=y)

    def of_graph(self) -> Found:
        c, p = self.c, self.p
        xs = p.samples()[1 if c.at == "fake" else 0]
        xs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in xs)
        y, (body, h) = self.with_activations(*xs)
        if c.wrt.startswith("activation"):
            return self.asked(y, h if c.wrt == "activation" else (body, h))
        return self.asked(y, xs if len(xs) > 1 else xs[0])

    def with_activations(self, *xs: Tensor) -> tuple[Any, list[Tensor]]:
        """Return the result, and the outputs of body and act."""
        caught: dict[str, Tensor] = {}

        def catch(module: Any, args: Any, out: Any) -> None:
            caught["body" if module is self.p.net.body else "act"] = out

        hooks = [part.register_forward_hook(catch) for part in (self.p.net.body, self.p.net.act)]
        y = self.result(*xs)
        for hook in hooks:
            hook.remove()
        return y, [caught.get("body", caught["act"]), caught["act"]]

    def in_weights(self) -> Found:
        c, p = self.c, self.p
        xs = tuple(x.detach() for x in p.samples()[0])

        def closure() -> Any:
            y = self.result(*xs)
            return y.mean() if c.of == "loss" and c.mean else y

        listed = c.call.endswith("parameters")
        net: Any = p.net.parameters() if listed else p.net
        if c.call == "with_loss":
            return Found(self.penalty.with_loss(closure, net, step=c.step))
        return self.asked(closure() if c.call.startswith("tensor") else closure, net)
