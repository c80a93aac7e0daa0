"""Run an extra forward pass without side effects, on kernels that have a double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from gpkit.autodiff.compat import attention_switch, recomputing_by
from gpkit.autodiff.norm_layers import elementary
from gpkit.autodiff.random import CPU, RandomState, random_state, set_random_state, set_seed
from gpkit.autodiff.reached import CHECKPOINTS, Known, Reach, reach
from gpkit.autodiff.state import Start, own_state, own_streams, start_of
from gpkit.autodiff.tracing.calls import RECORDS, TRACES
from gpkit.autodiff.tracing.compat import buffers_apart
from gpkit.autodiff.tracing.noise import noisy

RUNNING: list[bool] = []  # one entry for each forward pass of a penalty that is running now
DRAWS = (
    "the own forward pass of a penalty draws random numbers that are not those of F.dropout, as "
    "attention with dropout does: give its dropout=0.0, or call the net in the loss"
)
FORWARDS = ("isolated", "training", "eval")  # the ways to run a forward pass of a penalty


class isolated:
    """A context for a forward pass with its own buffers and random numbers, and a double backward.

    Modules write batch norm statistics and other buffers to copies, and so with plain attributes
    of your own modules. Dropout draws from ``seed``,
    and the random states of ``device``, of the CPU, of NumPy, of Python and of generators that the
    function refers to are restored at the end. Attention,
    recurrent nets and norm layers use kernels that have the derivatives. What the function
    checkpoints, without re-entry, is run again in the same way, in whichever backward pass.

    Args:
        function: the function to be called, a module that it runs, or what `reach` returned for it.
            Other modules are found when they are called, see `own_state`.
        seed: the seed of this forward pass, or what a pass started from that is to be repeated.
        device: the device of the forward pass.
        order: k, the order of the penalty.
        twice: whether the graph will be differentiated twice. If not, any kernel is allowed.
        evaluating: whether the modules are put in eval mode, and back in their own at the end.
    """

    def __init__(
        self,
        function: Any,
        seed: int | RandomState | Start,
        device: torch.device,
        order: int = 1,
        *,
        twice: bool = True,
        evaluating: bool = False,
    ) -> None:
        self.found = function if isinstance(function, Reach) else reach(function)
        self.seed: int | Start = Start(seed, [], {}) if isinstance(seed, tuple) else seed
        self.device = device
        self.order = order if twice else 0
        self.kernels = double_backward(order) if twice else None
        self.evaluating = evaluating
        self.recomputing = recomputing_by(self.recomputed)
        self.others: ExitStack | None = None
        self.noisy: noisy | None = None  # in a step that is recorded, to be compiled

    def __enter__(self) -> None:
        found, seed = self.found, self.seed
        found.known.runs += 1
        self.before = random_state(self.device)
        RUNNING.append(True)
        self.recomputing.__enter__()
        if self.kernels is not None:
            self.kernels.__enter__()
        try:
            set_seed(seed.torch if isinstance(seed, Start) else seed, self.device)
            if RECORDS and RECORDS[-1].calls:
                self.noisy = noisy()
                self.noisy.__enter__()
                RECORDS[-1].calls[-1].noise.append([])
            if self.evaluating or not found.is_plain:
                start = seed if isinstance(seed, Start) else None
                with ExitStack() as others:
                    others.enter_context(own_streams(found, seed))
                    others.enter_context(own_state(found, start, evaluating=self.evaluating))
                    self.others = others.pop_all()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *exception: Any) -> None:
        if self.noisy is not None:
            self.noisy.__exit__(*exception)
            self._require_noise_alone()
        try:
            if self.others is not None:
                self.others.__exit__(*exception)
        finally:
            self.recomputing.__exit__(*exception)
            if self.kernels is not None:
                self.kernels.__exit__(*exception)
            RUNNING.pop()
            set_random_state(self.before, self.device)

    def _require_noise_alone(self) -> None:
        """Note it if the forward pass drew other random numbers than those of its dropout."""
        drawn, seed = random_state(self.device), self.seed
        noise = RECORDS[-1].calls[-1].noise[-1]
        set_seed(seed.torch if isinstance(seed, Start) else seed, self.device)
        for own in noise:
            own.anew(self.device)
        alone = all(map(torch.equal, random_state(self.device), drawn))
        if not alone or (noise and isinstance(seed, Start)):
            RECORDS[-1].stops(DRAWS)

    def recomputed(self, part: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs a part of the function again in the same way."""
        found, before = self.found, start_of(self.found, self.device)
        found.known.facts.add(CHECKPOINTS)

        def again(*args: Any, **kwargs: Any) -> Any:
            kernels = double_backward(self.order) if self.order else nullcontext()
            with running(kernels), own_state(found, before, evaluating=self.evaluating):
                return part(*args, **kwargs)

        return again


def own_forward(function: Any, seed: int, device: torch.device) -> AbstractContextManager[None]:
    """Return `isolated`, or in a graph what stands for it."""
    if TRACES:
        return in_graph()
    found = reach(function)
    if RECORDS:
        RECORDS[-1].ran(found.family)
    return isolated(found, seed, device)


@contextmanager
def in_graph(*, evaluating: bool = False) -> Iterator[None]:
    """A context for a penalty's own forward pass in a graph: what stands for `isolated`."""
    call = TRACES[-1].call
    noise = noisy() if any(call.noise) else nullcontext()
    with buffers_apart(call.modules, evaluating=evaluating), noise:
        yield


def run_plain(
    run: Any, args: Any, known: Known, seed: int, device: torch.device, *, attends: bool = True
) -> Any:
    """Return ``run(*args)``, as in `isolated`, where that needs no more than a seed and kernels.

    Args:
        run: runs a function that is known to write to nothing, to draw from torch's streams alone,
            and to checkpoint nothing; it has no recurrent net that cuDNN would run.
        args: its arguments.
        known: what earlier runs have shown.
        seed: of this forward pass.
        device: of this forward pass.
        attends: whether it may have attention, whose kernels are chosen then.
    """
    known.runs += 1
    cpu, generator = device == CPU, torch.default_generator
    before: Any = generator.get_state() if cpu else random_state(device)
    RUNNING.append(True)
    chosen = attends or not cpu
    fused: list[Any] = [enable for enabled, enable in FUSED if enabled()] if chosen else []
    math = not chosen or MATH_ENABLED()
    try:
        for enable in fused:
            enable(False)
        if not math:
            ENABLE_MATH(True)
        if cpu:  # without a call for each step
            generator.manual_seed(seed)
        else:
            set_seed(seed, device)
        return run(*args)
    finally:
        for enable in fused:
            enable(True)
        if not math:
            ENABLE_MATH(False)
        RUNNING.pop()
        if cpu:
            generator.set_state(before)
        else:
            set_random_state(before, device)


def run_still(run: Any, args: Any, known: Known) -> Any:
    """Return ``run(*args)``, as in `run_plain`, of modules that draw no random numbers."""
    known.runs += 1
    RUNNING.append(True)
    try:
        return run(*args)
    finally:
        RUNNING.pop()


def run_again(function: Callable[[], Any], found: Reach, start: Start, device: torch.device) -> Any:
    """Return ``function()`` as it was run from a start, where that needs random numbers alone.

    Args:
        function: is known to write to nothing, to draw from torch's streams alone, and to
            checkpoint nothing.
        found: what it reaches.
        start: of the earlier run.
        device: of the forward pass.
    """
    found.known.runs += 1
    before = random_state(device)
    RUNNING.append(True)
    try:
        set_random_state(start.torch, device)
        return function()
    finally:
        RUNNING.pop()
        set_random_state(before, device)


def in_penalty() -> bool:
    """Whether a penalty is running a forward pass of its own now, for a hook or a forward.

    Your hooks run in that pass as in any other. One that counts or collects can leave it out:

    >>> import gpkit, torch
    >>> net, seen = torch.nn.Linear(3, 1), []
    >>> handle = net.register_forward_hook(lambda *_: seen.append(gpkit.in_penalty()))
    >>> x = torch.randn(4, 3)
    >>> _ = net(x), gpkit.r1()(net, real=x)
    >>> seen
    [False, True]

    Returns:
        True in a forward pass of a penalty, also one in which it reruns a training step.
    """
    return bool(RUNNING)


@contextmanager
def running(within: AbstractContextManager[Any]) -> Iterator[None]:
    """A context in which `in_penalty` is true, with another one inside."""
    RUNNING.append(True)
    try:
        with within:
            yield
    finally:
        RUNNING.pop()


class double_backward:
    """A context in which kernels have the k + 1 derivatives that a penalty of order k needs.

    Fused attention has no double backward: the math kernel is used instead (entering is eight
    times cheaper than ``sdpa_kernel(SDPBackend.MATH)``). cuDNN's recurrent nets have none: torch's
    own are used, from the first call of a recurrent net on. Fused layer norm and batch norm have a
    wrong third derivative: for order >= 2 they are computed in elementary operations. The context
    can be entered again after it has been left.

    Args:
        order: k, the order of the penalty.
        recurrent: whether there may be a recurrent net.
    """

    def __init__(self, order: int = 1, *, recurrent: bool = True) -> None:
        self.order, self.recurrent = order, recurrent
        self.others: ExitStack | None = None

    def __enter__(self) -> None:
        self.fused, self.math = [], True
        if torch.compiler.is_compiling():  # what Dynamo traces, it may run without the exit
            return
        self.fused = [enable for enabled, enable in FUSED if enabled()]
        for enable in self.fused:
            enable(False)
        self.math = MATH_ENABLED()
        if not self.math:
            ENABLE_MATH(True)
        cudnn = self.recurrent and torch.backends.cudnn.is_available()
        if self.order >= 2 or cudnn:
            self.others = ExitStack()
            if cudnn:
                self.others.enter_context(without_cudnn())
            if self.order >= 2:
                self.others.enter_context(elementary())

    def __exit__(self, *exception: object) -> None:
        if self.others is not None:
            self.others.close()
        for enable in self.fused:
            enable(True)
        if not self.math:
            ENABLE_MATH(False)


FUSED = [attention_switch(kind) for kind in ("flash", "mem_efficient", "cudnn")]
MATH_ENABLED, ENABLE_MATH = attention_switch("math")


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Disable cuDNN from the first call of a recurrent net on."""
    cudnn = torch.backends.cudnn.enabled

    def leave(module: nn.Module, _: Any) -> None:
        if isinstance(module, nn.RNNBase):
            torch.backends.cudnn.enabled = False

    hook = register_module_forward_pre_hook(leave)
    try:
        yield
    finally:
        hook.remove()
        torch.backends.cudnn.enabled = cudnn
