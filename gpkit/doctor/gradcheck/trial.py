"""Trial: a penalty, run with a copy of the net, again and again from the same state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import tree_leaves, tree_map_only
from gpkit.autodiff.isolation import double_backward
from gpkit.autodiff.random import bookmark, device_of, random_state, reseed, seeded, shared
from gpkit.autodiff.reached import values_of
from gpkit.autodiff.state import copied_net
from gpkit.doctor.gradcheck.turn import Turn
from gpkit.penalty import Penalty


@dataclass(frozen=True)
class Call:
    """A call of the net while the penalty ran.

    Args:
        args: its arguments, copied.
        kwargs: its keyword arguments, copied.
        variables: the places of the tensors that require grad, among all tensors.
        finite: whether the output was finite.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    variables: tuple[int, ...]
    finite: bool = True

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return tensors_of((self.args, self.kwargs))


@dataclass
class Run:
    """A run of the penalty.

    Args:
        value: the penalty.
        dtype: its dtype.
        graph: whether it depends on the parameters, as autograd sees it.
        gradient: its gradient in each parameter, by name; empty if it was not asked for.
        calls: the calls of the net.
        after: torch's random state at the end.
    """

    value: float
    dtype: torch.dtype
    graph: bool
    gradient: dict[str, Tensor] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    after: Tensor | None = None


class Trial:
    """A penalty with a copy of the net and of the samples, in one dtype.

    Args:
        fn: the penalty, ``fn(net, *samples, **named) -> scalar``.
        net: the net; it is copied.
        samples: tensors ``[B, ...]``, and whatever else the penalty takes.
        named: the same by keyword.
        dtype: the dtype of the copies; None is their own.
        evaluating: whether the copy is in eval mode.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        net: nn.Module,
        samples: tuple[Any, ...],
        named: Mapping[str, Any],
        dtype: torch.dtype | None = None,
        *,
        evaluating: bool = False,
    ) -> None:
        self.fn, self.dtype = fn, dtype
        self.given = net, samples, named
        self.net = copied_net(net)
        if dtype is not None:
            self.net.to(dtype)
        if evaluating:
            self.net.eval()
        self.samples, self.named = tree_map_only(Tensor, self._own, (samples, dict(named)))
        first = next(t for t in tensors_of((samples, named)) if t.ndim)
        self.device = device_of(first)
        self.batch, self.shape = len(first), first.shape[1:]
        self.params = {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        _, streams, _, others = values_of(fn)
        self.penalties = [v for v in others if isinstance(v, Penalty)]
        self.streams = [*streams, *shared()]

    def _own(self, x: Tensor) -> Tensor:
        to = self.dtype if x.is_floating_point() and self.dtype is not None else x.dtype
        return _copied(x.detach().to(to).requires_grad_(x.requires_grad))

    def like(self, **changed: Any) -> Trial:
        """Return a trial of the same penalty, with another dtype or mode, or another penalty."""
        net, samples, named = self.given
        fn = changed.pop("fn", self.fn)
        return Trial(fn, net, samples, named, **{"dtype": self.dtype, **changed})

    def run(
        self,
        seed: int = 0,
        *,
        gradient: bool = False,
        rows: Tensor | None = None,
        turn: Turn | None = None,
        at: list[Call] | None = None,
        scale: float = 1.0,
        outer: float = 1.0,
        within: Any = None,
        fused: bool = False,
    ) -> Run:
        """Run the penalty.

        Args:
            seed: what all random numbers are drawn from.
            gradient: whether to take its gradient.
            rows: the samples to take; None is all.
            turn: renumber the entries of each sample; the net turns them back.
            at: calls of another run: the net is evaluated at their points, whatever points the
                penalty chooses, and the derivatives are taken there.
            scale: a factor of the net's output.
            outer: a factor of the value, before its gradient is taken, which is divided by it.
            within: a context in which the penalty runs, such as autocast.
            fused: whether attention and recurrent nets may run on kernels that cannot be
                differentiated twice.

        Returns:
            What came out.

        Raises:
            TypeError: if the penalty returns no scalar.
        """
        samples, named = tree_map_only(Tensor, _copied, (self.samples, self.named))
        for change in (turn, None if rows is None else self._rows(rows)):
            if change is not None:
                samples, named = tree_map_only(Tensor, change, (samples, named))
        calls: list[Call] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            found = tensors_of((args, kwargs))
            variables = tuple(i for i, t in enumerate(found) if t.requires_grad)
            kept = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
            calls.append(Call(kept[0], kept[1], variables))
            then = at[min(len(calls), len(at)) - 1] if at else None
            return self._placed(args, kwargs, turn, then, rows)

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            kept, found = calls[-1], tensors_of(output)
            finite = all(_is_finite(t) for t in found if t.is_floating_point())
            calls[-1] = Call(kept.args, kept.kwargs, kept.variables, finite)
            return output if scale == 1 else tree_map_only(Tensor, lambda t: t * scale, output)

        with ExitStack() as stack:
            stack.enter_context(self._from_the_start(seed))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(nullcontext() if fused else double_backward())
            handles = (
                self.net.register_forward_pre_hook(before, with_kwargs=True),
                self.net.register_forward_hook(after, with_kwargs=True),
            )
            for handle in handles:
                stack.callback(handle.remove)
            with within if within is not None else ExitStack():
                value = scalar(self.fn(self.net, *samples, **named))
            end = random_state(self.device)[0]
            run = Run(float(value.detach()), value.dtype, value.requires_grad, {}, calls, end)
            if gradient:
                run.gradient = self._gradient(value, outer)
        return run

    def compares(self, calls: list[Call]) -> bool:
        """Whether the net's output for a sample depends on the other samples of the batch."""
        for call in calls:
            if all(len(t) == self.batch for t in call.tensors if t.ndim) and call.variables:
                rows = torch.arange((self.batch + 1) // 2, device=self.device)
                part = tree_map_only(Tensor, self._rows(rows), (call.args, call.kwargs))
                with torch.no_grad(), self._from_the_start(0):
                    whole = tensors_of(self.net(*call.args, **call.kwargs))
                    alone = tensors_of(self.net(*part[0], **part[1]))
                pairs = zip(whole, alone, strict=False)
                slack = 1e-6 if self.dtype == torch.float64 else 1e-3
                return not all(torch.allclose(a[: len(b)], b, slack, slack) for a, b in pairs)
        return False

    def value(self, seed: int = 0, **options: Any) -> float:
        """Return the value of a run."""
        return self.run(seed, **options).value

    def _gradient(self, value: Tensor, outer: float) -> dict[str, Tensor]:
        zeros = {name: torch.zeros_like(p) for name, p in self.params.items()}
        if not value.requires_grad:
            return zeros
        params = list(self.params.values())
        found = torch.autograd.grad(value * outer, params, allow_unused=True)
        taken = zip(zeros.items(), found, strict=True)
        return {name: zero if g is None else g.detach() / outer for (name, zero), g in taken}

    def _rows(self, rows: Tensor) -> Callable[[Tensor], Tensor]:
        def chosen(x: Tensor) -> Tensor:
            batched = x.ndim and len(x) == self.batch and x.shape != self.shape
            return x.detach()[rows].requires_grad_(x.requires_grad) if batched else x

        return chosen

    def _placed(
        self, args: Any, kwargs: Any, turn: Turn | None, at: Call | None, rows: Tensor | None
    ) -> Any:
        """Return the arguments of the net, turned back, or with the points of another run."""
        count = iter(range(10**6))

        def place(x: Tensor) -> Tensor:
            i = next(count)
            back = turn.back(x) if turn is not None else x
            if at is None or i not in at.variables:
                return back
            point = at.tensors[i]
            if rows is not None:  # those of real samples, then those of fake ones
                of_all = torch.arange(0, len(point), self.batch, device=rows.device)
                point = point[(of_all[:, None] + rows).flatten()]
            return point + (back - back.detach())

        return tree_map_only(Tensor, place, (args, kwargs))

    @contextmanager
    def _from_the_start(self, seed: int) -> Iterator[None]:
        """A context that draws from a seed, and puts states, random numbers and buffers back."""
        buffers = {name: b.clone() for name, b in self.net.named_buffers()}
        try:
            with self.drawing(seed):
                yield
        finally:
            with torch.no_grad():
                for name, b in self.net.named_buffers():
                    if name in buffers and b.shape == buffers[name].shape:
                        b.copy_(buffers[name])

    @contextmanager
    def drawing(self, seed: int) -> Iterator[None]:
        """A context that draws from a seed, and puts random numbers and states back."""
        streams = [bookmark(stream) for stream in self.streams]
        states = [p.state_dict() for p in self.penalties]
        try:
            with seeded(seed, self.device):
                for stream in self.streams:
                    reseed(stream, seed)
                for penalty in self.penalties:
                    penalty.seed = seed
                yield
        finally:
            for back in streams:
                back()
            for penalty, state in zip(self.penalties, states, strict=True):
                penalty.load_state_dict(state)


def _copied(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def scalar(value: Any) -> Tensor:
    """Return a penalty as a tensor without dimensions.

    Raises:
        TypeError: if it is not one number.
    """
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        shape = f" {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else ""
        raise TypeError(
            f"a penalty must return one real number; it returned {type(value).__name__}{shape}: "
            "reduce it, or wrap it, check_penalty(lambda net, x: fn(net, x)[0], ...)"
        )
    return value.reshape(())


def _is_finite(x: Tensor) -> bool:
    try:
        return bool(x.isfinite().all())
    except RuntimeError:  # under vmap a tensor has no value yet
        return True
