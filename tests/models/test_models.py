"""The nets: shapes, independent samples, true derivatives, refusals, and that they learn."""

import copy
import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import rows
from compare import gradients, relative_error
from omegaconf import OmegaConf
from scenes import Scene
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpkit.data import Digits
from gpkit.models import MLP, ConvNet, DistanceNet, ViT
from gpkit.models.vit import Attention, Block

CONFIGS = Path(__file__).parents[2] / "configs"
NETS = {
    "mlp": MLP,
    "convnet": ConvNet,
    "convnet-plain": lambda *args, **options: ConvNet(*args, groups=0, **options),
    "convnet-flatten": lambda *args, **options: ConvNet(*args, pool="flatten", **options),
    "vit": ViT,
}
nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS)


@nets
@pytest.mark.parametrize("num_outputs", [1, 10])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)], ids=str)
def test_shape(net, num_outputs, shape):
    # catches a squeezed single output, and height and width exchanged
    assert net(shape, num_outputs)(torch.randn(5, *shape)).shape == (5, num_outputs)


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_flattened_convnet_takes_odd_sides(depth):
    # catches a head that rounds the halved sides down
    assert ConvNet((1, 7, 5), 2, depth=depth, pool="flatten")(torch.randn(3, 1, 7, 5)).shape == (
        3,
        2,
    )


def test_noise_is_added_to_inputs_in_training_alone():
    # catches noise at test, and noise that is the same for all samples
    net, x = MLP((1, 4, 4), 3, width=8, noise=0.3), torch.zeros(4000, 1, 4, 4)
    assert torch.equal(net.eval()(x[:2]), net(x[2:4]))
    seen = []
    net.features.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net.train()(x)
    assert seen[0].std(0).mean().item() == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize(("shape", "width", "depth"), [((2,), 2048, 3), ((3,), 1024, 2)])
def test_a_distance_net_starts_as_a_distance(shape, width, depth):
    # catches weights of another scale, which would grow or shrink from layer to layer
    torch.manual_seed(0)
    net = DistanceNet(shape, 1, width=width, depth=depth, beta=1e4, radius=0.5)
    x = torch.randn(200, *shape)
    assert (net(x)[:, 0] - (x.norm(dim=1) - 0.5)).abs().mean() < 0.2 * x.norm(dim=1).mean()


@nets
def test_samples_are_independent_in_training(net):
    # catches batch norm, a softmax over the batch, and reshapes that mix samples
    model = net((1, 4, 4), 3).train()
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(model, torch.randn(3, 1, 4, 4))
    norms = jacobian.permute(0, 2, 1, 3, 4, 5).flatten(2).norm(dim=2)  # [B, B]
    assert torch.equal(norms - norms.diag().diag(), torch.zeros(3, 3))
    assert (norms.diag() > 1e-4).all()


@nets
def test_every_parameter_is_trained(net):
    # catches a branch that is built but not used
    model = net((1, 4, 4), 3)
    F.cross_entropy(model(torch.randn(8, 1, 4, 4)), torch.arange(8) % 3).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@nets
def test_curvature_is_that_of_the_net(net):
    # catches an operation without, or with a wrong, double backward
    model = net((1, 4, 4), 1, **{"dim": 8, "heads": 2} if net is ViT else {"width": 8}).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(model, x, atol=1e-6)


def test_a_smooth_net_is_curved_and_a_relu_net_is_not():
    # catches a default activation under which penalties of order 2 train nothing
    def hessian(**options):
        return torch.autograd.functional.hessian(
            lambda x: MLP((4,), 1, **options)(x).sum(), torch.randn(3, 4)
        )

    assert hessian().abs().max() > 1e-3
    assert hessian(activation="relu").abs().max() == 0


def test_depth_counts_the_hidden_layers():
    # catches an off-by-one in the layers
    def linears(depth):
        modules = MLP((7,), 2, width=5, depth=depth).modules()
        return [(m.in_features, m.out_features) for m in modules if isinstance(m, torch.nn.Linear)]

    assert linears(0) == [(7, 2)]
    assert linears(2) == [(7, 5), (5, 5), (5, 2)]


@pytest.mark.parametrize("net", [MLP, ViT])
def test_dropout_acts_in_training_alone(net):
    # catches attention dropout that stays on in evaluation
    model = net((1, 8, 8), 3, dropout=0.5)
    x = torch.randn(2, 1, 8, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


class ElementaryAttention(Attention):
    """Softmax attention by heads, as it is defined."""

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        size = x.shape[-1] // self.heads
        mixed = [
            torch.softmax(q[..., h] @ k[..., h].mT / math.sqrt(size), dim=-1) @ v[..., h]
            for h in (slice(size * i, size * (i + 1)) for i in range(self.heads))
        ]
        return self.proj(torch.cat(mixed, dim=-1))


class ElementaryNorm(torch.nn.LayerNorm):
    """Layer norm, as it is defined."""

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


def test_attention_is_softmax_attention_by_heads():
    # catches heads that are cut or joined along the wrong dimension, and a missing scale
    attention = Attention(dim=6, heads=3, dropout=0.0).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    defined = copy.deepcopy(attention)
    defined.__class__ = ElementaryAttention
    torch.testing.assert_close(attention(x), defined(x))


def test_every_token_sees_every_token():
    # catches attention over the batch or the heads in place of the tokens
    attention = Attention(dim=4, heads=2, dropout=0.0)
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(attention, torch.randn(1, 3, 4))
    assert jacobian.abs().amax((0, 2, 3, 5)).min() > 1e-4  # [1, N, D, 1, N, D] -> [N, N]


def test_vit_knows_positions_by_its_embedding_alone():
    # catches an embedding that is not added, and patches that are cut across their borders
    model = ViT((1, 4, 4), 3).eval()
    x = torch.randn(2, 1, 4, 4)
    swapped = torch.cat([x[:, :, 2:], x[:, :, :2]], dim=2)  # the upper and the lower patches
    assert not torch.allclose(model(x), model(swapped), atol=1e-4)
    with torch.no_grad():
        model.position.zero_()
    torch.testing.assert_close(model(x), model(swapped))


FIRST_ORDER = (
    "per_sample", "irm", "fishr", "gnp", "sam", "cure", "path_length", "spectral", "sobolev",
    "right_reasons",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*random estimate of n²")
@pytest.mark.parametrize("order", [1, 2])
@rows(lambda row: not row.name.endswith(("order2", "order3", "two activations")))
def test_every_penalty_of_a_vit_is_right(row, order):
    # catches attention without a double backward, and layer norm with a wrong third derivative
    if order > 1 and row.name.startswith(FIRST_ORDER):
        pytest.skip("it takes order 1")
    outputs = row.scene().target.shape[1]
    net = ViT((1, 2, 2), outputs, patch_size=1, dim=4, depth=1, heads=2).double()
    net.head.weight.data.mul_(20)  # slopes above one, for one-sided forms
    defined = copy.deepcopy(net)
    for module in defined.modules():
        if isinstance(module, Block):
            module.attention.__class__ = ElementaryAttention
        if isinstance(module, torch.nn.LayerNorm):
            module.__class__ = ElementaryNorm
    real, fake = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    target = torch.randn(5, outputs, dtype=torch.float64)
    chosen = {} if row.name.startswith(FIRST_ORDER) else {"order": order, "estimator": None}
    if row.name == "contractive":
        chosen["activation"] = "norm"
    found, true = (
        gradients(row.call(row.build(**chosen, seed=0), scene), scene.net)
        for scene in (Scene(n, real, fake, target) for n in (net, defined))
    )
    assert true.norm() > 1e-6
    assert relative_error(found, true) < 1e-8


@pytest.mark.parametrize(
    ("net", "epochs", "accuracy"), [(MLP, 10, 0.93), (ConvNet, 5, 0.97), (ViT, 8, 0.7)]
)
def test_digits_are_learned(net, epochs, accuracy):
    # catches anything that keeps a net from training, such as a bad initialisation
    data = Digits()
    data.setup("fit")
    model = net(data.input_shape, data.num_outputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    x, y = data.val_set.tensors
    assert (model.eval()(x).argmax(1) == y).float().mean() > accuracy


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MLP((4,), 0), r"`MLP\(num_outputs=\.\.\.\)` must be an integer >= 1; got 0"),
        (lambda: MLP((4,), 1, width=0), r"`MLP\(width=\.\.\.\)` must be an integer >= 1; got 0"),
        (lambda: MLP((4,), 1, depth=-1), r"`MLP\(depth=\.\.\.\)` must be an integer >= 0; got -1"),
        (lambda: MLP((4,), 1, dropout=1.0), r"`MLP\(dropout=1\.0\)` must lie in \[0, 1\)"),
        (lambda: MLP((4,), 1, activation="glue"), r"`MLP\(activation=.*did you mean 'gelu'"),
        (lambda: ConvNet((64,), 1), r"`ConvNet\(input_shape=\(64,\)\)` must be an image .* `MLP`"),
        (lambda: ConvNet((1, 8, 8), 1, width="x"), r"`ConvNet\(width=.* got 'x'"),
        (lambda: ConvNet((1, 8, 8), 1, width=12), r"width=12, groups=8.*use groups=4"),
        (lambda: ConvNet((1, 8, 8), 1, groups=-1), r"`ConvNet\(groups=.* >= 0; got -1"),
        (lambda: ConvNet((1, 8, 8), 1, pool="meen"), r"`ConvNet\(pool=.*did you mean 'mean'"),
        (lambda: ConvNet((1, 8, 8), 1, activation="tan"), r"ConvNet\(.*did you mean 'tanh'"),
        (lambda: ViT((64,), 1), r"`ViT\(input_shape=\(64,\)\)` must be an image \(C, H, W\)"),
        (
            lambda: ViT((1, 8, 8), 1, patch_size=3),
            r"^`ViT\(patch_size=3\)` must divide the image side 8; use 1, 2, 4 or 8$",
        ),
        (lambda: ViT((1, 8, 12), 1, patch_size=8), r"sides 8 and 12; use 1, 2 or 4$"),
        (lambda: ViT((1, 7, 8), 1), r"sides 7 and 8; use 1$"),
        (lambda: ViT((1, 8, 8), 1, dim=66), r"`ViT\(dim=66, heads=4\)` .*; use heads=2"),
        (lambda: ViT((1, 8, 8), 1, activation="relo"), r"ViT\(.*did you mean 'relu'"),
        (lambda: ViT((1, 8, 8), 1, dropout=-0.1), r"`ViT\(dropout=.*got -0\.1"),
    ],
)
def test_wrong_options_are_refused(build, words):
    # catches a value that would fail later with torch's words, or not at all
    with pytest.raises(ValueError, match=words) as error:
        build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("net", [MLP, ConvNet, ViT])
def test_config_spells_out_the_defaults(net):
    # catches a default that is changed in one of the two places, and an option without a line
    config = dict(OmegaConf.load(CONFIGS / "model" / f"{net.__name__.lower()}.yaml"))
    assert config.pop("_target_") == f"gpkit.models.{net.__name__}"
    options = inspect.signature(net).parameters.values()
    assert config == {p.name: p.default for p in options if p.kind is p.KEYWORD_ONLY}
