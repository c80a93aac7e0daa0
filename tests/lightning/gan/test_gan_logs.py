"""What a GANModule logs, in training and in evaluation."""

import copy
from functools import partial

import pytest
import torch
from gans import R1, R2, B, Witness, assert_same, critic, data, generator, module, norms, trainer
from loggers import Record
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

import gpkit


def test_logging_changes_no_training():
    for options in ({}, {"accumulate": 2}, {"penalty_steps": True}):
        G, C = generator(), critic()
        penalty = {"gp": gpkit.wgan_gp(5.0, seed=1), "r1": R1(every=2)}
        made = [
            module(copy.deepcopy(G), copy.deepcopy(C), penalty=copy.deepcopy(penalty), **options)
            for _ in range(2)
        ]
        for one, every in zip(made, (1, 7), strict=True):
            torch.manual_seed(5)
            trainer(log_every_n_steps=every, logger=Record()).fit(one, DataLoader(data(), B))
        assert_same(made[0].critic, made[1].critic)
        assert_same(made[0].generator, made[1].generator)


SHARES = ("", "/max", "/above_center")


@pytest.mark.parametrize(
    ("penalty", "center"),
    [(gpkit.wgan_gp(5.0, center=0.3), 0.3), (gpkit.wgan_lp(5.0, 0.05, every=2), 0.05), (R2(), 1.0)],
    ids=["gp", "lazy", "r2"],
)
def test_logged_values_of_training(penalty, center):
    C, record = critic(), Record()
    G = Witness(nn.Linear(3, 2)).requires_grad_(False)
    penalty, name = copy.deepcopy(penalty), penalty.name
    made = module(G, C, penalty=penalty, critic_optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer(log_every_n_steps=1, logger=record).fit(made, DataLoader(data(), B))
    seen = iter(C.seen)
    assert len(record.rows) == 14
    optimality = size = None
    for t, row in enumerate(record.rows):
        real, fake = next(seen), next(seen)
        acts = t % penalty.every == 0
        point = fake if name == "r2" else next(seen) if acts else None
        torch.testing.assert_close(next(seen), real)
        torch.testing.assert_close(next(seen), fake)
        between = next(seen)
        raw = (C.layers(real).mean() - C.layers(fake).mean()).detach()
        true = {"train/critic_loss": -raw, "wasserstein/raw": raw}
        steep = {"real": norms(C, real), "fake": norms(C, fake), "interpolates": norms(C, between)}
        for where, n in steep.items():
            values = n.mean(), n.max(), (n > center).double().mean()
            true |= {f"slope/{where}{end}": v for end, v in zip(SHARES, values, strict=True)}
        true["wasserstein/debiased"] = raw / steep["interpolates"].mean()
        value, weight = 0.0, 0.0
        if acts:
            n = norms(C, point)
            if name == "r2":
                weight, value, side = 1.0, n.square().mean() / 2, n.square().mean()
            elif name == "wgan_gp":
                weight, value = 5.0, (n - 0.3).square().mean()
                side = 2 * 5.0 * (n * (n - 0.3)).mean()
            else:
                weight, value = 10.0, (n - 0.05).clamp(min=0).square().mean()
                side = 2 * 5.0 * (n * (n - 0.05).clamp(min=0)).mean()
            optimality, size = raw - side, n.mean()
        true |= {"critic_optimality": optimality, f"penalty/{name}": weight * value}
        true |= {f"penalty/{name}/weight": weight, f"penalty/{name}/norm": size}  # the latest
        assert row == pytest.approx({k: float(v) for k, v in true.items()}, rel=1e-5, abs=1e-7)


def test_tensorboard_has_the_histograms(tmp_path):
    made = module(generator(), critic(), penalty=R1(every=2), histogram_every_n_epochs=2)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer(logger=logger, log_every_n_steps=7, max_epochs=3).fit(made, DataLoader(data(), B))
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    names = {f"slope/{where}/histogram" for where in ("real", "fake", "interpolates")}
    assert set(events.Tags()["histograms"]) == names | {"penalty/r1/norm/histogram"}
    found = [e.histogram_value.num for e in events.Histograms("penalty/r1/norm/histogram")]
    assert found == [4 * B, 4 * B]  # epochs 0 and 2, every second step of seven
    (first, _) = events.Histograms("slope/real/histogram")
    assert first.histogram_value.num == B
    assert first.histogram_value.min >= 0


def test_names_of_other_losses_and_a_generator_that_trains():
    record = Record()
    made = module(generator(), critic(), loss="hinge", generator_penalty=gpkit.path_length())
    options = {"log_every_n_steps": 1, "logger": record, "max_epochs": 1}
    trainer(**options).fit(made, DataLoader(data(), B))
    names = {name for row in record.rows for name in row}
    slopes = {f"slope/{w}{end}" for w in ("real", "fake", "interpolates") for end in SHARES}
    losses = {"train/critic_loss", "train/generator_loss", "critic_optimality"}
    path = {f"penalty/path_length{end}" for end in ("", "/weight", "/norm")}
    assert names == slopes | losses | path


@pytest.mark.parametrize(("every", "accumulate", "rows"), [(3, 1, 4), (2, 3, 6)])
def test_slopes_are_measured_on_logged_steps_alone(every, accumulate, rows):
    record, C = Record(), critic()
    made = module(generator(), C, accumulate=accumulate)
    trainer(log_every_n_steps=every, logger=record).fit(made, DataLoader(data(), B))
    logged = [row for row in record.rows if "slope/real" in row]
    assert len(record.rows) == len(logged) == rows
    if accumulate == 1:
        assert len(C.seen) == 2 * 14 + made.counts["generator"] + 3 * rows


@pytest.mark.parametrize("how", ["fit", "validate", "test"])
def test_evaluation_equals_the_hand_written_estimate(how):
    C, still = critic(), partial(torch.optim.SGD, lr=0.0)
    made = module(generator(), C, critic_optimizer=still, generator_optimizer=still)
    loader, stage = DataLoader(data(10), B), "test" if how == "test" else "val"
    outputs = []
    C.register_forward_pre_hook(lambda net, x: outputs.append((x[0].detach(), net.training)))
    runner = trainer(max_epochs=1, num_sanity_val_steps=0)
    if how == "fit":
        runner.fit(made, DataLoader(data(), B), loader)
        found = {k: float(v) for k, v in runner.callback_metrics.items() if k.startswith("val")}
    else:
        (found,) = getattr(runner, how)(made, loader, verbose=False)
        (again,) = getattr(runner, how)(made, loader, verbose=False)
        assert again == found
    evaluated = [x for x, training in outputs if not training]
    true = dict.fromkeys(found, 0.0)
    for i, (x, _) in enumerate(loader):
        real, fake, *_rest, between = evaluated[5 * i : 5 * i + 5]
        assert torch.equal(real, x)
        raw = (C.layers(x).mean() - C.layers(fake).mean()).detach()
        values = -raw, -C.layers(fake).detach().mean(), raw, raw / norms(C, between).mean()
        names = "critic_loss", "generator_loss", "wasserstein/raw", "wasserstein/debiased"
        for name, value in zip(names, values, strict=True):
            true[f"{stage}/{name}"] += float(value) * len(x) / 10
    assert found == pytest.approx(true, rel=1e-5)
    assert len(evaluated) >= 15
