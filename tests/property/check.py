"""One comparison of a penalty with the oracle, and what a penalty may not touch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.property.calls import Calls, Found
from tests.property.config import Config
from tests.property.drawn import Draws
from tests.property.oracle import Expected, Oracle, real
from tests.property.problem import Problem, problem
from tests.property.refusals import UNTRAINED, advised

QUIET = (
    ".*random estimate of n²",  # the oracle bends the same estimate
    # Of nets with batch norm in training mode; the oracle takes the same coupled gradient.
    "the outputs of a batch depend on each other",
    "the norms of each sample's gradient take a backward pass",  # slower, and right
)


@dataclass
class Outcome:
    """ "same", "skipped" (a step on which a lazy penalty does not act), or "refused"."""

    kind: str
    message: str = ""


def check(c: Config) -> Outcome:
    """Compare value, norms and gradients.

    Raises:
        AssertionError: if they differ; the message has the configuration.
    """
    p, draws = problem(c), Draws()
    for q in p.net.parameters():
        q.grad = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for text in QUIET:
                warnings.filterwarnings("ignore", text)
            calls = Calls(c, p)
            if c.again:
                with draws.recorded():
                    calls()
                trained(p)
                draws.kept.clear()
            with draws.recorded(), untouched(c, p):
                found = calls()
    except (TypeError, ValueError, RuntimeError, UserWarning) as error:
        if UNTRAINED in str(error):
            require_untrained(c, p, draws)
        return Outcome("refused", f"{type(error).__name__}: {error}")
    if c.call not in ("terms", "with_loss") and (c.step or 0) % c.every:
        require(c, float(found.penalty) == 0, "zero on a skipped step", found.penalty)
        return Outcome("skipped")
    compare(c, p, found, draws)
    return Outcome("same")


def trained(p: Problem) -> None:
    """Move the weights, as a step of training does."""
    with torch.no_grad():
        for q in p.net.parameters():
            q.mul_(1.1)
    p.twin.load_state_dict(p.net.state_dict())


def followed(c: Config, outcome: Outcome) -> Outcome:
    """Return what the advice of refusals leads to, step by step.

    Raises:
        AssertionError: if a refusal comes back, or there are more than eight.
    """
    seen: list[str] = []
    while outcome.kind == "refused":
        require(c, outcome.message not in seen and len(seen) < 8, "advice that helps", seen)
        seen.append(outcome.message)
        next_one = advised(c, outcome.message)
        if next_one is None:
            return outcome
        c, outcome = next_one, check(next_one)
    return outcome


def require_untrained(c: Config, p: Problem, draws: Draws) -> None:
    """A penalty that is refused because it trains nothing must have no gradient."""
    loss = c.call == "with_loss"
    if not loss and (c.step or 0) % c.every == 0:
        expected = expectation(c, Oracle(c, p, draws))
        largest = max(float(g.abs().max()) for n, g in expected.grads.items() if n != "generator")
        require(c, largest < 1e-12, "a penalty, which trains the net", "a refusal")


def compare(c: Config, p: Problem, found: Found, draws: Draws) -> None:
    skipped = (c.step or 0) % c.every != 0 and c.call == "with_loss"
    acts = c.call != "terms"
    oracle = Oracle(c, p, draws)
    expected = loss_alone(oracle) if skipped else expectation(c, oracle, acts=acts)
    value, grad = tolerances(c)
    for name in ("norms", "values", "penalty"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        if mine is not None:
            near(c, name, mine.detach().double(), theirs, value)
    if expected.close < 10 * value:  # at the kink of a form rounding decides
        return
    leaves = {**p.parameters, "generator": p.shift}
    given = [None] * len(leaves)
    if found.penalty.requires_grad:
        given = torch.autograd.grad(found.penalty, list(leaves.values()), allow_unused=True)
    whole = torch.cat([real(g).reshape(-1) for g in expected.grads.values()])
    mine = torch.cat([
        real(torch.zeros_like(q) if g is None else g).reshape(-1).double()
        for g, q in zip(given, leaves.values(), strict=True)
    ])  # fmt: skip
    near(c, f"gradient in {', '.join(leaves)}", mine, whole, grad)


def expectation(c: Config, oracle: Oracle, *, acts: bool = True) -> Expected:
    try:
        return oracle.expected(acts=acts, loss=c.call == "with_loss")
    except AssertionError as error:  # of the numbers that were drawn
        raise AssertionError(f"{error}\n{c!r}") from error


def loss_alone(oracle: Oracle) -> Expected:
    xs = tuple(x.detach() for x in oracle.real)
    total = oracle.columns(oracle.params, xs, oracle.extras(xs)).mean()
    leaves = oracle.leaves
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    grads = {
        n: torch.zeros_like(q) if g is None else g
        for (n, q), g in zip(leaves.items(), found, strict=True)
    }
    empty = torch.zeros(0)
    return Expected(empty, empty, total.detach(), grads, 1.0)


def tolerances(c: Config) -> tuple[float, float]:
    """Return relative tolerances of values and of gradients."""
    if c.dtype == "bfloat16":
        return 0.1, 0.4
    if c.dtype == "float32":
        if c.estimator == "curvature_difference":  # of two gradients that are close
            return 0.03, 0.1
        if c.estimator in ("random_difference", "stencil"):
            return (5e-3, 2e-2) if c.length else (5e-2, 0.2)
        if c.estimator == "finite_difference":
            return (1e-4, 0.1) if c.length is None else (2e-3, 2e-2)  # gpkit warns from 10 % on
        return (2e-4, 1e-3) if c.order == 1 else (0.03, 0.05)  # saturated units cancel
    if c.estimator == "finite_difference":
        return 1e-9, 1e-4 if c.length is None else 1e-6
    return (1e-7, 1e-6) if c.estimator in ("random_difference", "stencil") else (1e-8, 1e-7)


def near(c: Config, what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    require(
        c, found.shape == expected.shape, f"{what} of shape {list(expected.shape)}", found.shape
    )
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    floor = 0.02 if c.dtype == "bfloat16" else 1e-5 if c.dtype == "float32" else 1e-9
    apart = (found - expected).abs() if expected.numel() else found.new_zeros(1)
    gap = float(apart.max())
    if c.dtype == "bfloat16":  # three digits: single entries are not compared
        scale, gap = float(expected.norm()), float(apart.norm())
    if not gap <= tolerance * scale + floor * tolerance_floor(c):
        far = f"{gap / (scale or 1):.1e} apart"
        raise AssertionError(
            f"{what}: expected {expected.tolist()}, found {found.tolist()}, {far}\n{c!r}"
        )


def tolerance_floor(c: Config) -> float:
    return c.weight * c.every * c.factor


def require(c: Config, right: bool, what: str, found: object) -> None:
    if not right:
        raise AssertionError(f"expected {what}; found {found}\n{c!r}")


@contextmanager
def untouched(c: Config, p: Problem) -> Iterator[None]:
    """A context that must not change gradients, buffers, random numbers, or what is trained."""
    before = {n: b.clone() for n, b in p.net.named_buffers()}
    trained = [q.requires_grad for q in p.net.parameters()]
    weights = [q.detach().clone() for q in p.net.parameters()]
    random = torch.get_rng_state()
    yield
    moved = [n for n, b in p.net.named_buffers() if not torch.equal(b, before[n])]
    live = c.forward == "training" or c.call.startswith("tensor") or c.call == "with_loss"
    require(c, live or not moved, "the same buffers", moved)
    require(c, trained == [q.requires_grad for q in p.net.parameters()], "requires_grad", trained)
    same = [torch.equal(a, b) for a, b in zip(weights, p.net.parameters(), strict=True)]
    require(c, all(same), "the same weights", same)
    require(c, all(q.grad is None for q in p.net.parameters()), "no .grad", "one")
    require(c, torch.equal(random, torch.get_rng_state()), "the same random state", "another")
