"""The Dirac-GAN: its experiment against the recurrence that gradient descent is there."""

import math

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

import gpkit
from gpkit.app.overrides import CONFIG_DIR
from gpkit.lightning.gan.figures.dirac import DiracPath
from gpkit.models import DiracCritic, DiracGenerator

QUIET = ["device=cpu", "trainer.enable_progress_bar=false"]
WGAN_GP = ["penalty=wgan_gp", "penalty.weight=0.35", "module.loss=wasserstein"]
STEPS = 500  # of the experiment; the variants make the first of them
VARIANTS = {  # command, steps, the penalty's derivative in ψ; the published distance after all
    "none": (["penalty=none"], 60, lambda psi: 0.0, 3.10),
    "wgan_gp": (WGAN_GP, 60, lambda psi: 0.7 * (psi - math.copysign(1, psi)), 1.80),
    "r1": ([], 180, lambda psi: 0.3 * psi, 2.6e-6),
    "critical r1": (["penalty.weight=1.0"], 60, lambda psi: psi, 9.5e-22),
}


def recurrence(derivative, *, wasserstein):
    """Return (θ, ψ) of the steps of simultaneous gradient descent, from (1, 1), step 0.2.

    The critic ψ lowers, for the minimax loss, log(1 + e^(-ψθ)) + log 2 and its penalty, and the
    generator θ raises the former, whose derivatives are -θ s and -ψ s with s = 1 / (1 + e^(ψθ)).
    For the Wasserstein loss, -ψθ, s is 1.
    """
    theta = psi = 1.0
    path = []
    for _ in range(STEPS):
        s = 1.0 if wasserstein else 1 / (1 + math.exp(psi * theta))
        theta, psi = theta - 0.2 * psi * s, psi + 0.2 * (theta * s - derivative(psi))
        path.append((theta, psi))
    return path


@pytest.mark.app
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_experiment_is_the_recurrence(variant, tmp_path):
    # catches another loss, penalty or step, steps one after another, float32, and a lost sign
    overrides, steps, derivative, published = VARIANTS[variant]
    shorter = [f"++trainer.limit_train_batches={steps}"] if steps < STEPS else []
    metrics = gpkit.train(["experiment=dirac_gan", *overrides, *shorter, *QUIET], tmp_path)
    path = recurrence(derivative, wasserstein=variant == "wgan_gp")
    assert math.hypot(*path[-1]) == pytest.approx(published, rel=0.02)
    path = path[:steps]
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    found = state["generator.theta"], state["critic.psi"]
    assert [t.dtype for t in found] == [torch.float64] * 2
    assert [t.item() for t in found] == pytest.approx(path[-1], rel=1e-9, abs=1e-25)
    assert metrics["dirac/distance"] == pytest.approx(math.hypot(*path[-1]), rel=1e-6)

    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    logged = [[s.value for s in events.Scalars(f"dirac/{name}")] for name in ("theta", "psi")]
    assert len(logged[0]) == steps
    at = [s.step for s in events.Scalars("dirac/distance")]
    assert at == [*range(steps), steps - 1]  # and once more with the hyperparameters, at the end
    for name, values, true in zip(("θ", "ψ"), logged, zip(*path, strict=True), strict=True):
        assert values == pytest.approx(true, rel=1e-5, abs=1e-7), name
    if variant == "r1":
        path = list(zip(*logged, strict=True))
        # the area between two places shrinks by the determinant of [[1, -h/2], [h/2, 1 - hγ]],
        # 1 - hγ + h²/4 = 0.95 = |λ|²
        early, late = (path[t][0] * path[t + 1][1] - path[t + 1][0] * path[t][1] for t in (99, 159))
        contraction = (late / early) ** (1 / 120)
        assert contraction == pytest.approx(math.sqrt(0.95), rel=1e-4)


def test_the_nets_are_a_point_and_a_slope():
    # catches a sign, a shape [B], and a point that depends on the latents
    G, C = DiracGenerator(theta=3.0), DiracCritic(psi=2.0)
    z = torch.randn(5, 7)
    assert torch.equal(G(z), torch.full((5, 1), 3.0))
    assert torch.equal(C(torch.tensor([[0.0], [3.0]])), torch.tensor([[0.0], [-6.0]]))
    C(G(z)).sum().backward()
    assert G.theta.grad.tolist() == [-10.0]
    assert C.psi.grad.tolist() == [-15.0]


@pytest.mark.parametrize(("part", "cls"), [("generator", DiracGenerator), ("critic", DiracCritic)])
def test_the_defaults_of_the_config_are_those_of_the_nets(part, cls):
    given = OmegaConf.load(CONFIG_DIR / "model/dirac.yaml")[part]
    assert given == {"_target_": f"gpkit.models.{cls.__name__}", **cls.__init__.__kwdefaults__}


@pytest.mark.parametrize(
    ("nets", "words"),
    [
        ((nn.Linear(1, 1), DiracCritic()), "needs the generator DiracGenerator; got Linear"),
        ((DiracGenerator(), nn.Linear(1, 1)), "needs the critic DiracCritic; got Linear"),
    ],
)
def test_the_path_of_other_nets_is_refused(nets, words):
    made = gpkit.GANModule(*nets, latent_dim=1)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
    runner = pl.Trainer(callbacks=[DiracPath()], accelerator="cpu", max_epochs=1, **quiet)
    with pytest.raises(TypeError, match=words):
        runner.fit(made, DataLoader(torch.zeros(2, 1)))
