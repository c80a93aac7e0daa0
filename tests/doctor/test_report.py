"""The report, and the command that prints it."""

import json

import pytest
import torch
from torch import nn

import gpkit
from gpkit.doctor.__main__ import main
from gpkit.doctor.report import Report, plain_table, rich_table
from gpkit.finding import Finding

FOUND = (
    Finding("integer-input", "error", "these are integers", "use floats", "", "r1"),
    Finding("tied", "note", "a and b are one parameter", "", "b", "w"),
)


def test_a_report_is_read_in_the_terminal_and_by_programs():
    report = Report(FOUND, {"r1": {"weight": 1.0, "kept": float("nan")}})
    assert not report.ok
    assert report.errors == FOUND[:1]
    assert str(report).splitlines()[0] == "this would not train: 1 error, 1 note"
    for text in (plain_table(report.rows()), rich_table(report, 60)):
        for word in ("integer-input", "r1", "these are integers", "-> use floats", "tied", "b"):
            assert word in text
    read = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert read["findings"][1] == FOUND[1].to_dict()
    assert read["numbers"]["r1"] == {"weight": 1.0, "kept": None}
    assert str(Report(())) == "nothing stops this training: no findings"
    with pytest.raises(ValueError, match="no such finding: error 'mistyped'"):
        Finding("mistyped", "error", "")


def test_nothing_of_the_users_changes():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Tanh(), nn.Linear(4, 1)
    )
    penalty = gpkit.wgan_gp(form=gpkit.two_sided(gpkit.running_average(0.9, 1.0)))
    x, y = torch.randn(6, 3), torch.randn(6, 1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    random, state = torch.get_rng_state(), penalty.state_dict()
    gpkit.diagnose(net, penalty, (x, y), fake=x + 1)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert penalty.state_dict() == state
    assert all(p.grad is None for p in net.parameters())
    assert not x.requires_grad
    assert all(m.training for m in net.modules())


@pytest.mark.app
def test_the_command(capsys):
    small = ["model=mlp", "data.batch_size=8", "--json", "--no-costs"]
    with pytest.raises(SystemExit) as end:
        main([*small, "penalty=curvature", "model.activation=relu"])
    said = json.loads(capsys.readouterr().out)
    assert (end.value.code, said["ok"]) == (1, False)
    assert said["findings"][0]["module"] == "features.1"
    with pytest.raises(SystemExit) as end:
        main([*small[:2], "--no-costs", "penalty=input_grad_norm"])  # its mean loss is the module's
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert "nothing stops this training" in printed
    assert "reached" in printed
    with pytest.raises(SystemExit) as end:
        main(["module=gan", "model=gan_points", "data=swiss_roll", "penalty=wgan_gp", *small[1:]])
    said = json.loads(capsys.readouterr().out)
    assert (end.value.code, said["ok"]) == (0, True)
    assert said["numbers"]["wgan_gp"]["trains"]
    with pytest.raises(SystemExit) as end:
        main(["penalty=none"])
    assert "there is no penalty" in capsys.readouterr().err
    assert end.value.code == 1
    with pytest.raises(SystemExit) as end:
        main(["model._target_=no_such_package.Net", "penalty=r1"])
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no_such_package.Net: cannot be imported" in line
    with pytest.raises(SystemExit) as end:
        main(["penalty=r11", "--json"])
    said = capsys.readouterr()
    assert said.out == ""
    assert "there is no penalty 'r11' (did you mean 'r1'?)" in said.err
    assert end.value.code == 1
