"""The Taylor-mode rules, one for each operation. Importing this file registers them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gpkit.autodiff.taylor import series
from gpkit.autodiff.taylor.jets import (
    Jet,
    coefficients,
    is_jet,
    jets,
    order_of,
    refusal,
    rule,
    value,
)
from gpkit.autodiff.taylor.series import Series

# fmt: off
# Operations that are linear in all their jets (shapes, sums, layouts): applied to each coefficient.
LINEAR = (
    "view", "_unsafe_view", "permute", "transpose", "t", "expand", "slice", "select", "squeeze",
    "unsqueeze", "alias", "clone", "neg", "sum", "mean", "cat", "stack", "unbind", "split",
    "split_with_sizes", "index", "index_select", "gather", "flip", "roll", "repeat", "cumsum",
    "tril", "triu", "diagonal", "diag_embed", "unfold", "im2col", "avg_pool2d", "avg_pool3d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "reflection_pad1d", "reflection_pad2d", "replication_pad1d",
    "replication_pad2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
)

# Operations whose result is a constant: independent of the values, or detached.
CONSTANT = (
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
    "new_empty", "new_zeros", "new_ones", "new_full", "detach", "bernoulli",
)
# fmt: on


@rule(*LINEAR)
def linear(func: Any, *args: Any, **kwargs: Any) -> Any:
    """L(a)_n = L(a_n); constant arguments enter for n = 0 only."""
    k = order_of(args, kwargs)
    if isinstance(args[0], (list, tuple)):  # cat and stack: constants are zero for n > 0
        parts = [coefficients(part, k) for part in args[0]]
        return jets([func(list(at), *args[1:], **kwargs) for at in zip(*parts, strict=True)], k)
    if not is_jet(args[0]):
        raise NotImplementedError(refusal(func.overloadpacket.__name__))
    return jets([func(a, *args[1:], **kwargs) for a in args[0].leading], k)


@rule("_to_copy")
def converted(func: Any, x: Jet, **kwargs: Any) -> Any:
    """Another dtype or device; whole numbers are constants, as their derivatives vanish."""
    dtype = kwargs.get("dtype") or x.dtype
    whole = not (dtype.is_floating_point or dtype.is_complex)
    return (constant if whole else linear)(func, x, **kwargs)


@rule("where")
def where(func: Any, condition: Any, *args: Any) -> Jet:
    """Entries of one or the other, by a constant condition."""
    if is_jet(condition):
        raise NotImplementedError(refusal("where"))
    return Jet([func(condition, x, y) for x, y in zip(*pair(*args), strict=True)])


@rule(*CONSTANT)
def constant(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the result of the operation for the values a_0."""
    return func(*value(args), **value(kwargs))


def pair(a: Any, b: Any) -> tuple[Series, Series]:
    """Return the coefficients of two operands; at least one is a jet."""
    k = order_of(a, b)
    return coefficients(a, k), coefficients(b, k)


@rule("add", "sub", "rsub")
def add(func: Any, a: Any, b: Any, alpha: float = 1) -> Jet:
    """A sum; a constant is added to a_0 only, but broadcasts all coefficients."""
    if is_jet(a) and not is_jet(b) and func.overloadpacket.__name__ != "rsub":
        first, *others = a.series
        total = func(first, b, alpha=alpha)
        if total.shape == first.shape:
            return Jet([total, *others])
    xs, ys = pair(a, b)
    return Jet([func(x, y, alpha=alpha) for x, y in zip(xs, ys, strict=True)])


@rule("mul")
def mul(func: Any, a: Any, b: Any) -> Jet:
    """A product of two series, or of a series and a constant."""
    if is_jet(a) and is_jet(b):
        return Jet(series.product(a.series, b.series))
    return bilinear(func, a, b)


@rule("mm", "bmm", "dot", "mv")
def bilinear(func: Any, a: Any, b: Any) -> Jet:
    """A bilinear product: O(k²) products of two jets, or k + 1 products with a constant."""
    if is_jet(a) and is_jet(b):
        return Jet(series.product(a.series, b.series, func))
    if is_jet(a):
        return jets([func(x, b) for x in a.leading], a.order)
    return jets([func(a, y) for y in b.leading], b.order)


PRODUCTS: dict[str, Any] = {"addmm": torch.mm, "baddbmm": torch.bmm, "addmv": torch.mv}


@rule(*PRODUCTS)
def addmm(func: Any, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """β bias + α a b."""
    if is_jet(a) and not (is_jet(b) or is_jet(bias)):
        first, *others = a.leading
        times = [PRODUCTS[func.overloadpacket.__name__](x, b) for x in others]
        times = times if alpha == 1 else [alpha * x for x in times]
        return jets([func(bias, first, b, beta=beta, alpha=alpha), *times], a.order)
    product = a @ b if alpha == 1 else alpha * (a @ b)
    return product + (bias if beta == 1 else beta * bias)


@rule("div", "true_divide")
def div(func: Any, a: Any, b: Any, rounding_mode: str | None = None) -> Jet:
    """A quotient."""
    if rounding_mode is not None:
        raise NotImplementedError(refusal("floor_divide"))
    if not is_jet(b):
        return jets([func(x, b) for x in a.leading], a.order)
    return Jet(series.quotient(*pair(a, b)))


@rule("convolution")
def convolution(func: Any, x: Any, weight: Any, bias: Any, *options: Any) -> Jet:
    """A convolution with constant weights; the bias is added to a_0."""
    if not is_jet(x) or is_jet(weight) or is_jet(bias):
        raise NotImplementedError(refusal("convolution with a kernel that depends on the input"))
    first, *others = x.leading
    moved = [func(a, weight, None, *options) for a in others]
    return jets([func(first, weight, bias, *options), *moved], x.order)


@rule("constant_pad_nd", "masked_fill")
def filled(func: Any, x: Any, where: Any, fill: Any = 0.0) -> Jet:
    """Some entries are set to a constant: to zero for n > 0."""
    if not is_jet(x) or is_jet(where) or is_jet(fill):
        raise NotImplementedError(refusal(func.overloadpacket.__name__))
    first, *others = x.leading
    zero = torch.zeros_like(fill) if isinstance(fill, Tensor) else 0.0
    return jets([func(first, where, fill), *(func(a, where, zero) for a in others)], x.order)


@rule("native_dropout")
def dropout(func: Any, x: Jet, p: float, train: bool | None) -> tuple[Jet, Tensor]:
    """All coefficients use the mask of a_0."""
    _, mask = func(x.leading[0], p, train)
    keep = mask.to(x.dtype) / (1 - p) if train and p < 1 else mask.to(x.dtype)
    return jets([a * keep for a in x.leading], x.order), mask


@rule("pow")
def power(func: Any, a: Any, p: Any) -> Jet:
    """a^p: a recurrence for a constant p, otherwise exp(p log a)."""
    if is_jet(p):
        base = a.coefficients if is_jet(a) else None
        if base is not None:
            return Jet(series.exp(series.product(p.coefficients, series.log(base))))
        log = torch.as_tensor(a, dtype=p.dtype, device=p.device).log()
        return Jet(series.exp([x * log for x in p.coefficients]))
    if isinstance(p, Tensor):  # it may be a parameter
        shape = torch.broadcast_shapes(a.shape, p.shape)
        return Jet(series.any_power([x.expand(shape) for x in a.coefficients], p))
    return Jet(series.power(a.series, p))


ELEMENTARY = {
    "exp": series.exp,
    "log": series.log,
    "tanh": series.tanh,
    "sigmoid": series.sigmoid,
    "erf": series.erf,
    "softplus": series.softplus,
    "gelu": series.gelu,
    "sin": lambda a: series.sine_and_cosine(a)[0],
    "cos": lambda a: series.sine_and_cosine(a)[1],
    "square": lambda a: series.product(a, a),
    "sqrt": lambda a: series.power(a, 0.5),
    "rsqrt": lambda a: series.power(a, -0.5),
    "reciprocal": lambda a: series.power(a, -1),
    "silu": lambda a: series.product(a, series.sigmoid(a)),
    "mish": lambda a: series.product(a, series.tanh(series.softplus(a))),
    "expm1": lambda a: [a[0].expm1(), *series.exp(a)[1:]],
    "log1p": lambda a: [a[0].log1p(), *series.log([a[0] + 1, *a[1:]])[1:]],
    "log_sigmoid_forward": series.logsigmoid,
}


@rule(*ELEMENTARY)
def elementary(func: Any, a: Jet, *args: Any, **kwargs: Any) -> Any:
    """An elementwise function of one jet."""
    name = func.overloadpacket.__name__
    out = Jet(ELEMENTARY[name](a.series, *args, **kwargs))
    return (out, out) if name == "log_sigmoid_forward" else out


@rule("_softmax", "_log_softmax")
def softmax(func: Any, a: Jet, dim: int, half_to_float: bool) -> Jet:
    """Softmax, or its logarithm."""
    log = func.overloadpacket.__name__ == "_log_softmax"
    return Jet((series.log_softmax if log else series.softmax)(a.coefficients, dim))


@rule("mse_loss")
def mse_loss(func: Any, a: Any, b: Any, reduction: int = 1) -> Any:
    """(a - b)²: of each entry (``reduction`` 0), or their mean (1) or sum (2)."""
    squares = (a - b) ** 2
    return squares.mean() if reduction == 1 else squares.sum() if reduction == 2 else squares


@rule("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(func: Any, a: Jet, *args: Any) -> Any:
    """Linear in the log-probabilities; the total class weight is a constant."""
    results = [func(x, *args) for x in a.coefficients]
    return Jet([out for out, _ in results]), results[0][1]


@rule("_safe_softmax")
def safe_softmax(func: Any, a: Jet, dim: int, dtype: torch.dtype | None = None) -> Jet:
    """Softmax that is zero where all entries are masked."""
    first, *others = (x.to(dtype or x.dtype) for x in a.coefficients)
    masked = (first == -math.inf).all(dim, keepdim=True)
    out = series.softmax([first.masked_fill(masked, 0.0), *others], dim)
    return Jet([x.masked_fill(masked, 0.0) for x in out])


@rule("logsumexp")
def logsumexp(func: Any, a: Jet, dims: list[int], keepdim: bool = False) -> Jet:
    """The logarithm of Σ e^a over ``dims``."""
    _, sums, top = series.exponentials(a.coefficients, dims)
    first, *others = series.log(sums)
    out = Jet([first + top, *others])
    return out if keepdim else Jet([x.squeeze(tuple(dims)) for x in out.coefficients])


@rule("var", "std")
def var(
    func: Any,
    a: Jet,
    dims: list[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Jet:
    """A variance, or a standard deviation."""
    dims = list(dims or range(a.ndim))
    centred = [x - x.mean(dims, keepdim=True) for x in a.coefficients]
    squares = series.product(centred, centred)
    count = math.prod(a.shape[d] for d in dims) - (1 if correction is None else correction)
    out = [x.sum(dims, keepdim=keepdim) / count for x in squares]
    return Jet(series.power(out, 0.5) if func.overloadpacket.__name__ == "std" else out)


@rule("linalg_vector_norm")
def norm(
    func: Any,
    a: Jet,
    ord: float = 2,
    dims: list[int] | None = None,
    keepdim: bool = False,
    **kwargs: Any,
) -> Jet:
    """The l2 norm; it must not be zero."""
    if ord != 2:
        raise NotImplementedError(refusal(f"linalg_vector_norm(ord={ord})"))
    dims = list(dims or range(a.ndim))
    squares = series.product(a.coefficients, a.coefficients)
    return Jet(series.power([x.sum(dims, keepdim=keepdim) for x in squares], 0.5))


@rule("relu", "leaky_relu", "abs")
def piecewise_linear(func: Any, a: Jet, *args: Any) -> Jet:
    """Exact at order 1: a_1 times the slope at a_0."""
    if len(a.coefficients) > 2:
        raise NotImplementedError(refusal(func.overloadpacket.__name__))
    at, along = a.coefficients
    slope = torch.where(at == 0, 0.0, func(at, *args) / at)
    if func.overloadpacket.__name__ == "leaky_relu":
        slope = torch.where(at == 0, args[0] if args else 0.01, slope)
    return Jet([func(at, *args), slope.detach() * along])


@rule("native_group_norm")
def group_norm(
    func: Any, x: Any, weight: Any, bias: Any, n: int, c: int, space: int, groups: int, eps: float
) -> Any:
    """Group norm; the returned mean and rstd are for a backward pass that is not used."""
    grouped = [a.reshape(n, groups, -1) for a in x.coefficients]
    out = [a.reshape(x.shape) for a in series.standardised(grouped, (2,), eps)]
    channel = [1, c] + [1] * (x.ndim - 2)
    if weight is not None:
        out = [a * weight.reshape(channel) for a in out]
    if bias is not None:
        out[0] = out[0] + bias.reshape(channel)
    return Jet(out), *func(*value((x, weight, bias)), n, c, space, groups, eps)[1:]


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_batch_norm_impl_index",
)
def batch_norm_in_evaluation(func: Any, x: Any, *args: Any) -> Any:
    """Batch norm in eval mode, an affine map. In training mode it is written out before."""
    name = func.overloadpacket.__name__
    if name != "_native_batch_norm_legit_no_training" and args[4]:
        raise NotImplementedError(refusal(name))
    (first, *others), (weight, _, _, var) = x.coefficients, args[:4]
    results = func(first, *args)
    eps = args[-2] if name == "_batch_norm_impl_index" else args[-1]
    slope = (var + eps).rsqrt() * (1 if weight is None else weight)
    slope = slope.to(x.dtype).reshape([1, -1] + [1] * (x.ndim - 2))
    return Jet([results[0], *(a * slope for a in others)]), *results[1:]
