"""What the table of nets and penalties has shown to be wrong, and some of its cells."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils.parametrizations import spectral_norm

import gpkit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
B = 6


class Logits(nn.Module):
    """A net whose output is no tensor, as in transformers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x):
        return SimpleNamespace(logits=self.net(x))


def told(net, penalty, *y):
    x = torch.randn(B, 4)
    report = gpkit.diagnose(net, penalty, (x, *y) if y else x, costs=False)
    return report, [f.code for f in report.errors]


@pytest.mark.parametrize("norm", [spectral_norm, old_spectral_norm])
def test_the_vectors_of_spectral_norm_are_no_wrong_derivative(norm):
    net = nn.Sequential(norm(nn.Linear(4, 30)), nn.Tanh(), norm(nn.Linear(30, 1)))
    for layer in (net[0], net[2]):  # far from converged
        for name, b in layer.named_buffers():
            if name.endswith(("_u", "0.u", "_v", "0.v")):
                b.copy_(nn.functional.normalize(torch.randn_like(b), dim=0))
    _, errors = told(net, gpkit.weight_grad_norm())
    assert not errors


def test_environments_need_one_derivative_of_the_net():
    net = nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3))
    labels = torch.arange(B) % 3
    assert told(net, gpkit.irm(), labels)[1] == []
    assert told(net, gpkit.jacobian(), labels)[1] == ["no-double-backward"]


@pytest.mark.parametrize("preset", [gpkit.jacobian, gpkit.fisher, gpkit.irm, gpkit.duq])
def test_the_logits_of_an_output_are_taken(preset):
    net, labels = Logits(), torch.arange(B) % 3
    report, errors = told(net, preset(), labels)
    assert not errors
    notes = [f for f in report.findings if f.code == "call"]
    assert [f.severity for f in notes] == ["note"]
    assert "returns a SimpleNamespace, of which its logits are taken" in notes[0].why
    choosing = gpkit.jacobian(of=lambda output: output.logits)
    assert "call" not in told(net, choosing, labels)[0].codes


class Square(torch.autograd.Function):
    """It can be differentiated again."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Slopes(nn.Module):
    """A net of derivatives of a net, by `torch.func`."""

    def __init__(self):
        super().__init__()
        self.energy, self.last = nn.Linear(4, 5), nn.Linear(4, 3)

    def forward(self, x):
        energy = lambda x: self.energy(x).tanh().sum()  # noqa: E731
        return self.last(torch.func.vmap(torch.func.grad(energy))(x))


class Spectrum(nn.Module):
    """A net with complex weights."""

    def __init__(self):
        super().__init__()
        self.filter, self.last = nn.Parameter(torch.randn(3) + 1j), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=4).tanh())


class Remembers(nn.Module):
    """A net that holds a tensor with a graph, as a recurrent net its state."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.state = [self.last.weight.sum()]

    def forward(self, x):
        return self.last(x.tanh())


def hidden(layer):
    return nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3))


@pytest.mark.filterwarnings("ignore:.*(deprecated|dynamic_axes).*")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.jit.script(hidden(nn.Tanh())),
        lambda: hidden(torch.jit.script(nn.Sequential(nn.LayerNorm(5), nn.Tanh()))),
        lambda: hidden(type("Squared", (nn.Module,), {"forward": lambda _, x: Square.apply(x)})()),
        lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)),
        Slopes,
        Spectrum,
        Remembers,
    ],
    ids=["scripted", "scripted part", "Function", "old weight norm", "func", "complex", "state"],
)
def test_nets_of_all_kinds_are_looked_at_and_are_no_false_alarm(make):
    torch.manual_seed(0)
    net = make()
    report, errors = told(net, gpkit.jacobian(), torch.arange(B) % 3)
    assert not errors, str(report)
    assert not any("could not be made" in f.why for f in report.findings), str(report)
    assert not any("could be compared" in f.why for f in report.findings), str(report)
    assert report.numbers["jacobian"]["curve"]
    assert all(p.is_leaf and p.grad is None for p in net.parameters())


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
def test_a_scripted_norm_layer_is_wrong_at_order_two():
    """No hook of gpkit reaches it, and torch's own third derivative is wrong."""
    torch.manual_seed(0)
    net = hidden(torch.jit.script(nn.Sequential(nn.LayerNorm(5), nn.Tanh())))
    assert told(net, gpkit.curvature(), torch.arange(B) % 3)[1] == ["wrong-derivative"]
    other = hidden(nn.Sequential(nn.LayerNorm(5), nn.Tanh()))
    assert told(other, gpkit.curvature(), torch.arange(B) % 3)[1] == []


@pytest.mark.parametrize(
    ("net", "penalty", "codes", "stops"),
    [
        ("ReLU critic", "r1", "ok", False),
        ("ReLU critic", "curvature", "piecewise-linear", True),
        ("Hardsigmoid", "input_grad_norm", "no-double-backward", True),
        ("Hardsigmoid", "…, finite differences", "ok", False),
    ],
)
def test_cells_of_the_table(net, penalty, codes, stops, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from doctor import CASES, ROWS, cell

    found = cell(CASES[net], ROWS[penalty])
    assert found.doctor.startswith(codes)
    assert found.stops == stops
    assert found.trains == (not stops)
    assert found.right is (None if stops else True)
    assert not found.disagreement
