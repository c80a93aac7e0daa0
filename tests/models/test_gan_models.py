"""Generators and critics: shapes, labels, independent samples, slopes that can be penalised."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpkit
from gpkit.data import Digits
from gpkit.models import ImageCritic, ImageGenerator, PointCritic, PointGenerator

PRESETS = ["wgan_gp", "wgan_lp", "r1", "r2", "r1_r2", "dragan", "zero_gp", "wgan_div", "max_gp"]
PAIRS = {"points": (PointGenerator, PointCritic), "images": (ImageGenerator, ImageCritic)}
SHAPES = {"points": (2,), "images": (1, 8, 8)}
kinds = pytest.mark.parametrize("kind", PAIRS)
IMAGES = [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 64, 64), (3, 6, 10), (2, 7, 8), (1, 1, 5)]


def pair(kind, latent_dim=3, **options):
    """Return a small generator and critic."""
    generator, critic = PAIRS[kind]
    shape, options = SHAPES[kind], {"width": 32 if kind == "points" else 8, **options}
    return generator(latent_dim, shape, **options), critic(shape, **options)


@pytest.mark.parametrize("shape", [(2,), (1,), (3, 2), *IMAGES], ids=str)
def test_points_of_any_shape(shape):
    # catches samples that stay flat, and scores [B]
    fake = PointGenerator(4, shape)(torch.randn(5, 4))
    assert fake.shape == (5, *shape)
    assert PointCritic(shape)(fake).shape == (5, 1)


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_images_of_any_size(shape):
    # catches height and width exchanged, sides that are rounded, and a head for another size
    fake = ImageGenerator(4, shape, width=8)(torch.randn(5, 4))
    assert fake.shape == (5, *shape)
    assert ImageCritic(shape, width=8)(fake).shape == (5, 1)


@pytest.mark.parametrize(
    ("shape", "sides", "channels"),
    [((1, 8, 8), 4, 16), ((1, 28, 28), 7, 32), ((3, 64, 64), 4, 128)],
)
def test_the_generator_begins_where_the_critic_ends(shape, sides, channels):
    # catches a generator that must make large images from a single pixel, or the reverse
    first = next(m for m in ImageGenerator(4, shape, width=8).modules() if isinstance(m, nn.Linear))
    assert first.out_features == channels * sides**2
    assert ImageCritic(shape, width=8).net.head.in_features == channels * sides**2


@pytest.mark.parametrize(
    ("output", "low", "high"), [("sigmoid", 0, 1), ("tanh", -1, 1), ("linear", -30, 30)]
)
def test_pixels_fill_the_range_of_the_output(output, low, high):
    # catches a tanh for pixels in [0, 1], and a range that is cut
    generator = ImageGenerator(3, (1, 8, 8), width=8, output=output)
    nn.init.zeros_(generator.net[-2].weight)
    for bias, end in ((-30, low), (30, high)):
        nn.init.constant_(generator.net[-2].bias, bias)
        torch.testing.assert_close(
            generator(torch.randn(4, 3)), torch.full((4, 1, 8, 8), end * 1.0)
        )


@kinds
@pytest.mark.parametrize("num_classes", [0, 4])
def test_every_parameter_of_both_is_trained(kind, num_classes):
    # catches a part that is built but not used, and a critic that lets nothing through
    generator, critic = pair(kind, num_classes=num_classes)
    y = (torch.arange(8) % 4,) if num_classes else ()
    critic(generator(torch.randn(8, 3), *y), *y).square().mean().backward()
    for net in (generator, critic):
        assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@kinds
@pytest.mark.parametrize("groups", [0, 4])
def test_the_samples_of_a_critic_are_independent(kind, groups):
    # catches batch norm, by which the slope of a sample would depend on the others
    options = {"groups": groups} if kind == "images" else {}
    _, critic = pair(kind, **options)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in critic.modules())
    jacobian = torch.autograd.functional.jacobian(critic.train(), torch.rand(4, *SHAPES[kind]))
    norms = jacobian.flatten(3).norm(dim=3).squeeze(1)  # [B, 1, B, *S] -> [B, B]
    assert torch.equal(norms - norms.diag().diag(), torch.zeros(4, 4))
    assert (norms.diag() > 1e-5).all()


@kinds
def test_a_critic_has_no_norms_unless_asked(kind):
    # catches norms that are on by default: they flatten the slope of a critic
    norms = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
    assert not any(isinstance(m, norms) for m in PAIRS[kind][1](SHAPES[kind]).modules())
    asked = ImageCritic((1, 8, 8), groups=4).modules()
    assert [m.num_groups for m in asked if isinstance(m, nn.GroupNorm)] == [4, 4]


# --- labels ---------------------------------------------------------------------------------------


@kinds
def test_a_label_adds_its_direction_to_the_score(kind):
    # catches labels that are shuffled against the samples, and a sum over the batch
    _, critic = pair(kind, num_classes=4)
    x, y = torch.rand(5, *SHAPES[kind]), torch.tensor([3, 0, 0, 1, 2])
    with torch.no_grad():
        features = critic.net.embed(x)
        weight, bias = critic.net.head.weight[0], critic.net.head.bias[0]
        table = critic.labels.table.weight
        by_hand = [(weight + table[y[i]]) @ features[i] + bias for i in range(5)]
        torch.testing.assert_close(critic(x, y)[:, 0], torch.stack(by_hand))
        assert ((critic(x, y) - critic(x, (y + 1) % 4)).abs() > 1e-5).all()


@kinds
def test_a_label_changes_the_sample(kind):
    # catches labels that the generator does not hear, or that reach another sample
    generator, _ = pair(kind, num_classes=4)
    z, y = torch.randn(3, 3), torch.tensor([0, 1, 2])
    plain, other = generator(z, y), generator(z, torch.tensor([0, 1, 3]))
    change = (plain - other).flatten(1).norm(dim=1)
    assert (change[:2] == 0).all()
    assert change[2] > 1e-3


@kinds
@pytest.mark.parametrize("part", [0, 1])
def test_labels_are_neither_forgotten_nor_ignored(kind, part):
    # catches a conditional net that runs without labels, and labels that go unheard
    first = torch.zeros((2, 3) if part == 0 else (2, *SHAPES[kind]))
    name, call = PAIRS[kind][part].__name__, (r"generator\(z", r"critic\(x")[part]
    words = rf"`{name}\(num_classes=0\)` must be called without labels, as `{call}\)`"
    with pytest.raises(ValueError, match=words):
        pair(kind)[part](first, torch.tensor([0, 1]))
    words = rf"`{name}\(num_classes=4\)` must be called with labels, as `{call}, y\)`"
    with pytest.raises(ValueError, match=words):
        pair(kind, num_classes=4)[part](first)


# --- penalties ------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("num_classes", [0, 4])
def test_slopes_have_the_right_derivatives(kind, num_classes):
    # catches an operation without, or with a wrong, double backward
    _, critic = pair(kind, num_classes=num_classes, activation="softplus")
    critic.double()
    x = torch.rand(4, *SHAPES[kind], dtype=torch.float64, requires_grad=True)
    y = (torch.arange(4),) if num_classes else ()
    parameters = {k: p.detach().requires_grad_() for k, p in critic.named_parameters()}
    names = [k for k in parameters if k.endswith(("head.weight", "table.weight"))]
    assert len(names) == (2 if num_classes else 1)

    def score(x, *chosen):
        given = {**parameters, **dict(zip(names, chosen, strict=True))}
        return torch.func.functional_call(critic, given, (x, *y))

    inputs = (x, *(parameters[k] for k in names))
    assert torch.autograd.gradgradcheck(score, inputs, atol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", [*PAIRS, "points-softplus", "images-norms", "labels"])
def test_every_critic_penalty_trains_every_weight(preset, kind):
    # catches a slope that is cut off from a layer, and a penalty that is not finite
    options = {
        "points-softplus": {"activation": "softplus"},
        "images-norms": {"groups": 4},
        "labels": {"num_classes": 4},
    }
    _, critic = pair(kind.split("-")[0] if kind != "labels" else "images", **options.get(kind, {}))
    shape = SHAPES["points" if kind.startswith("points") else "images"]
    real, fake, y = torch.rand(8, *shape), torch.rand(8, *shape), torch.arange(8) % 4
    penalty = getattr(gpkit, preset)(weight=1.0)
    if preset == "wgan_lp":  # acts on slopes above the centre alone
        with torch.no_grad():
            critic.net.head.weight.normal_(std=100)

    def function(x):  # r1_r2 asks at real and fake together, which have the same labels
        return critic(x, y.repeat(len(x) // len(y))) if kind == "labels" else critic(x)

    value = penalty(function, real=real, fake=fake)
    value.backward()
    assert value.isfinite()
    for name, p in critic.named_parameters():
        if name.endswith("weight"):
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name


@kinds
def test_path_length_trains_the_generator(kind):
    # catches a generator whose Jacobian has no derivative
    generator, _ = pair(kind)
    penalty = gpkit.path_length(weight=1.0, every=1)
    penalty(generator, torch.randn(8, 3)).backward()
    weights = [p for name, p in generator.named_parameters() if name.endswith("0.weight")]
    assert weights
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in weights)


def test_a_smooth_critic_is_curved_and_a_relu_critic_is_not():
    # catches an activation that the option does not reach
    def hessian(activation):
        critic = PointCritic((2,), activation=activation)
        return torch.autograd.functional.hessian(lambda x: critic(x).sum(), torch.randn(4, 2))

    assert hessian("relu").abs().max() == 0
    assert hessian("softplus").abs().max() > 1e-4


# --- they learn -----------------------------------------------------------------------------------


def digits(count):
    data = Digits()
    data.setup("fit")
    x, y = data.train_set.tensors
    return x[:count], y[:count]


def test_an_image_generator_can_draw_digits():
    # catches an initialisation or an output that cannot make them
    x, _ = digits(16)
    generator, z = ImageGenerator(16, (1, 8, 8)), torch.randn(16, 16)
    optimizer = torch.optim.Adam(generator.parameters(), lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(generator(z), x).backward()
        optimizer.step()
    assert F.mse_loss(generator(z), x) < 0.05 * x.var()


def test_an_image_critic_tells_digits_with_wrong_labels():
    # catches a critic whose score cannot depend on image and label together
    x, y = digits(256)
    critic, wrong = ImageCritic((1, 8, 8), num_classes=10), (y + 3) % 10
    optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        (F.softplus(-critic(x, y)) + F.softplus(critic(x, wrong))).mean().backward()
        optimizer.step()
    assert (critic(x, y) > critic(x, wrong)).float().mean() > 0.95


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PointGenerator(0, (2,)), r"`PointGenerator\(latent_dim=.* >= 1; got 0"),
        (lambda: PointGenerator(2, (2,), num_classes=-1), r"`PointGenerator\(num_classes=.* >= 0"),
        (lambda: PointGenerator(2, (2,), activation="rel"), r"did you mean 'relu'"),
        (lambda: PointCritic((2,), num_classes="x"), r"`PointCritic\(num_classes=.*got 'x'"),
        (lambda: PointCritic((2,), width=0), r"\(width=\.\.\.\)` must be an integer >= 1; got 0"),
        (
            lambda: ImageGenerator(2, (2,)),
            r"`ImageGenerator\(output_shape=\(2,\)\)` must be an image .* `PointGenerator`",
        ),
        (
            lambda: ImageCritic((2,)),
            r"`ImageCritic\(input_shape=\(2,\)\)` must be .* `PointCritic`",
        ),
        (lambda: ImageGenerator(2, (1, 8, 8), width=12), r"width=12, groups=8.*use groups=4"),
        (lambda: ImageGenerator(2, (1, 8, 8), output="sigmod"), r"did you mean 'sigmoid'"),
        (lambda: ImageCritic((1, 8, 8), width=12, groups=8), r"width=12, groups=8.*use groups=4"),
        (
            lambda: PointGenerator(3, (2,))(torch.zeros(5, 4)),
            r"`PointGenerator\(latent_dim=3\)` takes latents \[B, 3\]; got \[5, 4\]",
        ),
    ],
)
def test_wrong_options_are_refused(build, words):
    # catches a value that would fail later with torch's words, or not at all
    with pytest.raises(ValueError, match=words) as error:
        build()
    assert "\n" not in str(error.value)
