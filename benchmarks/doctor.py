"""What the doctor says of nets and penalties, what training then does, and whether it is right.

Each cell is one net with one penalty: the verdict of `gpkit.diagnose`; two steps of gradient
descent on loss and penalty in float32; and the penalty's gradient in the parameters, in float64,
against double backpropagation written by hand, with attention in elementary operations, or against
differences of the penalty's value where it draws random numbers. A disagreement is a defect.

    python benchmarks/doctor.py [--nets NAME ...] [--penalties NAME ...]

The lines of these nets in docs/doctor_nets.md are written anew. All take some 15 minutes of one
core.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from doctor_nets import CASES, Case
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpkit

PAGE = Path(__file__).resolve().parents[1] / "docs" / "doctor_nets.md"
MARK = "<!-- table -->"
LIMIT = 180  # seconds for a cell
LIBRARIES = ("torch", "timm", "transformers", "diffusers", "torch_geometric")


def losses(case: Case, net: nn.Module, z: Tensor | None = None) -> Tensor:
    """Return the loss of each sample, of classes or of a critic's scores."""
    output = case.run(net, z)
    if case.y is None:
        return F.softplus(-output.flatten(1)).mean(1)
    return F.cross_entropy(output, case.y, reduction="none")


@dataclass(frozen=True)
class Row:
    """A penalty.

    Args:
        build: make it, with a seed, and with other axes.
        call: how a training loop calls it.
        by_hand: its value, written by hand; None where it is random: then its own value is
            differenced.
        most: how many entries a sample may have, where all derivatives are taken one by one.
    """

    build: Callable[..., Any]
    call: Callable[[Any, Case, nn.Module], Tensor]
    by_hand: Callable[[Case, nn.Module], Tensor] | None = None
    most: int | None = None


def in_weights(penalty: Any, case: Case, net: nn.Module) -> Tensor:
    """Call a penalty of the loss's gradient in the weights."""
    return penalty(lambda: losses(case, net).mean(), net)


def in_weights_each(penalty: Any, case: Case, net: nn.Module) -> Tensor:
    """The same, of each sample's loss."""
    return penalty(lambda: losses(case, net), net)


def of_losses(penalty: Any, case: Case, net: nn.Module) -> Tensor:
    """Call a penalty of each loss's gradient in the input."""
    return penalty(lambda z: losses(case, net, z), case.x)


def of_outputs(penalty: Any, case: Case, net: nn.Module) -> Tensor:
    """Call a penalty of the outputs' derivatives in the input."""
    return penalty(lambda z: case.run(net, z), case.x)


def between_equals(penalty: Any, case: Case, net: nn.Module) -> Tensor:
    """Interpolates of equal samples are these samples, so the value is not random."""
    return penalty(lambda z: case.run(net, z), real=case.x, fake=case.x)


def of_labels(penalty: Any, case: Case, net: nn.Module) -> Tensor:
    """Call a penalty whose labels are drawn from the model."""
    return penalty(lambda: case.run(net), net)


def of_environments(penalty: Any, case: Case, net: nn.Module) -> Tensor:
    """Call a penalty of two environments."""
    return penalty(case.run(net), case.y, torch.arange(len(case.x)) % 2)


# by hand: each is the formula, with torch.autograd alone


def trained(net: nn.Module) -> list[Tensor]:
    """Return the parameters that are trained."""
    return [p for p in net.parameters() if p.requires_grad]


def squared(grads: Any) -> Tensor:
    """Return the squared norm of gradients together."""
    return sum((g.square().sum() for g in grads if g is not None), torch.zeros(()))


def weight_norm(case: Case, net: nn.Module) -> Tensor:
    """Return ‖∇_θ mean ℓ‖²."""
    loss = losses(case, net).mean()
    return squared(torch.autograd.grad(loss, trained(net), create_graph=True, allow_unused=True))


def each_weight_norm(case: Case, net: nn.Module) -> Tensor:
    """Return mean ‖∇_θ ℓ_i‖²."""
    options: dict[str, Any] = {"create_graph": True, "allow_unused": True}
    each = [squared(torch.autograd.grad(v, trained(net), **options)) for v in losses(case, net)]
    return torch.stack(each).mean()


def slopes(case: Case, of: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return the points, and the squared norm of the gradient of each sample's number there."""
    z = case.x.detach().requires_grad_()
    (g,) = torch.autograd.grad(of(z).sum(), z, create_graph=True)
    return g, g.flatten(1).square().sum(1)


def loss_slope(case: Case, net: nn.Module) -> Tensor:
    """Return mean ‖∇_x ℓ_i‖²."""
    return slopes(case, lambda z: losses(case, net, z))[1].mean()


def jacobian(case: Case, net: nn.Module) -> Tensor:
    """Return ½ mean ‖∂f/∂x‖²."""
    z = case.x.detach().requires_grad_()
    outputs = case.run(net, z).flatten(1).unbind(1)
    rows = [torch.autograd.grad(y.sum(), z, create_graph=True)[0] for y in outputs]
    return sum(g.flatten(1).square().sum(1) for g in rows).mean() / 2


def all_derivatives(case: Case, net: nn.Module, order: int) -> Tensor:
    """Return mean ‖∇^k f‖², all entries of all outputs, by nested backward passes."""
    z = case.x.detach().requires_grad_()
    parts = list(case.run(net, z).flatten(1).unbind(1))
    for _ in range(order):
        rows = [torch.autograd.grad(p.sum(), z, create_graph=True)[0] for p in parts]
        parts = [entry for row in rows for entry in row.flatten(1).unbind(1)]
    return torch.stack(parts).square().sum(0).mean()


class Written(nn.Module):
    """A norm layer in elementary operations, whose derivatives of every order are right.

    Args:
        layer: its parameters are kept.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.kind, self.eps = layer, type(layer), layer.eps

    @property
    def weight(self) -> Tensor:
        """That of the layer, which transformers of torch look at."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        """That of the layer."""
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return (x - mean) / sqrt(var + eps) · weight + bias."""
        layer, shape = self.layer, x.shape
        if self.kind is nn.LayerNorm:
            dims, columns = tuple(range(-len(layer.normalized_shape), 0)), ()
        elif self.kind is nn.GroupNorm:
            x, dims, columns = x.reshape(len(x), layer.num_groups, -1), (2,), (x.ndim - 2) * (1,)
        else:
            dims, columns = (0, *range(2, x.ndim)), (x.ndim - 2) * (1,)
        mean, var = x.mean(dims, keepdim=True), x.var(dims, correction=0, keepdim=True)
        if self.kind in BATCH_NORMS and not self.training:
            stats = (-1, *columns)
            mean, var = layer.running_mean.reshape(stats), layer.running_var.reshape(stats)
        y = ((x - mean) / (var + layer.eps).sqrt()).reshape(shape)
        if layer.weight is None:
            return y
        weight, bias = layer.weight, layer.bias
        if columns:
            weight, bias = weight.reshape(-1, *columns), bias.reshape(-1, *columns)
        return y * weight + bias


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def written(net: nn.Module) -> nn.Module:
    """Return a copy of a net with its norm layers in elementary operations."""
    net = copy.deepcopy(net)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if type(child) in (nn.LayerNorm, nn.GroupNorm, *BATCH_NORMS):
                setattr(module, name, Written(child).train(child.training))
    return net


def two_sided(case: Case, net: nn.Module) -> Tensor:
    """Return mean (‖∇_x Σ f‖ - 1)²."""
    n2 = slopes(case, lambda z: case.run(net, z).flatten(1).sum(1))[1]
    return (n2.sqrt() - 1).square().mean()


def curvature_of_signs(case: Case, net: nn.Module) -> Tensor:
    """CURE: the change of the gradient along its signs."""
    here, _ = slopes(case, lambda z: losses(case, net, z))
    signs = here.detach().sign().flatten(1)
    step = 1.5 * signs / signs.norm(dim=1, keepdim=True).clamp(min=1e-30)
    moved = (case.x + step.reshape(case.x.shape)).detach().requires_grad_()
    (there,) = torch.autograd.grad(losses(case, net, moved).sum(), moved, create_graph=True)
    return (there - here).flatten(1).square().sum(1).mean()


ONE: dict[str, Any] = {"weight": 1.0, "seed": 0}
ROWS = {
    "weight_grad_norm": Row(
        lambda **axes: gpkit.weight_grad_norm(**ONE, **axes), in_weights, weight_norm
    ),
    "…, finite differences": Row(
        lambda **axes: gpkit.weight_grad_norm(**ONE, **axes, estimator="finite_difference"),
        in_weights,
        weight_norm,
    ),
    "per_sample_grad_norm": Row(
        lambda **axes: gpkit.per_sample_grad_norm(**ONE, **axes), in_weights_each, each_weight_norm
    ),
    "fisher": Row(lambda **axes: gpkit.fisher(**ONE, **axes), of_labels),
    "irm": Row(lambda **axes: gpkit.irm(**ONE, **axes), of_environments),
    "input_grad_norm": Row(
        lambda **axes: gpkit.input_grad_norm(**ONE, **axes), of_losses, loss_slope
    ),
    "cure": Row(lambda **axes: gpkit.cure(**ONE, **axes), of_losses, curvature_of_signs),
    "jacobian": Row(
        lambda **axes: gpkit.jacobian(**ONE, **axes, estimator="exact"), of_outputs, jacobian
    ),
    "r1": Row(lambda **axes: gpkit.r1(**ONE, **axes), of_outputs, jacobian),
    "approximate_r1": Row(lambda **axes: gpkit.approximate_r1(**ONE, **axes), of_outputs),
    "wgan_gp": Row(lambda **axes: gpkit.wgan_gp(**ONE, **axes), between_equals, two_sided),
    "dragan": Row(lambda **axes: gpkit.dragan(**ONE, **axes), of_outputs),
    "duq": Row(lambda **axes: gpkit.duq(**ONE, **axes), of_outputs, two_sided),
    "curvature": Row(
        lambda **axes: gpkit.curvature(**ONE, **axes, estimator="projection"), of_outputs
    ),
    "curvature, exact": Row(
        lambda **axes: gpkit.curvature(**ONE, **axes),
        of_outputs,
        partial(all_derivatives, order=2),
        most=8,
    ),
    "curvature, order 3": Row(
        lambda **axes: gpkit.curvature(**ONE, **axes, order=3),
        of_outputs,
        partial(all_derivatives, order=3),
        most=8,
    ),
}


@dataclass
class Cell:
    """What was found.

    Args:
        doctor: the codes of the errors, then "(warns: ...)"; "ok" without both.
        stops: whether the doctor says that it would not train.
        training: what two steps did.
        trains: whether they gave finite numbers, and the penalty a gradient.
        error: of the penalty's value and gradient, relative; None if it was not compared.
        why: why it was not.
    """

    doctor: str
    stops: bool
    training: str
    trains: bool
    error: float | None
    why: str = ""

    @property
    def right(self) -> bool | None:
        """Whether the gradient is right; None if it was not compared."""
        return None if self.error is None else self.error < 1e-3

    @property
    def disagreement(self) -> str:
        """What the doctor and the facts disagree in; "" if they agree."""
        works = self.trains and self.right is not False
        if self.stops and works:
            return "false alarm"
        return "" if self.stops or works else "missed"


def diagnosed(case: Case, row: Row) -> tuple[str, bool]:
    """Return what the doctor says."""
    loss = None if case.y is not None else (lambda out: F.softplus(-tensor(out).flatten(1)).mean(1))
    chosen = {}
    targets = (ROWS["wgan_gp"], ROWS["dragan"])  # refused, here and there, for several scores
    if case.field and row.call is of_outputs and row not in targets:  # which gpkit asks for
        chosen["of"] = Selected(case.field, summed=row is ROWS["duq"])
    report = gpkit.diagnose(case.net, row.build(**chosen), case.example, loss=loss, costs=False)
    errors = sorted({f.code for f in report.errors})
    warned = sorted({f.code for f in report.findings if f.severity == "warning"})
    said = ", ".join(errors) or "ok"
    return f"{said} (warns: {', '.join(warned)})" if warned else said, not report.ok


@dataclass(frozen=True)
class Selected:
    """A field of a net's output, or the sum of its entries."""

    field: str
    summed: bool

    def __call__(self, output: Any) -> Tensor:
        """Return it, for each sample."""
        found = getattr(output, self.field)
        return found.flatten(1).sum(1) if self.summed else found


def tensor(output: Any) -> Tensor:
    """Return the tensor of an output."""
    for name in ("logits", "sample"):
        output = getattr(output, name, output)
    return output


def trained_on(case: Case, row: Row) -> tuple[str, bool]:
    """Take two steps; return what happened."""
    net, penalty = copy.deepcopy(case.net), row.build()
    params = trained(net)
    optimizer = torch.optim.SGD(params, lr=1e-3)
    for _ in range(2):
        term = row.call(penalty, case, net)
        grads = torch.autograd.grad(term, params, allow_unused=True, retain_graph=True)
        if not any(g is not None and g.any() for g in grads):
            return "no gradient", False
        optimizer.zero_grad()
        (losses(case, net).mean() + term).backward()
        if not all(p.grad.isfinite().all() for p in params if p.grad is not None):
            return "not finite", False
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
    return "trains", True


def compared(case: Case, row: Row) -> float | None:
    """Return the largest relative error of the penalty's value and gradient, in float64.

    The truth is the formula by hand: its value, its gradient by double backpropagation with
    attention and norm layers in elementary operations, and differences of its value. Where there
    is no formula by hand, it is differences of the penalty's own value from the same seed.
    """
    case = in_double(case)
    net = copy.deepcopy(case.net)
    if losses(case, net).ne(losses(case, net)).any():  # masks, or a state that moves: spectral norm
        case.net.eval()
    net = copy.deepcopy(case.net)
    value = row.call(row.build(), case, net)
    own, errors = gradient(value, net), []
    by_hand = row.by_hand or (lambda case, net: row.call(row.build(), case, net))
    if row.by_hand is not None:
        net = written(case.net)
        with sdpa_kernel(SDPBackend.MATH):
            true = by_hand(case, net)
            errors.append(float((value - true).abs() / true.abs().clamp(min=1e-12)))
            try:
                grads = gradient(true, net)
                errors.append(float((own - grads).norm() / grads.norm().clamp(min=1e-12)))
            except RuntimeError:  # torch has no second derivative: differences alone
                pass
        case = Case(written(case.net), case.inputs, case.y, case.field)
    errors += off(case, by_hand, own)
    return max(errors) if errors else None


def off(case: Case, of: Callable[[Case, nn.Module], Tensor], own: Tensor) -> list[float]:
    """Return by how much a gradient is off the differences of a value, where it has no kink."""
    errors = []
    for seed in range(2):
        v = torch.randn(own.shape, generator=torch.Generator().manual_seed(seed)).to(own)
        v = v / v.norm() + own / own.norm().clamp(min=1e-12)
        for h in (1e-5, 1e-6, 1e-7, 1e-8):
            one, two = (central(case, of, v, step) for step in (h, 2 * h))
            if abs(one - two) <= 1e-3 * abs(one) + 1e-9:  # no kink between
                errors.append(abs(float(own @ v) - one) / max(abs(one), 1e-6))
                break
    return errors


def central(case: Case, of: Callable[[Case, nn.Module], Tensor], v: Tensor, h: float) -> float:
    """Return a central difference of a value in the parameters along v."""
    values = []
    for sign in (1, -1):
        net = copy.deepcopy(case.net)
        with torch.no_grad():
            parts = v.split([p.numel() for p in trained(net)])
            for p, part in zip(trained(net), parts, strict=True):
                p.add_(part.reshape(p.shape), alpha=sign * h)
        with sdpa_kernel(SDPBackend.MATH):
            values.append(float(of(case, net).detach()))
    return (values[0] - values[1]) / (2 * h)


def gradient(value: Tensor, net: nn.Module) -> Tensor:
    """Return the gradient in all trained parameters as one vector."""
    params = trained(net)
    grads = torch.autograd.grad(value, params, allow_unused=True)
    pairs = zip(params, grads, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])


def in_double(case: Case) -> Case:
    """Return the net and the batch in float64."""

    def double(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: double(part) for key, part in value.items()}
        if isinstance(value, tuple):
            return tuple(map(double, value))
        return value.double() if value.is_floating_point() else value

    return Case(copy.deepcopy(case.net).double(), double(case.inputs), case.y, case.field)


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """A context that raises a TimeoutError."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def cell(make: Callable[[], Case], row: Row) -> Cell:
    """Return what is found of one net and one penalty."""
    torch.manual_seed(0)
    case = make()
    entries = case.x[0].numel()
    if row.most is not None and entries > row.most:
        why = f"not run: a sample has {entries} entries, and each takes a backward pass of its own"
        return Cell("", False, "", False, None, why)
    doctor, stops = diagnosed(case, row)
    try:
        training, trains = trained_on(case, row)
    except TimeoutError:
        raise
    except Exception as error:  # whatever training ends with
        training, trains = f"{type(error).__name__}: {str(error).splitlines()[0]}", False
    error = compared(case, row) if trains else None
    why = "" if error is not None else "kinks" if trains else "none"
    return Cell(doctor, stops, training, trains, error, why)


def shown(name: str, penalty: str, found: Cell) -> str:
    """Return a line of the table."""
    if not found.doctor:
        return f"| {name} | {penalty} | {found.why} | | | |"
    error = found.why if found.error is None else f"{found.error:.0e}"
    training = found.training.replace("|", "/")
    training = training if len(training) < 90 else training[:87] + "..."
    disagreement = f"**{found.disagreement}**" if found.disagreement else ""
    return f"| {name} | {penalty} | {found.doctor} | {training} | {error} | {disagreement} |"


def main() -> None:
    """Run the cells and print the table; write it if it is whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="+", default=list(CASES))
    parser.add_argument("--penalties", nargs="+", default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tasks = [(name, chosen.penalties) for name in chosen.nets]
    start = time.perf_counter()
    with ProcessPoolExecutor(chosen.jobs, mp_context=get_context("fork")) as pool:
        found = list(pool.map(of_net, *zip(*tasks, strict=True)))
    if chosen.penalties == list(ROWS):
        write(dict(zip(chosen.nets, found, strict=True)), time.perf_counter() - start)


def of_net(name: str, penalties: list[str]) -> list[str]:
    """Return the lines of a net; or why it is left out."""
    lines = []
    try:
        CASES[name]()
    except Exception as error:
        return [f"Left out: {name}: {type(error).__name__}: {str(error).splitlines()[0]}."]
    for penalty in penalties:
        start = time.perf_counter()
        try:
            with limited(LIMIT):
                lines.append(shown(name, penalty, cell(CASES[name], ROWS[penalty])))
        except TimeoutError as error:
            lines.append(f"| {name} | {penalty} | not finished: {error} |  |  |  |")
        print(lines[-1], f"{time.perf_counter() - start:.1f} s", flush=True)
    return lines


def write(new: dict[str, list[str]], seconds: float) -> None:
    """Write the lines of nets into the page, in the place of the old ones, and count them."""
    versions = []
    for library in LIBRARIES:
        try:
            versions.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    head, _, old = PAGE.read_text().partition(MARK)
    kept = {name: [li for li in old.splitlines() if li.startswith(f"| {name} |")] for name in CASES}
    lines = [line for name in CASES for line in new.get(name, kept[name])]
    left_out = [line for line in lines if not line.startswith("|")]
    cells = [line for line in lines if line.startswith("|")]
    whole = new.keys() >= CASES.keys()
    runs = f"one run of {seconds / 60:.0f} minutes" if whole else "several runs"
    columns = [line.strip("| ").split(" | ") for line in cells]
    tried = [c for c in columns if not c[2].startswith("not run")]
    ends = [c[4].strip() if len(c) > 4 else "" for c in tried]
    trained = [end for end in ends if end not in ("none", "")]
    counts = [
        f"{len(columns)} cells of {len({c[0] for c in columns})} nets in {runs}",
        f"{len(trained)} train, {sum(e != 'kinks' for e in trained)} of them compared with float64 "
        f"by hand and {trained.count('kinks')} not, because every difference crosses a kink",
        f"{len(tried) - len(trained)} do not train",
        f"{len(columns) - len(tried)} are not run",
    ]
    counts += [
        f"{sum(f'**{kind}**' in c for c in cells)} {kind}" for kind in ("false alarm", "missed")
    ]
    PAGE.write_text(
        "\n".join(
            [
                f"{head}{MARK}\n{date.today()}, {', '.join(versions)}: {', '.join(counts)}.",
                *[f"\n{line}" for line in left_out],
                "",
                "| net | penalty | the doctor | training | error | |",
                "| --- | --- | --- | --- | --- | --- |",
                *cells,
                "",
            ]
        )
    )


if __name__ == "__main__":
    main()
