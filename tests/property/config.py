"""One choice on each axis, and how to draw it at random. A printed configuration can be pasted."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod
from random import Random
from typing import Any

from tests.property.nets import KINDS

CENTERED = ("two_sided", "one_sided", "absolute")
LOSSES = ("loss", "sampled_loss")
MOVES = ("interpolate", "uniform", "box", "mixture", "triple", "midpoint")  # perturb_... as well
FORWARDS = ("random_difference", "jvp", "stencil")
COMPARING = ("exact", "projection", "finite_difference", *FORWARDS)
STEPS = ("finite_difference", "curvature_difference", "random_difference", "stencil")
ROBUST = ("tanh", "softplus", "gelu", "silu", "conv", "tied", "unused")  # in bfloat16
SPECIAL = ("batch_norm", "checkpoint", "dict", "waves")
SAMPLES = ("data", "real", "fake")


@dataclass(frozen=True)
class Config:
    """What one comparison is of. A field that is left out has its default."""

    seed: int = 0  # of the net, the samples and the penalty
    net: str = "tanh"
    outputs: int = 1
    flat: bool = False  # one output as [B], not [B, 1]
    batch: int = 3
    dtype: str = "float64"
    of: str = "output"
    loss: str = "squares"
    mean: bool = True  # a weight penalty is given the mean loss, not [B]
    wrt: str = "input"
    scope: str | None = None
    order: int = 1
    form: str = "squared"
    norm: str = "l2"
    factor: float = 1.0
    center: float = 1.0
    centered: str = "number"
    eps: float = 0.0
    exponent: float = 3.0
    at: str = "data"
    detach: bool = True
    estimator: str = "exact"
    count: int = 1
    distribution: str = "rademacher"
    length: float | None = None
    side: str = "forward"
    cross: bool = False
    target: bool = False  # subtracted from the derivative
    metric: str = ""  # "mask" or "function" at the call, or "axis" of the penalty
    weigh: bool = False  # a weighted mean
    reduce: str = "mean"
    forward: str = "isolated"
    weight: float = 1.0
    every: int = 1
    step: int | None = None
    scaler: float | None = None
    again: bool = False  # the second call, after a step of training
    call: str = "module"

    def __repr__(self) -> str:
        changed = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"Config({', '.join(changed)})"

    @property
    def in_weights(self) -> bool:
        return self.wrt.startswith("weight")

    @property
    def moves(self) -> bool:
        return self.at in MOVES or self.at.startswith("perturb")

    @property
    def variables(self) -> int:
        """About how many variables there are."""
        if self.in_weights:
            return 20 if self.wrt == "weight" else 12
        return sum(map(prod, KINDS[self.net].shapes))


# The choices on each axis, with the likely ones several times.
CHOICES: dict[str, tuple[Any, ...]] = {
    "net": tuple(KINDS),
    "outputs": (1, 1, 1, 2, 3),
    "flat": (False, True),
    "batch": (1, 2, 3, 3, 4, 5),
    "dtype": ("float64",) * 7 + ("float32", "float32", "bfloat16"),
    "of": ("output", "output", "loss", "loss", "column", "total", "sampled_loss", "activation"),
    "loss": ("squares", "cross_entropy"),
    "mean": (True, False),
    "wrt": ("input",) * 5
    + ("weight",) * 3
    + ("weight:head.*", "weight:*bias*", "activation", "activations"),
    "scope": (None, None, None, "sample", "batch", "pixel", "global", "accumulated"),
    "order": (1, 1, 1, 1, 2, 2, 3),
    "form": ("squared", "squared", "norm", "power", "function", *CENTERED),
    "norm": ("l2", "l2", "l2", "l1", "linf"),
    "factor": (1.0, 1.0, 0.5, 3.0),
    "center": (0.0, 0.3, 1.0, 2.5),
    "centered": ("number", "number", "tensor", "each", "constant", "graph", "before"),
    "eps": (0.0, 0.0, 0.01, 0.5),
    "exponent": (0.5, 1.0, 2.0, 3.0, 6.0),
    "at": (*SAMPLES, *MOVES, "perturb_normal", "perturb_uniform", "perturb_relative",
           "perturb_along"),
    "detach": (True, False),
    "estimator": ("exact", "exact", "exact", "projection", "finite_difference",
                  "finite_difference", "power_iteration", "gaussian_product", "taylor",
                  "curvature_difference", "random_difference", "jvp", "stencil"),
    "count": (1, 2, 3, 10),
    "distribution": ("rademacher", "gaussian", "sphere"),
    "length": (None, 0.05, 0.5),
    "side": ("forward", "backward", "central"),
    "cross": (False, True),
    "target": (False,) * 5 + (True,),
    "metric": ("",) * 9 + ("mask", "function", "axis"),
    "weigh": (False,) * 5 + (True,),
    "reduce": ("mean", "mean", "sum", "max"),
    "forward": ("isolated", "isolated", "isolated", "training", "eval"),
    "weight": (1.0, 0.25, 10.0),
    "every": (1, 1, 2, 5),
    "step": (None, 0, 3, 10),
    "scaler": (None, None, None, 1024.0),
    "again": (False, True),
    "call": ("module", "function", "tensor", "terms"),
}  # fmt: skip
WEIGHT_CALLS = ("closure", "parameters", "tensor", "tensor_parameters", "with_loss", "terms")


def draw(rng: Random) -> Config:
    """Return a random configuration. Most have a right answer; some do not fit together."""
    chosen = {name: rng.choice(options) for name, options in CHOICES.items()}
    if chosen["wrt"].startswith("weight"):
        chosen["call"] = rng.choice(WEIGHT_CALLS)
    config = Config(seed=rng.randrange(1_000_000), **chosen)
    config = fitting(config, rng) if rng.random() < 0.9 else config
    if (
        config.net in SPECIAL or config.dtype == "bfloat16" or config.wrt == "activations"
    ):  # the oracle is not for all of them
        config = fitting(config, rng)
    if (config.net == "dict") != (config.of == "logits"):  # no function of the user's would do so
        config = replace(config, of="logits" if config.net == "dict" else "total")
    return without_idle(bounded(config, rng))


def fitting(c: Config, rng: Random) -> Config:
    """Return a configuration whose choices fit together, changing those that do not."""
    kind = KINDS[c.net]
    new: dict[str, Any] = {}
    if c.in_weights:
        new |= {"at": "data", "detach": True}
        new["scope"] = c.scope if c.scope in ("sample", "batch", "global") else None
        if c.of == "activation":
            new["of"] = "loss"
        if new["scope"] == "sample":
            new["mean"] = False
        if c.estimator in ("taylor", "curvature_difference", *FORWARDS):
            new["estimator"] = "exact"
        if new["scope"] == "global":
            new |= {"order": 1, "forward": "isolated", "of": "loss"}
            new["estimator"] = rng.choice(("exact", "finite_difference"))
    else:
        new["scope"] = c.scope if c.scope in ("sample", "pixel") else None
        if new["scope"] == "pixel" and (len(kind.shapes[0]) < 2 or c.wrt != "input"):
            new["net"] = rng.choice(("conv", "group_norm", "pairs", "attention"))
            new["wrt"] = "input"
        if c.wrt == "activations":
            new["order"] = 1
            new["net"] = c.net if KINDS[c.net].chained else "tanh"
        if new["scope"] == "pixel":
            new["order"] = 1
            new["estimator"] = rng.choice(("exact", "exact", "projection", "stencil"))
    c = replace(c, **new)
    new, kind = {}, KINDS[c.net]
    if c.net == "tokens" and not c.in_weights:
        new |= {"wrt": "activation", "metric": "", "at": rng.choice(SAMPLES), "detach": True}
    if c.net == "batch_norm":
        new["batch"] = max(c.batch, 3)  # two samples are normalised to ±1
        if c.in_weights and c.estimator == "finite_difference":
            new["norm"] = "l2"  # some gradients are zero, up to rounding, which has a sign
    if c.net == "dict":
        new["of"] = "logits"
    if c.call.startswith("tensor") or c.call == "with_loss":
        new["forward"] = "isolated"
    c = replace(c, **new)
    new = {}
    if c.wrt.startswith("activation") and c.estimator == "taylor":
        new["estimator"] = "exact"
    if c.wrt.startswith("activation") and c.estimator.startswith(("curvature", "random")):
        new["estimator"] = "projection"
    if c.of == "activation" and c.wrt.startswith("activation"):
        new["of"] = "output"
    c = replace(c, **new)
    if c.of == "sampled_loss":
        c = replace(c, outputs=max(c.outputs, 2), net="tanh" if c.net == "maps" else c.net)
        c = replace(c, call="closure" if c.call == "with_loss" else c.call)
    if c.call == "with_loss" and c.of == "output":
        c = replace(c, of="loss")
    alone = c.moves or c.of == "activation" or needs_function(c.estimator)
    if c.call.startswith("tensor") and alone:
        c = replace(c, call="closure" if c.in_weights else "module")
    one = c.estimator in ("finite_difference", "curvature_difference")
    if c.of not in (*LOSSES, "column", "total") and (one or c.form in CENTERED):
        c = replace(c, of=rng.choice(("column", "total")))
    if c.net == "dict":
        alone = one or c.form in CENTERED or c.call == "with_loss"
        c = replace(c, of="logits", outputs=1 if alone else c.outputs)
    if c.net == "maps" and c.of == "loss":
        c = replace(c, loss="squares")
    if c.estimator in ("finite_difference", "curvature_difference", "power_iteration",
                       "gaussian_product", *FORWARDS):  # fmt: skip
        c = replace(c, order=1)
    if c.estimator in ("projection", "taylor", "power_iteration", "gaussian_product",
                       "random_difference", "jvp"):  # fmt: skip
        c = replace(c, norm="l2")
    if c.order > KINDS[c.net].degree - (c.of != "loss") and not c.in_weights:
        c = replace(c, order=1)
    if not KINDS[c.net].smooth:
        c = replace(c, order=1)
    c = comparable(c)
    if c.net == "checkpoint" and c.estimator == "jvp":
        c = replace(c, estimator="exact")  # torch.func does not support checkpoints
    if c.net == "waves":
        c = replace(c, dtype="float64")
    if c.estimator == "finite_difference" and c.norm == "linf" and c.outputs == 2:
        c = replace(c, norm="l2")  # of two classes entries are equal, and rounding chooses one
    if c.dtype == "bfloat16":
        c = replace(c, order=1, form=rng.choice(("squared", "norm")), reduce="mean", norm="l2",
                    estimator="exact")  # fmt: skip
        c = replace(c, net=c.net if c.net in ROBUST else rng.choice(ROBUST))
        c = replace(c, of="column" if c.of in LOSSES else c.of)  # whose residuals cancel
    if c.wrt.startswith("weight:"):
        c = replace(
            c, call=c.call.replace("tensor_parameters", "tensor").replace("parameters", "closure")
        )
    if c.net == "batch_norm" and not c.in_weights and c.estimator != "exact":
        call = "module" if c.call == "tensor" else c.call
        c = replace(c, forward="eval", call=call)  # the others mix the samples: gpkit warns of it
    return comparing(c)


def comparable(c: Config) -> Config:
    """Return a configuration that the oracle can follow."""
    if not KINDS[c.net].smooth and c.estimator == "finite_difference":
        c = replace(c, cross=c.length is not None)  # it does not hold kinks over a given step
    if c.call == "with_loss":  # which takes the closure and the net
        c = replace(c, metric=c.metric if c.metric == "axis" and c.order == 1 else "")
    return c


def comparing(c: Config) -> Config:
    """Return a configuration whose target, metric and weights fit the other choices."""
    plain = c.net == "waves" or c.wrt == "activations"
    if plain or c.estimator not in COMPARING:
        c = replace(c, target=False, metric="")
    if c.order > 1 and c.metric in ("function", "axis"):
        c = replace(c, metric="mask")
    single = len(KINDS[c.net].shapes) == 1 and not c.in_weights and c.estimator == "exact"
    if c.order > 1 and not single:
        c = replace(c, target=False, metric="")
    averaged = c.form in CENTERED and c.centered in ("constant", "graph", "before")
    if c.call == "with_loss" or c.scope == "global" or c.reduce == "max" or averaged:
        c = replace(c, weigh=False)
    if c.weigh and c.in_weights:
        c = replace(c, mean=False)
    return c


def needs_function(estimator: str) -> bool:
    return estimator in ("finite_difference", "curvature_difference", "taylor", *FORWARDS)


def bounded(c: Config, rng: Random) -> Config:
    """Return a configuration whose full derivative has at most some thousand entries."""
    while c.order > 1 and (c.outputs + 1) * c.variables**c.order > 6000:
        c = replace(c, order=c.order - 1)
    return c


def without_idle(c: Config) -> Config:
    """Return the same configuration, with the defaults on the axes that are not read."""
    rooted = c.form not in ("squared", "function")
    read = {
        "center": c.form in CENTERED,
        "centered": c.form in CENTERED,
        "eps": rooted,
        "exponent": c.form == "power",
        "factor": c.form != "function",
        "norm": c.form != "function",
        "count": c.estimator in ("projection", "taylor", "power_iteration", *FORWARDS),
        "distribution": c.estimator in ("projection", "taylor", "jvp"),
        "length": c.estimator in STEPS,
        "side": c.estimator == "finite_difference",
        "cross": c.estimator == "finite_difference",
        "loss": c.of == "loss",
        "mean": c.in_weights,
        "flat": c.outputs == 1,
        "detach": not c.in_weights and c.call != "tensor",
        "step": c.every > 1,
    }
    averaged = c.form in CENTERED and c.centered in ("constant", "graph", "before")
    if averaged or c.call == "terms":  # the first call moves the average; terms is no call
        read["again"] = False
    if c.again and c.every > 1 and c.step is None:
        c = replace(c, step=0)
    if c.call == "with_loss":
        c = comparable(c)
        read |= {"target": False, "weigh": False}
    defaults = {f.name: f.default for f in fields(Config)}
    return replace(c, **{name: defaults[name] for name, used in read.items() if not used})


def parse(line: str) -> Config:
    """Return the configuration that was printed."""
    return eval(line, {"Config": Config})  # of one's own terminal
