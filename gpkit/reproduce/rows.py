"""All results, with the numbers to expect."""

from __future__ import annotations

from gpkit import checks
from gpkit.reproduce.row import Number, Row

LOOP = "a loop written by hand"
MESCHEDER = "Mescheder et al. (2018), figure 1"
GULRAJANI = "Gulrajani et al. (2017), figure 1"
BARRETT = "Barrett & Dherin (2021)"
OTHER_LABELS = (
    "the baseline depends on which labels are drawn: two loops by hand, with other random labels, "
    "have 69.4 ± 3.9 and 67.8 ± 3.2 over their seeds, and gpkit's data 64.8 ± 4.5; the gain is as "
    "large, or larger"
)


def near(
    metric: str, expected: float, tolerance: float, scale: float = 1.0, finding: str = ""
) -> Number:
    """Return a number that is expected within a tolerance.

    >>> near("test/acc", 70.0, 3.0, 100.0)
    Number(metric='test/acc', expected=70.0, low=67.0, high=73.0, scale=100.0, finding='')
    """
    return Number(metric, expected, expected - tolerance, expected + tolerance, scale, finding)


def within(
    metric: str, expected: float, factor: float, scale: float = 1.0, finding: str = ""
) -> Number:
    """Return a number that is expected within a factor.

    >>> within("slope", 8.0, 2.0)
    Number(metric='slope', expected=8.0, low=4.0, high=16.0, scale=1.0, finding='')
    """
    return Number(metric, expected, expected / factor, expected * factor, scale, finding)


def label_noise(
    variant: str, expected: float, *overrides: str, tolerance: float = 3.0, finding: str = ""
) -> Row:
    """Return a row of the label noise: the accuracy on clean test labels, in %."""
    words = ("experiment=label_noise", *overrides)
    number = near("test/acc", expected, tolerance, 100.0, finding)
    return Row(f"label_noise/{variant}", words, (number,), LOOP, seconds=12)


def robustness(
    variant: str,
    expected: tuple[float, float, float, float, float],
    *overrides: str,
    seconds: float = 17,
) -> Row:
    """Return a row of the robustness: accuracies in %, clean, noise, PGD twice, and mean ‖J‖²."""
    acc, noise, weak, strong, jacobian = expected
    numbers = (
        near("test/acc", acc, 1.0, 100.0),
        near("test/acc/noise_0.3", noise, 2.5, 100.0),
        near("test/acc/pgd_0.1", weak, 5.0, 100.0),
        near("test/acc/pgd_0.2", strong, 6.0, 100.0),
        within("test/jacobian", jacobian, 1.3),
    )
    words = ("experiment=adversarial_digits", *overrides)
    return Row(f"robustness/{variant}", words, numbers, LOOP, seconds=seconds)


def dirac(variant: str, expected: float, factor: float, *overrides: str) -> Row:
    """Return a row of the Dirac-GAN: the distance from the equilibrium after 500 steps."""
    words = ("experiment=dirac_gan", *overrides)
    number = within("dirac/distance", expected, factor)
    return Row(f"dirac_gan/{variant}", words, (number,), MESCHEDER, seeds=1, seconds=6)


def clipping(variant: str, first: Number, *overrides: str) -> Row:
    """Return a row of the clipped critic: its gradient in the first and in the last layer."""
    numbers = first, near("critic_layer/12", 0.125, 0.006)
    return Row(f"critic_clipping/{variant}", overrides, numbers, GULRAJANI, seconds=12)


def wasserstein(
    weight: str, raw: tuple[float, float], slope: tuple[float, float], distance: tuple[float, float]
) -> Row:
    """Return a row of the known distance of 2: raw, the slope, and one over the other."""
    numbers = (
        near("test/wasserstein/raw", *raw),
        near("slope/interpolates", *slope),
        near("test/wasserstein/debiased", *distance),
    )
    words = ("experiment=wasserstein_gaussians", f"penalty.weight={weight}")
    return Row(f"wasserstein/{weight}", words, numbers, LOOP, seeds=2, seconds=40)


def gaussians(variant: str, expected: Number, *overrides: str, seconds: float) -> Row:
    """Return a row of a GAN on points in the plane."""
    return Row(f"gans/{variant}", overrides, (expected,), GULRAJANI, seeds=1, seconds=seconds)


def colored(variant: str, expected: float, tolerance: float, *overrides: str) -> Row:
    """Return a row of the coloured digits: the test accuracy in %."""
    words = ("experiment=colored_digits", *overrides)
    number = near("test/acc", expected, tolerance, 100.0)
    return Row(f"colored_digits/{variant}", words, (number,), LOOP, seconds=45)


def distance(variant: str, expected: Number, weight: str) -> Row:
    """Return a row of the signed distance: the mean error in the box."""
    words = ("experiment=signed_distance", f"penalty.weight={weight}")
    return Row(f"signed_distance/{variant}", words, (expected,), LOOP, seeds=2, seconds=35)


def order(variant: str, expected: float, factor: float, *overrides: str) -> Row:
    """Return a row of the orders: the mean distance from the least-squares polynomial."""
    words = ("experiment=orders", *overrides)
    number = within("test/mae", expected, factor)
    return Row(f"orders/{variant}", words, (number,), LOOP, seeds=2, seconds=36)


DECAY = "optimizer.weight_decay=0.002216"  # the gradient of 1.108e-3 ‖θ‖², which is in their loss
CLIP = "experiment=critic_clipping"
WGAN_GP = ("penalty=wgan_gp", "penalty.weight=0.35", "module.loss=wasserstein")
EIGHT = "experiment=wgan_gp_8gaussians"
FLOW = (near("order/modified", 1.95, 0.1), near("order/plain", 1.0, 0.08))

ROWS: tuple[Row, ...] = (
    label_noise("none", 70.1, "penalty=none", finding=OTHER_LABELS),
    label_noise("0.1", 78.5, "penalty.weight=0.1", finding=OTHER_LABELS),
    label_noise("0.3", 86.1, "penalty.weight=0.3", finding=OTHER_LABELS),
    label_noise("1", 93.8, tolerance=1.5),
    label_noise("2", 95.4, "penalty.weight=2.0", tolerance=1.5),
    label_noise("fisher", 93.2, "penalty=fisher"),
    label_noise("sam", 92.0, "penalty=sam", "penalty.weight=null", "penalty.rho=0.5"),
    robustness("none", (97.6, 78.7, 34.5, 0.4, 2520), "penalty=none"),
    robustness("noise", (97.7, 90.1, 71.0, 8.8, 335), "penalty=none", "model.noise=0.3"),
    robustness("jacobian_0.01", (97.0, 89.6, 72.9, 16.4, 47), "penalty.weight=0.01"),
    robustness("jacobian_0.03", (96.1, 88.5, 75.5, 23.9, 24)),
    robustness("exact_0.03", (96.2, 89.1, 75.9, 23.3, 24), "penalty.estimator=exact", seconds=40),
    robustness(
        "input_grad_norm",
        (97.1, 86.4, 66.2, 4.6, 452),
        "penalty=input_grad_norm",
        "penalty.weight=1.0",
    ),
    dirac("none", 3.10, 1.005, "penalty=none"),
    dirac("wgan_gp", 1.80, 1.005, *WGAN_GP),
    dirac("r1_0.3", 2.6e-6, 1.05),
    dirac("r1_1", 9.5e-22, 1.05, "penalty.weight=1.0"),
    clipping("0.1", within("critic_layer/1", 8.1, 6), CLIP, "module.clip=0.1"),
    clipping("0.01", within("critic_layer/1", 6.8e-14, 4), CLIP),
    clipping("0.001", Number("critic_layer/1", 0.0, 0.0, 1e-20), CLIP, "module.clip=0.001"),
    clipping("none", Number("critic_layer/1"), CLIP, "module.clip=null"),
    clipping("wgan_gp", within("critic_layer/1", 0.18, 4), "experiment=critic_penalty"),
    wasserstein("10.0", (2.206, 0.03), (1.100, 0.03), (2.006, 0.02)),
    wasserstein("0.1", (22.2, 0.7), (10.9, 0.4), (2.0, 0.03)),
    gaussians(
        "25_wgan_gp", near("modes/covered", 25, 0.5), "experiment=wgan_gp_25gaussians", seconds=250
    ),
    gaussians("25_plain", near("modes/covered", 17, 6), "experiment=gan_25gaussians", seconds=250),
    gaussians("8_wgan_gp", near("modes/covered", 8, 0.5), EIGHT, seconds=85),
    gaussians(
        "8_plain",
        Number("modes/covered"),
        EIGHT,
        "penalty=none",
        "module.loss=non_saturating",
        seconds=85,
    ),
    gaussians(
        "swiss_roll",
        Number("wasserstein/debiased", 0.0, -0.1, 0.1),
        "experiment=wgan_gp_swiss_roll",
        seconds=85,
    ),
    colored("erm", 12.7, 4, "penalty=none", DECAY),
    colored("irm", 67.9, 6),
    colored("irm_halves", 66.3, 8, "penalty.halves=true"),
    colored("fishr", 71.2, 4, "penalty=fishr"),
    colored("grey", 74.2, 3, "penalty=none", DECAY, "data.grey=true"),
    distance("none", Number("test/mae", 0.135, 0.09, 0.21), "0.0"),
    distance("0.1", within("test/mae", 0.003, 2), "0.1"),
    distance("1", within("test/mae", 0.001, 2), "1.0"),
    order("1", 0.0026, 1.5, "penalty.order=1", "data.degree=0"),
    order("2", 0.0001, 4),
    Row("modified_flow", (), FLOW, BARRETT, seconds=5, program="gpkit.reproduce.modified_flow"),
)


def chosen(names: list[str] | None) -> list[Row]:
    """Return the rows of some results, by the whole name or its first part; None is all.

    Raises:
        ValueError: for a name that there is not, with the nearest.

    >>> [row.name for row in chosen(["orders", "gans/8_plain"])]
    ['gans/8_plain', 'orders/1', 'orders/2']
    """
    if names is None:
        return list(ROWS)
    known = dict.fromkeys(n for row in ROWS for n in (row.name.partition("/")[0], row.name))
    for name in names:
        checks.choice("--only", name, known)
    return [row for row in ROWS if {row.name, row.name.partition("/")[0]} & set(names)]
