"""A named activation, as what is differentiated and as what it is differentiated in."""

import copy

import oracles
import pytest
import torch
from compare import gradients, relative_error
from scenes import B
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import gpkit


class Nested(nn.Module):
    """A convolutional encoder whose nonlinearity works in place, and a head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GELU(), nn.ReLU(inplace=True))
        self.unused = nn.Linear(1, 1)
        self.pair = nn.Identity()
        self.head = nn.Linear(12, 4)

    def forward(self, x):  # [B, 2, 4, 4] -> [B, 4]
        return self.head(self.encoder(x).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Nested().double()


@pytest.fixture
def x():
    rng = torch.Generator().manual_seed(1)
    size = torch.tensor([0.05, 2.0, 0.5, 8.0, 1.0]).double().reshape(B, 1, 1, 1)
    return torch.randn(B, 2, 4, 4, generator=rng, dtype=torch.float64) * size


@pytest.fixture
def y():
    return torch.tensor([0, 3, 1, 2, 0])


def hooks(module):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]


def head(net, params, x, layers):
    """Return the encoder's first layers as a function of the parameters, without gpkit."""
    layer = nn.Sequential(*net.encoder[:layers])
    own = {n.removeprefix("encoder."): p for n, p in params.items() if n.startswith("encoder.0")}
    return functional_call(layer, own, (x,))


def tail(params, h):
    """Return the logits of one sample's GELU output h."""
    return F.relu(h).flatten() @ params["head.weight"].T + params["head.bias"]


def oracle(net, formula):
    """Return the value of a formula of the parameters, and its gradient in all of them."""
    params = {n: p.detach() for n, p in net.named_parameters()}
    grads, value = torch.func.grad_and_value(formula)(params)
    return value, torch.cat([g.flatten() for g in grads.values()])


def assert_is(found, net, formula):
    value, gradient = oracle(net, formula)
    assert relative_error(found, value) < 1e-10
    assert relative_error(gradients(found, net), gradient) < 1e-10


def of_gelu(net, x):
    """Return mean ‖∂h/∂x‖² of the GELU output h, as a formula of the parameters."""

    def formula(params):
        one = lambda z: head(net, params, z[None], 2)[0]  # noqa: E731
        return oracles.input_norms(one, 1, x).square().mean()

    return formula


def in_gelu(net, x, y, *, loss):
    """Return mean ‖∂f/∂h‖² in the GELU output h, f the logits or the losses."""

    def formula(params):
        def one(h, target):
            logits = tail(params, h)
            return F.cross_entropy(logits, target) if loss else logits

        h = head(net, params, x, 2)
        return oracles.input_norms(one, 1, h, y).square().mean()

    return formula


def test_of_an_activation(net, x):
    # catches the output in its place, and an h that a later operation in place has changed
    penalty = gpkit.GradientPenalty(of=gpkit.activation("encoder.1"))
    found = penalty(net, x)
    assert_is(found, net, of_gelu(net, x))
    assert not any(hooks(net))


def test_in_an_activation(net, x, y):
    # catches the input in its place, a hidden 1/B, and an h cut off the parameters before it
    penalty = gpkit.GradientPenalty(wrt=gpkit.activation("encoder.1"))
    assert_is(penalty(net, x), net, in_gelu(net, x, y, loss=False))
    penalty = gpkit.GradientPenalty(of="loss", wrt=gpkit.activation("encoder.1"))
    found = penalty(lambda x: F.cross_entropy(net(x), y, reduction="none"), x, net)
    assert_is(found, net, in_gelu(net, x, y, loss=True))
    assert not any(hooks(net))


def test_of_one_activation_in_another(net, x):
    penalty = gpkit.GradientPenalty(
        of=gpkit.activation("encoder.1"), wrt=gpkit.activation("encoder.0")
    )

    def formula(params):
        z = head(net, params, x, 1)  # dh/dz is diagonal: Φ(z) + z φ(z)
        slope = (1 + torch.erf(z / 2**0.5)) / 2 + z * torch.exp(-(z**2) / 2) / (2 * torch.pi) ** 0.5
        return slope.square().flatten(1).sum(1).mean()

    assert_is(penalty(net, x), net, formula)


def test_of_an_activation_in_the_weights(net, x):
    penalty = gpkit.GradientPenalty(of=gpkit.activation("encoder.1"), wrt="weight")

    def formula(params):
        own = {n: p for n, p in params.items() if n.startswith("encoder.0")}
        flat = lambda p: head(net, p, x, 2).mean(0).flatten()  # noqa: E731
        return sum(j.square().sum() for j in torch.func.jacrev(flat)(own).values())

    assert_is(penalty(lambda: net(x), net), net, formula)


def test_an_activation_whose_graph_is_there(net, x, y):
    x.requires_grad_()
    h = net.encoder[:2](x)
    # any output would be taken for the activation
    with pytest.raises(TypeError, match=r"which may be any output: .*gpkit.jacobian\(\)\(h, x\)"):
        gpkit.GradientPenalty(of=gpkit.activation("encoder.1"))(net(x), x)
    assert_is(gpkit.GradientPenalty()(h, x), net, of_gelu(net, x.detach()))  # the advice
    h = net.encoder[:2](x)
    logits = net.head(F.relu(h).flatten(1))
    losses = F.cross_entropy(logits, y, reduction="none")
    found = gpkit.GradientPenalty(of="loss", wrt=gpkit.activation("encoder.1"))(losses, h)
    assert_is(found, net, in_gelu(net, x.detach(), y, loss=True))


def test_at_other_points(net, x, y):
    # the activation is that at the points of `at`, and the module may come last
    rows = x.flip(0) * 0.5
    penalty = gpkit.GradientPenalty(wrt=gpkit.activation("encoder.1"), at="fake")
    assert_is(penalty(net, real=x, fake=rows), net, in_gelu(net, rows, y, loss=False))
    found = penalty(lambda z: net(z), net, real=x, fake=rows)
    assert_is(found, net, in_gelu(net, rows, y, loss=False))


def test_tokens_have_activations():
    # integers have no derivative, and their embeddings have
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)).double()
    tokens = torch.tensor([[1, 2], [3, 3], [0, 6]])
    found = gpkit.GradientPenalty(wrt=gpkit.activation("0"))(net, tokens)

    def formula(params):
        slope = 1 - params["0.weight"][tokens].tanh().square()  # [B, 2, 3]
        J = params["3.weight"] * slope.flatten(1)[:, None]  # [B, 2, 6]
        return J.square().sum((1, 2)).mean()

    assert_is(found, net, formula)


def test_a_frozen_start(net, x, y):
    # an activation without a graph of its own is differentiated in as well
    net.encoder.requires_grad_(False)
    found = gpkit.GradientPenalty(wrt=gpkit.activation("encoder.1"))(net, x)
    value, gradient = oracle(net, in_gelu(net, x, y, loss=False))
    assert relative_error(found, value) < 1e-10
    found.backward()
    assert net.encoder[0].weight.grad is None
    weight = net.head.weight
    assert relative_error(weight.grad.flatten(), gradient[-4 - weight.numel() : -4]) < 1e-10


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        ("encoder.11", ValueError, r"no submodule of the Nested \(did you mean 'encoder.1'\?\)"),
        ("zzz", ValueError, "names no submodule of the Nested: it has 'encoder', 'encoder.0'"),
        ("unused", ValueError, "was not computed: the forward does not call that submodule"),
    ],
)
@pytest.mark.parametrize("axis", ["of", "wrt"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_refusals_of_names(net, x, y, name, error, said, axis, wrapped):
    penalty = gpkit.GradientPenalty(**{axis: gpkit.activation(name)})
    module = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), penalty)
    with pytest.raises(error, match=said) as caught:
        module.penalized_loss((x, y)) if wrapped else penalty(net, x)
    assert "\n" not in str(caught.value)
    assert not any(hooks(net))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda x: x * 2, ValueError, "the forward calls that submodule several times"),
        (lambda x: (x, x), TypeError, "the Twice returns a tuple: name a submodule inside it"),
        (lambda x: x.argmax(1), TypeError, "the Twice returns torch.int64"),
        (lambda x: x.sum(0), ValueError, r"a row for each of 5 samples; got \[3\]"),
    ],
)
def test_refusals_of_what_a_submodule_gives(change, error, said):
    class Twice(nn.Module):
        def forward(self, x):
            return change(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd = Twice()

        def forward(self, x):
            given = self.odd(x)
            several = isinstance(given, torch.Tensor) and given.shape == x.shape
            return self.odd(x) if several else x * x

    net = Net()
    with pytest.raises(error, match=said):
        gpkit.GradientPenalty(wrt=gpkit.activation("odd"))(net, torch.ones(B, 3))
    assert not any(hooks(net))


def test_refusals(net, x):
    with pytest.raises(TypeError, match=r"needs the module that contains it: penalty\(net, x\)"):
        gpkit.GradientPenalty(of=gpkit.activation("encoder.1"))(lambda x: net(x), x)
    with pytest.raises(ValueError, match=r"must be the name of a submodule, .*; got 3"):
        gpkit.activation(3)
    with pytest.raises(TypeError, match="an input penalty takes f and the samples"):
        gpkit.GradientPenalty()(net, x, net)
    with pytest.raises(RuntimeError, match="not depend on the activation: is the submodule's out"):
        gpkit.GradientPenalty(wrt=gpkit.activation("0"))(Sidestep(), torch.ones(B, 2))


class Sidestep(nn.Sequential):
    """A net that calls a submodule and does not use what it gives."""

    def __init__(self):
        super().__init__(nn.Linear(2, 2), nn.Linear(2, 2))

    def forward(self, x):
        self[0](x)
        return self[1](x).square()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_forward_that_raises_leaves_no_hook(net, x, y, wrapped):
    def fail(*_):
        raise KeyError("mine")

    net.head.forward = fail
    penalty = gpkit.GradientPenalty(of=gpkit.activation("encoder.1"))
    module = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), penalty)
    with pytest.raises(KeyError, match="mine"):
        module.penalized_loss((x, y)) if wrapped else penalty(net, x)
    assert not any(hooks(net))


@pytest.mark.parametrize("at", ["data", lambda real, fake: fake], ids=["data", "elsewhere"])
def test_wrapped(net, x, y, at):
    # catches an activation of another forward, and the mean loss instead of each sample's
    penalties = {
        "of": gpkit.GradientPenalty(of=gpkit.activation("encoder.1"), at=at),
        "wrt": gpkit.GradientPenalty(of="loss", wrt=gpkit.activation("encoder.1"), at=at),
    }
    module = gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), penalties)
    z = x if at == "data" else x.roll(1, 0)
    terms = [of_gelu(net, z), in_gelu(net, z, y, loss=True)]

    def formula(params):
        loss = F.cross_entropy(functional_call(net, params, (x,)), y)
        return loss + sum(term(params) for term in terms)

    assert_is(module.penalized_loss((x, y)), net, formula)
    assert not any(hooks(net))


def test_wrapped_makes_one_forward(net, x, y):
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    penalty = gpkit.GradientPenalty(of="loss", wrt=gpkit.activation("encoder.1"))
    gpkit.PenalizedModule(net, nn.CrossEntropyLoss(), penalty).penalized_loss((x, y))
    assert len(calls) == 1


def test_contractive_of_a_sigmoid_layer():
    # λ mean_i Σ_j (h_j (1 - h_j))² ‖W_j‖²
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 3)).double()
    x = torch.randn(B, 3, dtype=torch.float64)
    exact = gpkit.contractive(weight=0.3, activation="1", estimator="exact")

    def formula(params):
        h = torch.sigmoid(x @ params["0.weight"].T + params["0.bias"])
        slope, rows = (h * (1 - h)).square(), params["0.weight"].square().sum(1)
        return 0.3 * (slope @ rows).mean()

    assert_is(exact(net, x), net, formula)
    many = gpkit.contractive(weight=0.3, activation="1", estimator=gpkit.projection(4000), seed=0)
    assert relative_error(many(net, x).detach(), oracle(net, formula)[0]) < 0.03
    default = gpkit.contractive()
    assert default.estimator == gpkit.projection(1)
    assert (default.weight, default.of) == (0.1, gpkit.activation("features"))


def test_is_a_value(net, x):
    penalty = gpkit.contractive(activation="encoder.1")
    assert copy.deepcopy(penalty.of) == penalty.of == gpkit.activation("encoder.1")
    assert repr(penalty.of) == "activation(name='encoder.1')"
