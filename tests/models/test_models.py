"""The nets: shapes, independent samples, true derivatives, refusals, and that they learn."""

import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpkit.data import Digits
from gpkit.models import MLP, ConvNet, ViT
from gpkit.models.vit import Attention, LayerNorm

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


def test_attention_is_softmax_attention_by_heads():
    # catches heads that are cut or joined along the wrong dimension, and a missing scale
    attention = Attention(dim=6, heads=3, dropout=0.0).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = attention.qkv(x).split(6, dim=-1)
    heads = [slice(2 * h, 2 * h + 2) for h in range(3)]
    mixed = [
        torch.softmax(q[..., h] @ k[..., h].mT / math.sqrt(2), dim=-1) @ v[..., h] for h in heads
    ]
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(mixed, dim=-1)))


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


def test_layer_norm_is_that_of_torch_and_right_at_order_three():
    # catches the fused kernel, whose third derivative is wrong
    norm = LayerNorm(6).double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (6,)))

    def second(x):
        (first,) = torch.autograd.grad((norm(x).sin() * w).sum(), x, create_graph=True)
        return torch.autograd.grad((first * w).sum(), x, create_graph=True)

    assert torch.autograd.gradcheck(second, x)


@pytest.mark.parametrize(
    ("net", "epochs", "accuracy"), [(MLP, 10, 0.93), (ConvNet, 5, 0.97), (ViT, 12, 0.85)]
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
