"""The formula, word by word, by `torch.func` in float64. It never imports gpkit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, jacrev

from tests.property import compared, drawn, estimates
from tests.property.config import CENTERED, Config
from tests.property.drawn import Draws
from tests.property.nets import KINDS
from tests.property.problem import Problem, generated, losses
from tests.support import oracles

DECAY = 0.9  # of running averages
Params = dict[str, Tensor]


@dataclass
class Expected:
    """What a penalty must be: n ``[G]``, values ``[G]``, one number, and its gradients by name."""

    norms: Tensor
    values: Tensor
    penalty: Tensor
    grads: Params
    close: float  # how near the values are to a kink of the form, relative to the centre


class Oracle:
    """The derivatives of one problem, as functions of the parameters."""

    def __init__(self, c: Config, p: Problem, draws: Draws) -> None:
        self.c, self.twin, self.draws, self.kind = c, p.twin, draws, KINDS[c.net]
        self.params = {n: wide(q.detach()) for n, q in p.twin.named_parameters()}
        self.leaves = {n: self.params[n].requires_grad_() for n in p.parameters}
        self.buffers = {n: b.detach().clone() for n, b in p.twin.named_buffers()}
        self.leaves["generator"] = p.shift.detach().double().requires_grad_()
        self.target, self.labels, self.dtype = p.target.double(), p.labels, p.shift.dtype
        base = [[x.double() if x.is_floating_point() else x for x in xs] for xs in p.base]
        self.real, self.fake = generated(base, self.leaves["generator"])
        self.drawn: Tensor | None = None

    # y, as [B, m]

    def run(
        self, params: Params, xs: Any, given: dict[str, Tensor], caught: dict[str, Tensor]
    ) -> Any:
        """Return the output of the net, with outputs of submodules replaced, and caught."""
        with ExitStack() as stack:
            for name in {"act", "body"}:

                def hook(module: Any, args: Any, out: Any, name: str = name) -> Any:
                    caught[name] = given.get(name, out)
                    if name + "'" in given:  # moved by z - h, and still a function of the body
                        caught[name] = out + given[name + "'"] - given[name + "''"]
                    return caught[name]

                part = getattr(self.twin, name)
                stack.callback(part.register_forward_hook(hook).remove)
            return functional_call(self.twin, {**params, **self.buffers}, tuple(xs))

    def columns(self, params: Params, xs: Any, extra: Any, given: Any = None) -> Tensor:
        """Return what is differentiated, ``[B, m]``."""
        c, caught = self.c, {}
        y = self.run(params, xs, given or {}, caught)
        y = y["logits"] if isinstance(y, dict) else y
        target, labels, drawn = extra
        if c.of == "activation":
            y = caught["act"]
        elif c.of == "loss":
            y = losses(c, y, target, labels)
        elif c.of == "sampled_loss":
            y = F.cross_entropy(y, drawn, reduction="none")
        elif c.of == "column":
            y = y.reshape(len(y), -1)[:, 0]
        elif c.of == "total":
            y = y.reshape(len(y), -1).sum(1)
        return y.reshape(len(y), -1)

    def extras(self, xs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return targets, labels and labels drawn from the model, for each of the points."""
        times = len(xs[0]) // len(self.target)
        target, labels = self.target.repeat(times, 1), self.labels.repeat(times)
        if self.c.of != "sampled_loss":
            return target, labels, labels
        if self.drawn is None:
            with torch.no_grad():
                logits = self.run(self.params, xs, {}, {})
            below = logits.softmax(1).cumsum(1)
            u = self.draws.uniform(len(logits)).double()
            self.drawn = torch.stack(
                [(below[:, k] <= u).long() for k in range(logits.shape[1] - 1)]
            ).sum(0)
        return target, labels, self.drawn

    # derivatives

    def derivatives(self) -> estimates.Field:
        """Return the full derivative ``[G, m, n, ..., n]``, and the functions around it."""
        return self.in_weights() if self.c.in_weights else self.in_inputs()

    def in_inputs(self) -> estimates.Field:
        c, params = self.c, self.params
        xs = drawn.chosen(c, self.real, self.fake, self.draws)
        extra = self.extras(xs)
        coupled = self.kind.coupled and self.twin.training
        if c.wrt == "activations":
            caught: Params = {}
            self.run(params, xs, {}, caught)
            zs = (caught["body"], caught["act"])
            inputs = (*xs, caught["act"])

            def of(zs: Any, extra: Any, inputs: Any) -> Tensor:
                moved = {"body": zs[0], "act'": zs[1], "act''": inputs[-1]}
                return self.columns(params, inputs[:-1], extra, moved)
        elif c.wrt == "activation":
            caught = {}
            self.run(params, xs, {}, caught)
            inputs, zs = xs, (caught["act"],)

            def of(zs: Any, extra: Any, inputs: Any) -> Tensor:
                return self.columns(params, inputs, extra, {"act": zs[0]})
        else:
            inputs, zs = xs, xs

            def of(zs: Any, extra: Any, inputs: Any) -> Tensor:
                return self.columns(params, zs, extra)

        shapes = [z.shape[1:] for z in zs]
        flat = torch.cat([z.reshape(len(z), -1) for z in zs], 1)
        sizes = [s.numel() for s in shapes]

        def parts(rows: Tensor) -> list[Tensor]:
            pieces = rows.split(sizes, 1)
            return [r.reshape(-1, *s) for r, s in zip(pieces, shapes, strict=True)]

        def batch(rows: Tensor) -> Tensor:
            return of(parts(rows), extra, inputs)

        def one(row: Tensor, *others: Tensor) -> Tensor:
            own = [o[None] for o in others]
            return of(parts(row[None]), own[:3], own[3:])[0]

        if coupled:
            D = oracles.coupled_derivative(batch, c.order, flat)
        else:
            D = oracles.derivative(one, c.order, flat, *extra, *inputs)

        def gradient(rows: Tensor) -> Tensor:
            return oracles.derivative(one, 1, rows, *extra, *inputs)[:, 0]

        field = estimates.Field(D, sizes, shapes, flat, batch, gradient)
        self.compare(field, zs, shapes, sizes)
        return field

    def compare(self, field: estimates.Field, zs: Any, shapes: Any, sizes: list[int]) -> None:
        """Let a derivative be compared with the target and the metric of the call."""
        c, (groups, m) = self.c, field.D.shape[:2]
        count = len(self.target) * {"mixture": 2, "triple": 3}.get(c.at, 1)
        found = compared.given(c, shapes, m, count, self.leaves["generator"], self.dtype)
        self.weights = found.weights
        lead = 1 if c.in_weights else groups
        if found.targets is not None:
            field.target = compared.entries(found.targets, (lead, m), sizes, c.order)
        if found.metrics is not None:
            field.metric = compared.entries(found.metrics, (1, 1), sizes, c.order)
        elif c.metric:
            factors = [compared.factor(z.detach()) for z in zs]
            field.metric = compared.entries(factors, (lead, 1), sizes, c.order)

    def in_weights(self) -> estimates.Field:
        c = self.c
        xs = tuple(x.detach() for x in self.real)
        pattern = c.wrt.partition(":")[2] or "*"
        chosen = [n for n in self.leaves if n != "generator" and fnmatchcase(n, pattern)]
        extra = self.extras(xs)
        shapes = [real(self.params[n]).shape for n in chosen]
        sizes = [s.numel() for s in shapes]
        flat = torch.cat([real(self.params[n]).reshape(-1) for n in chosen])
        count = len(self.target)
        weights = torch.ones(count, dtype=torch.float64)
        if c.weigh:
            weights = compared.sample_weights(c, count, self.dtype)

        def averaged(y: Tensor) -> Tensor:
            """Return the (weighted) mean of rows ``[B, ...]``, ``[1, ...]``."""
            return torch.tensordot(weights, y, 1)[None] / weights.sum()

        def own(vector: Tensor) -> Params:
            pieces = zip(chosen, vector.split(sizes), shapes, strict=True)
            return {n: like(piece.reshape(s), self.params[n]) for n, piece, s in pieces}

        def groups(vector: Tensor, params: Params) -> Tensor:
            y = self.columns({**params, **own(vector)}, xs, extra)
            return y if c.scope == "sample" else averaged(y)

        derivative: Callable[[Tensor], Tensor] = lambda v: groups(v, self.params)  # noqa: E731
        for _ in range(c.order):
            derivative = jacrev(derivative)

        def slopes(vector: Tensor) -> Params:
            """Return the gradients ``[G, ...]`` in all leaves, real, with moved weights."""
            moved = {n: q.detach() for n, q in self.params.items()} | own(vector)

            def loss(leaves: Params) -> Tensor:
                given = {n: like(leaf, moved[n]) for n, leaf in leaves.items()}
                return self.columns({**moved, **given}, xs, extra)[:, 0]

            names = [n for n in self.leaves if n != "generator"]
            found = jacrev(loss)({n: real(moved[n]) for n in names})  # [B, ...]
            return found if c.scope == "sample" else {n: averaged(g) for n, g in found.items()}

        field = estimates.Field(derivative(flat), sizes, shapes, flat, None, None)
        field.slopes, field.each_group = slopes, True
        field.leaves = {n: real(leaf) for n, leaf in self.leaves.items()}
        self.compare(field, [self.params[n] for n in chosen], shapes, sizes)
        return field

    # the formula

    def expected(self, *, acts: bool, loss: bool) -> Expected:
        """Return the penalty and its gradients.

        Args:
            acts: whether running averages are updated.
            loss: whether the loss of a weight penalty is added.
        """
        c = self.c
        n2 = estimates.squared_norms(c, self.derivatives(), self.draws)
        self.draws.require_used()
        n = estimates.root(n2)
        values, close = valued(c, n2, acts)
        reduced = {"mean": values.mean, "sum": values.sum, "max": values.amax}[c.reduce]()
        if c.weigh and (not c.in_weights or c.scope == "sample"):
            w = self.weights.repeat_interleave(len(values) // len(self.weights))
            reduced = (w * values).sum() / (w.sum() if c.reduce == "mean" else 1)
        penalty = c.weight * c.every * reduced
        if loss:
            xs = tuple(x.detach() for x in self.real)
            penalty = penalty + self.columns(self.params, xs, self.extras(xs)).mean()
        leaves = list(self.leaves.values())
        found: Any = [None] * len(leaves)
        if penalty.requires_grad:
            found = torch.autograd.grad(penalty, leaves, allow_unused=True)
        grads = {
            name: torch.zeros_like(q) if g is None else g
            for (name, q), g in zip(self.leaves.items(), found, strict=True)
        }
        return Expected(n.detach(), values.detach(), penalty.detach(), grads, close)


def wide(x: Tensor) -> Tensor:
    """Return a tensor in double precision."""
    return x.to(torch.complex128) if x.is_complex() else x.double()


def real(x: Tensor) -> Tensor:
    """Return a tensor with the real and imaginary parts of a complex one."""
    return torch.view_as_real(x) if x.is_complex() else x


def like(x: Tensor, other: Tensor) -> Tensor:
    """Return a tensor that is complex if another one is."""
    return torch.view_as_complex(x) if other.is_complex() else x


def valued(c: Config, n2: Tensor, acts: bool) -> tuple[Tensor, float]:
    """Return form(n) ``[G]``, and how near it is to a kink."""
    n2 = n2 + c.eps
    n = estimates.root(n2)
    if c.form == "squared":
        return c.factor * n2, 1.0
    if c.form == "norm":
        return c.factor * n, 1.0
    if c.form == "function":
        return (n - 1).tanh() + n**2 / 3, 1.0
    if c.form == "power":
        positive = n2 > 0
        return c.factor * torch.where(
            positive, torch.where(positive, n2, 1.0) ** (c.exponent / 2), 0.0
        ), 1.0
    assert c.form in CENTERED
    center: Any = c.center
    if c.centered == "each":
        center = each(c.center, len(n))
    elif c.centered in ("constant", "graph") and acts:
        mean = n.mean() if c.centered == "graph" else n.mean().detach()
        center = DECAY * c.center + (1 - DECAY) * mean
    away = n - center
    if c.form == "two_sided":
        values = away**2
    elif c.form == "one_sided":
        values = torch.clamp(away, min=0) ** 2
    else:
        values = away.abs()
    return c.factor * values, float((away.detach().abs() / (n.detach() + 1e-12)).min())


def each(center: float, groups: int) -> Tensor:
    """Return a centre for each norm."""
    return center + torch.arange(groups, dtype=torch.float64) / 8
