"""The callbacks that evaluate a net: their numbers are in the metrics, and right."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import gpkit
from gpkit.data import Digits
from gpkit.lightning.evaluation import Calibration, Robustness, Sharpness, Smoothness

pytestmark = pytest.mark.app

SMALL = ["device=cpu", "trainer.enable_progress_bar=false", "penalty=none", "model.width=8"]
SMALL += ["data.train_size=200", "data.test_size=150", "data.label_noise=0.5"]
SMALL += ["trainer.max_epochs=3", "optimizer.lr=0.03"]
ALL = "callbacks=[robustness,smoothness,calibration,sharpness]"
FEW = ["callbacks.robustness.noise=[0.3,0.0]", "callbacks.robustness.pgd=[0.05]"]
FEW += ["callbacks.sharpness.samples=64", "callbacks.sharpness.probes=20"]
NAMES = {"acc/noise_0.3", "acc/noise_0", "acc/fgsm_0.1", "acc/pgd_0.05", "jacobian", "lipschitz"}
NAMES |= {"lipschitz/max", "calibration_error", "hessian/top", "hessian/trace", "gap/loss"}
NAMES |= {"gap/acc", "memorised"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the metrics of a run, the net that was tested, and its data."""
    folder = tmp_path_factory.mktemp("run")
    metrics = gpkit.train([*SMALL, ALL, *FEW], folder)
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    data = Digits(train_size=200, test_size=150, label_noise=0.5)
    data.setup()
    net = gpkit.load(folder / "checkpoints/best.ckpt").double()
    train, test = data.train_set.tensors, data.test_set.tensors
    return metrics, net, (train[0].double(), train[1]), (test[0].double(), test[1]), data.relabelled


def test_all_of_them_are_in_the_metrics(run):
    assert {f"test/{name}" for name in NAMES} <= run[0].keys()
    assert all(math.isfinite(value) for value in run[0].values())


def test_the_accuracies(run):
    metrics, net, _, (x, y), _ = run
    assert metrics["test/acc/noise_0"] == pytest.approx(metrics["test/acc"])
    z = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net(z), y), z)
    moved = (x + 0.1 * grad.sign()).clamp(0, 1)
    share = (net(moved).argmax(1) == y).double().mean().item()
    assert metrics["test/acc/fgsm_0.1"] == pytest.approx(share, abs=1.01 / 150)
    assert metrics["test/acc/pgd_0.05"] < metrics["test/acc"]
    assert metrics["test/acc/noise_0.3"] < metrics["test/acc"]


def test_the_jacobian_and_the_lipschitz_estimate(run):
    metrics, net, _, (x, _), _ = run
    j = torch.func.vmap(torch.func.jacrev(lambda one: net(one[None])[0]))(x).reshape(150, 10, 64)
    true = j.square().sum((1, 2)).mean().item()
    assert metrics["test/jacobian"] == pytest.approx(true, rel=1e-4)
    slopes = torch.linalg.matrix_norm(j.detach(), ord=2).mean().item()
    assert metrics["test/lipschitz"] == pytest.approx(slopes, rel=0.05)  # nearly linear within 0.1
    assert metrics["test/lipschitz/max"] >= metrics["test/lipschitz"]


def test_the_calibration_error(run):
    metrics, net, _, (x, y), _ = run
    p = net(x).detach().softmax(1).numpy()
    confidence, right = p.max(1), p.argmax(1) == y.numpy()
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert metrics["test/calibration_error"] == pytest.approx(error, abs=1e-5)


def test_the_gap_and_what_is_memorised(run):
    metrics, net, (x, y), (x_test, y_test), relabelled = run
    with torch.no_grad():
        out, at_test = net(x), net(x_test)
    gap = F.cross_entropy(at_test, y_test) - F.cross_entropy(out, y)
    assert metrics["test/gap/loss"] == pytest.approx(gap.item(), abs=1e-5)
    right, right_at_test = (o.argmax(1) == t for o, t in ((out, y), (at_test, y_test)))
    gap = right.double().mean() - right_at_test.double().mean()
    assert metrics["test/gap/acc"] == pytest.approx(gap.item(), abs=1e-6)
    share = right[relabelled].double().mean().item()
    assert metrics["test/memorised"] == pytest.approx(share)
    assert len(relabelled) == 100


def test_the_hessian(run):
    metrics, net, (x, y), _, _ = run
    x, y = x[:64], y[:64]
    parameters = list(net.parameters())
    grads = torch.autograd.grad(F.cross_entropy(net(x), y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [
        torch.cat([h.reshape(-1) for h in torch.autograd.grad(g, parameters, retain_graph=True)])
        for g in flat
    ]
    h = torch.stack(rows)
    top = torch.linalg.eigvalsh(h)[-1].item()
    assert metrics["test/hessian/top"] == pytest.approx(top, rel=1e-3)
    error = math.sqrt(2 * (h - h.diag().diag()).square().sum().item() / 20)
    assert abs(metrics["test/hessian/trace"] - h.trace().item()) < 4 * error


def test_they_change_no_other_number(run, tmp_path):
    plain = gpkit.train(SMALL, tmp_path)
    assert plain.items() <= run[0].items()


def test_a_regression_has_no_accuracy(tmp_path):
    options = ["data=diabetes", "callbacks=[smoothness,sharpness]", "trainer=fast_dev_run"]
    metrics = gpkit.train([*SMALL[:4], *options], tmp_path)
    assert {"test/gap/loss", "test/hessian/top", "test/lipschitz"} <= metrics.keys()
    assert not {"test/gap/acc", "test/memorised"} & metrics.keys()


def test_a_pair_has_no_net_to_evaluate(tmp_path):
    options = ["module=gan", "model=gan_points", "data=eight_gaussians", "penalty=wgan_gp"]
    with pytest.raises(TypeError, match=r"`Smoothness` evaluates the net of .*; got a GANModule"):
        gpkit.train([*SMALL[:2], *options, "callbacks=[smoothness]"], tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Robustness(noise=[-1]),
            r"`Robustness\(noise=...\)` must be a number >= 0; got -1",
        ),
        (lambda: Robustness(steps=0), r"`Robustness\(steps=...\)` must be an integer >= 1"),
        (lambda: Robustness(low=1.0, high=0.0), "must have low < high"),
        (lambda: Smoothness(radius=0), r"must be a number > 0; got 0"),
        (lambda: Calibration(bins=0), r"`Calibration\(bins=...\)` must be an integer >= 1"),
        (lambda: Sharpness(probes=0), r"`Sharpness\(probes=...\)` must be an integer >= 1"),
    ],
)
def test_options_out_of_range_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
