"""A penalty's own random numbers, which leave all streams alone; whether code may draw others."""

from __future__ import annotations

import functools
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from gpkit.autodiff.compat import children_of, parameters_of
from gpkit.autodiff.tracing.calls import RECORDS, TRACES, Given


def derived_seed(*parts: object) -> int:
    """Return a seed in [0, 2**63), a hash of numbers or strings, such as a seed and a count.

    >>> derived_seed(0, 1) == derived_seed(0, 1) != derived_seed(0, 2)
    True
    """
    words = ",".join(map(str, parts))
    digest = blake2b(words.encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


def has_ranks() -> bool:
    """Whether this process is one of a distributed run."""
    return DISTRIBUTED and torch.distributed.is_initialized()


DISTRIBUTED = torch.distributed.is_available()  # in this build of torch


def rank() -> int:
    """Return the rank of this process in a distributed run, else 0."""
    return torch.distributed.get_rank() if has_ranks() else 0


def device_of(*values: Any) -> torch.device:
    """Return the device of the first tensor or module among ``values``, else the CPU."""
    for value in values:
        if isinstance(value, nn.Module):
            value = (first_parameter(value),)
        if isinstance(value, (list, tuple)):
            found = device_of(*value) if value else CPU
            if found.type != "cpu":
                return found
            continue
        device = getattr(value, "device", None)
        if isinstance(device, torch.device):
            if device.type == "meta":
                raise ValueError(META)
            return device
    return CPU


CPU = torch.device("cpu")
META = (
    "tensors on the meta device have a shape and no values, so they have no gradient: move the net "
    "with .to_empty(device=...), and initialise it"
)


def first_parameter(module: nn.Module) -> Tensor | None:
    """Return a parameter of a module, or of the first of its children that has one, or None."""
    if TRACES:
        return next(module.parameters(), None)
    own = parameters_of(module)
    found = next((p for p in own.values() if p is not None), None) if own else None
    if found is not None:
        return found
    children = filter(None, children_of(module).values())
    return next((p for p in map(first_parameter, children) if p is not None), None)


Source = torch.Generator | Given


def source(seed: int, device: torch.device) -> Source:
    """Return the source of a penalty's random numbers; in a graph, those that were drawn for it."""
    if TRACES:
        return TRACES[-1].rng
    return torch.Generator(device).manual_seed(seed)


def normal(rng: Source, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers from N(0, 1)."""
    return _drawn(torch.randn, rng, shape, device, dtype)


def uniform(rng: Source, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers from U[0, 1)."""
    return _drawn(torch.rand, rng, shape, device, dtype)


def _drawn(
    draw: Callable[..., Tensor],
    rng: Source,
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    if not isinstance(rng, torch.Generator):
        return rng.next(shape)
    numbers = draw(shape, generator=rng, device=device, dtype=dtype)
    if RECORDS:
        RECORDS[-1].drew(draw, numbers)
    return numbers


RandomState = tuple[Tensor, ...]  # of the CPU, then of the device if it has its own


@contextmanager
def seeded(seed: int | RandomState, device: torch.device) -> Iterator[None]:
    """A context that draws from a seed, and restores the states of ``device`` and the CPU.

    Args:
        seed: the seed, or a random state to start from.
        device: the device that draws the random numbers.

    Yields:
        Nothing.
    """
    before = random_state(device)
    try:
        set_seed(seed, device)
        yield
    finally:
        set_random_state(before, device)


def set_seed(seed: int | RandomState, device: torch.device) -> None:
    """Let ``device`` and the CPU draw from a seed, or from a random state."""
    if not isinstance(seed, int):
        set_random_state(seed, device)
        return
    torch.default_generator.manual_seed(seed)
    own = None if device == CPU else accelerator(device)
    if own is not None:  # its manual_seed would seed the current device
        own.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)


def random_state(device: torch.device) -> RandomState:
    """Return the random state, with which `isolated` repeats the same random numbers."""
    cpu = torch.default_generator.get_state()
    own = None if device == CPU else accelerator(device)
    return (cpu,) if own is None else (cpu, own.get_rng_state(device))


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Restore a state that `random_state` returned for the same device."""
    torch.default_generator.set_state(state[0])
    own = None if device == CPU else accelerator(device)
    if own is not None:
        own.set_rng_state(state[1], device)


def accelerator(device: torch.device) -> Any:
    """Return torch's module for a device with its own random state, such as torch.cuda, or None."""
    module = None if device == CPU else getattr(torch, device.type, None)  # "meta" has none
    return module if hasattr(module, "get_rng_state") else None


def is_generator(value: Any) -> bool:
    """Whether an object is a stream of random numbers: of torch, of NumPy, or `random.Random`."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(
        value, (numpy.random.Generator, numpy.random.RandomState)
    )


def bookmark(generator: Any) -> Callable[[], None]:
    """Return a function that puts a stream of random numbers back to where it is now."""
    if hasattr(generator, "getstate"):  # of Python: the module random has it as well
        return functools.partial(generator.setstate, generator.getstate())
    if hasattr(generator, "get_state"):  # of torch, and NumPy's older ones
        return functools.partial(generator.set_state, generator.get_state())
    bits = generator.bit_generator
    return functools.partial(setattr, bits, "state", bits.state)


def reseed(generator: Any, seed: int) -> None:
    """Seed a stream of random numbers."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif hasattr(generator, "seed"):
        generator.seed(seed % 2**32)  # the limit of NumPy
    else:
        bits = generator.bit_generator
        bits.state = type(bits)(seed).state


def shared() -> list[Any]:
    """Return the streams that all code shares, except torch's: Python's, and NumPy's if in use."""
    numpy = sys.modules.get("numpy")
    return [random] if numpy is None else [random, numpy.random]


def position(generator: Any) -> Any:
    """Return where a stream of `shared` is, to be compared."""
    if generator is random:
        return random.getstate()
    state = generator.get_state(legacy=False)["state"]
    return {k: v.tobytes() if hasattr(v, "tobytes") else v for k, v in state.items()}


# Packages whose code draws from no stream of NumPy or Python; whose objects hold no user's code.
TRUSTED = {"torch", "torchmetrics", "gpkit", "builtins", "pytorch_lightning", "lightning"}
CLOSED = {"builtins", "pytorch_lightning", "lightning"}
FOREIGN = {"numpy", "random"}
ENOUGH = 2000  # functions and objects that are read


def may_draw(roots: Iterable[Any]) -> bool:
    """Whether the code of functions or modules names NumPy or `random`, however far down.

    It is read, not run, so that a function that draws on some of its runs is known from the first.
    The answer is yes where there is too much code to read.

    Args:
        roots: functions, modules or objects.

    Returns:
        False if no name in it stands for NumPy, `random` or one of their streams.
    """
    stack = list(roots)
    seen: dict[int, Any] = {}  # with the objects, so that no id is used again
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (Tensor, str, bytes, int, float, complex)):
            continue
        seen[id(value)] = value
        foreign = package_of(value) in FOREIGN or is_generator(getattr(value, "__self__", None))
        if foreign or is_generator(value) or len(seen) > ENOUGH:
            return True
        stack += _read(value)
    return False


def package_of(value: Any) -> str:
    """Return the package that a module, a function, a class or an object is from."""
    if isinstance(value, types.ModuleType):
        return value.__name__.partition(".")[0]
    name = getattr(value, "__module__", None)
    return (name if isinstance(name, str) else type(value).__module__).partition(".")[0]


def _read(value: Any) -> list[Any]:
    """Return what a function, a class or an object refers to, by its code or its attributes."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    if inspect.isfunction(value):
        cells = cells_of(value)
        return cells if package_of(value) in TRUSTED else [*cells, *_named(value)]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, property):
        return [value.fget]
    if isinstance(value, (types.MethodType, types.BuiltinMethodType, classmethod, staticmethod)):
        return [getattr(value, "__self__", None), getattr(value, "__func__", None)]
    package = package_of(value)
    if isinstance(value, types.ModuleType) or package in CLOSED:
        return []
    if isinstance(value, type):
        return [] if package in TRUSTED else [*vars(value).values(), *value.__bases__]
    return [type(value), *getattr(value, "__dict__", {}).values()]


def _named(function: types.FunctionType) -> list[Any]:
    """Return what the names in the code of a function stand for."""
    codes = [function.__code__]
    for code in codes:
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    names = {name for code in codes for name in code.co_names}
    if any(name.partition(".")[0] in FOREIGN for name in names):
        return [random]  # which it may import itself
    found = [function.__globals__.get(name) for name in names]
    inside = {id(v): v for v in found if isinstance(v, types.ModuleType)}
    for module in (modules := list(inside.values())):
        parts = [vars(module).get(name) for name in names]
        found += parts
        new = {id(v): v for v in parts if isinstance(v, types.ModuleType) and id(v) not in inside}
        inside |= new
        modules += new.values()
    return [*found, function.__defaults__, function.__kwdefaults__]


def cells_of(function: types.FunctionType) -> list[Any]:
    """Return what a closure holds, without what is not bound yet."""
    return [cell.cell_contents for cell in function.__closure__ or () if _is_bound(cell)]


def _is_bound(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
