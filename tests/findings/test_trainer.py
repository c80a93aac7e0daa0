"""What callbacks check before the first step are findings: a code, the penalty, why, the fix."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gpkit
from gpkit.findings.monitor import findings_of_monitor
from gpkit.findings.trainer import findings_before_fit, findings_of_loss
from gpkit.lightning.refusals import RefusalError, refuse


class Module(nn.Module):
    automatic_optimization = True

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return self.backbone(batch).sum()


def trainer(*callbacks, strategy="SingleDeviceStrategy"):
    made = type(strategy, (), {})()
    return SimpleNamespace(callbacks=callbacks, strategy=made, accumulate_grad_batches=1)


def found(callback, module=None, **options):
    return list(findings_before_fit(trainer(callback, **options), module or Module()))


def test_nothing_is_found_where_nothing_is_wrong():
    parts = [gpkit.weight_grad_norm(), gpkit.input_grad_norm()]
    assert found(gpkit.GradientPenaltyCallback(parts, module="backbone")) == []
    monitor = gpkit.GradientNormMonitor(inputs="backbone")
    assert list(findings_of_monitor(trainer(), Module(), monitor, own=True)) == []
    assert list(findings_of_loss(nn.Linear(1, 1)(torch.ones(1)).sum())) == []


def test_each_finding_has_a_code_the_penalty_and_a_fix():
    parts = {
        "fakes": gpkit.wgan_gp(),
        "named": gpkit.weight_grad_norm(match="bakbone.*"),
        "environments": gpkit.irm(),
    }
    made = gpkit.GradientPenaltyCallback(parts, module="bakbone", manual_backward=0)
    said = found(made, strategy="DeepSpeedStrategy")
    assert [(f.code, f.penalty, f.severity) for f in said] == [
        ("call", "", "error"),  # manual_backward=
        ("call", "", "error"),  # the submodule
        ("trainer", "fakes", "error"),
        ("call", "fakes", "error"),
        ("trainer", "named", "error"),
        ("call", "environments", "error"),
    ]
    assert "did you mean 'backbone'?" in str(said[1])
    assert said[2].fix == "use strategy='ddp'"
    module = Module().requires_grad_(False)
    frozen = gpkit.GradientPenaltyCallback(gpkit.weight_grad_norm(match="weight"), "backbone")
    assert [f.code for f in found(frozen, module)] == ["frozen"]
    assert [f.code for f in findings_of_loss(torch.ones(()))] == ["untrained"]
    monitor = gpkit.GradientNormMonitor(inputs="bakbone")
    of_monitor = findings_of_monitor(
        trainer(strategy="ModelParallelStrategy"), Module(), monitor, own=True
    )
    assert [f.code for f in of_monitor] == ["trainer", "call"]


def test_the_error_has_all_findings():
    said = found(gpkit.GradientPenaltyCallback({"mine": gpkit.wgan_gp()}))
    with pytest.raises(RefusalError, match="cannot: penalty 'mine': at=interpolate") as error:
        refuse("cannot", [*said, "and a line", *map(str, said), *said])
    assert error.value.findings == tuple(said)
    assert len(error.value.found) == 3
