"""What a TensorBoard file holds of a penalised run."""

import by_hand
import pytest
import torch
import torch.nn.functional as F
from fits import LAMBDA, batches, fit, penalty
from modules import SGD, Plain
from nets import net
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gpkit


def events(folder):
    """Return {name: {step: value}} of the scalars of a run."""
    read = EventAccumulator(str(folder))
    read.Reload()
    return {n: {e.step: e.value for e in read.Scalars(n)} for n in read.Tags()["scalars"]}


def logged(folder, cb, micro, **options):
    logger = TensorBoardLogger(folder, name="", version="")
    fit(Plain(net()), cb, micro, logger=logger, **options)
    return events(folder)


def test_the_values_are_those_by_hand(tmp_path):
    """The total and the parts of each step; the module's own loss without any of them."""
    true, rows = net(), []
    optimizer = SGD(true.parameters())
    for step, (x, y) in enumerate(batches()):
        x = x.clone().requires_grad_()
        loss = F.cross_entropy(true(x), y)
        grads = torch.autograd.grad(loss, list(true.parameters()), create_graph=True)
        (g,) = torch.autograd.grad(len(x) * loss, x, create_graph=True)
        norms = g.norm(dim=1)
        weight = 0.0 if step % 2 else 2 * LAMBDA
        parts = weight * by_hand.squares(grads), 0.2 * norms.square().mean()
        total = loss + sum(parts)
        rows.append([loss, total, parts[0], parts[1], by_hand.squares(grads).sqrt(), norms.mean()])
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    parts = {"lazy": penalty(every=2), "input": penalty("input", weight=0.2)}
    found = logged(tmp_path, gpkit.GradientPenaltyCallback(parts, "net"), batches())
    names = ["loss", "train/loss_total", "penalty/lazy", "penalty/input"]
    names += ["penalty/lazy/norm", "penalty/input/norm"]
    for i, name in enumerate(names):
        want = {t: row[i].item() for t, row in enumerate(rows)}
        if name == "penalty/lazy/norm":  # of the steps on which it was taken; and then again
            want |= {t + 1: v for t, v in want.items() if t % 2 == 0}
        assert found[name] == pytest.approx(want, rel=1e-6), name
    assert found["penalty/input/weight"] == pytest.approx(dict.fromkeys(range(6), 0.2))
    lazy = {t: 0.0 if t % 2 else 2 * LAMBDA for t in range(6)}
    assert found["penalty/lazy/weight"] == pytest.approx(lazy)


def test_it_logs_on_the_steps_that_the_trainer_logs(tmp_path):
    cb = gpkit.GradientPenaltyCallback(penalty())
    options = {"log_every_n_steps": 2, "accumulate_grad_batches": 2}
    found = logged(tmp_path, cb, batches(12), **options)
    assert list(found["train/loss_total"]) == [1, 3, 5]
    assert list(found["penalty/weight_grad_norm"]) == [1, 3, 5]


def test_a_step_without_a_penalty_has_a_total_too(tmp_path):
    """Else one that acts on no step that is logged would leave the file empty."""
    cb = gpkit.GradientPenaltyCallback(penalty(every=2))
    found = logged(tmp_path, cb, batches(), log_every_n_steps=2)
    assert list(found["train/loss_total"]) == [1, 3, 5]
    assert found["train/loss_total"] == pytest.approx(found["loss"])
    assert set(found["penalty/weight_grad_norm"].values()) == {0.0}


def test_the_penalty_of_an_accumulated_step_is_logged_whole(tmp_path):
    cb = gpkit.GradientPenaltyCallback(penalty(scope="accumulated"))
    found = logged(tmp_path, cb, batches(2), accumulate_grad_batches=2)
    first = net()
    loss = sum(F.cross_entropy(first(x), y) for x, y in batches(2)) / 2
    n = by_hand.squares(torch.autograd.grad(loss, list(first.parameters()))).sqrt().item()
    assert found["penalty/weight_grad_norm/norm"][0] == pytest.approx(n, rel=1e-6)
    assert found["penalty/weight_grad_norm"][0] == pytest.approx(LAMBDA * n**2, rel=1e-6)
