"""The results, run again: the table of rows, a tiny row from end to end, verdicts, exit codes."""

import json
import math

import pytest
import torch
from hydra import compose, initialize_config_dir

from gpkit.app.overrides import CONFIG_DIR, check_types
from gpkit.app.result import Result
from gpkit.reproduce.__main__ import exit_code, main
from gpkit.reproduce.modified_flow import descent, orders, problem
from gpkit.reproduce.row import Measured, Number, Row
from gpkit.reproduce.rows import ROWS
from gpkit.reproduce.run import read
from gpkit.reproduce.shown import as_json, findings, markdown

pytestmark = pytest.mark.app

TINY = ("trainer=fast_dev_run", "model.width=4", "penalty=none")
SURE, NEVER = Number("test/acc", 50.0, 0.0, 100.0, 100.0), Number("test/loss", -2.0, -3.0, -1.0)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_composes(row):
    # catches an experiment or an option that is renamed
    if row.program != "gpkit":
        return
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("train", [*row.overrides])
        check_types(config, [*row.overrides])
    assert config.trainer.max_epochs >= 1


def test_every_experiment_is_a_result():
    # catches an experiment without a row, and a row of an experiment that is renamed
    there = {path.stem for path in CONFIG_DIR.glob("experiment/*.yaml")}
    used = {word for row in ROWS for word in row.overrides if word.startswith("experiment=")}
    assert {f"experiment={name}" for name in there - {"r1_digits"}} == used  # digits: a picture


def test_rows_are_told_apart():
    assert len({row.name for row in ROWS}) == len(ROWS)
    assert len({row.overrides for row in ROWS}) == len(ROWS)
    named = [n for row in ROWS for n in row.numbers if n.expected is not None]
    assert all(n.low <= n.expected <= n.high for n in named)
    assert len({row.name.partition("/")[0] for row in ROWS}) >= 9


def test_a_row_runs_and_is_compared(tmp_path, capfd):
    # catches a value of another seed, a scale that is applied twice, and an exit code of 0
    row = Row("tiny/one", TINY, (SURE, NEVER), "no one", seeds=2)
    code = main(["--out", str(tmp_path), "--jobs", "1"], rows=[row])
    out = capfd.readouterr().out
    assert code == 1
    assert "tiny/one: agrees, differs; 0 to go" in out
    assert str(tmp_path / "results.md") in out
    found = json.loads((tmp_path / "results.json").read_text())["tiny/one"]
    files = sorted((tmp_path / "runs/tiny/one").glob("*/metrics.json"))
    metrics = [json.loads(path.read_text()) for path in files]
    assert len(metrics) == 2
    acc, loss = (found["numbers"][name] for name in ("test/acc", "test/loss"))
    assert acc["values"] == pytest.approx([100 * m["test/acc"] for m in metrics])
    assert loss["values"] == pytest.approx([m["test/loss"] for m in metrics])
    assert (acc["verdict"], loss["verdict"]) == ("agrees", "differs")
    before = [path.stat().st_mtime_ns for path in files]
    again = read(row, tmp_path / "runs/tiny/one", 1)
    assert again.values["test/loss"] == loss["values"][:1]  # fewer seeds than there are
    assert [path.stat().st_mtime_ns for path in files] == before
    text = (tmp_path / "results.md").read_text()
    assert f"`python train.py {' '.join(TINY)}`" in text
    assert "| tiny/one | test/loss | -2 |" in text


def put(place, seed, **metrics):
    Result({"seed": seed}, [f"seed={seed}"], status="finished", metrics=metrics, seconds=2.0).write(
        place / f"{seed}-seed={seed}"
    )


def test_verdicts_and_exit_codes(tmp_path):
    known = Number("b", 1.0, 0.9, 1.1, finding="for a reason")
    row = Row("r", (), (Number("a", 2.0, 1.9, 2.1), known, Number("c")), "x", seeds=2)
    for seed, a in enumerate((1.8, 2.3)):
        put(tmp_path, seed, a=a, b=5.0, c=float(seed))
    measured = read(row, tmp_path, 2)
    assert [measured.verdict(n) for n in row.numbers] == ["agrees", "explained", "–"]
    assert exit_code([measured]) == 0
    assert findings([measured]) == ["r: for a reason"]
    assert "2.05 ± 0.3536" in markdown([measured])
    alone = read(row, tmp_path, 1)
    assert alone.verdict(row.numbers[0]) == "differs"  # 1.8
    assert exit_code([measured, alone]) == 1
    absent = read(row, tmp_path, 3)
    assert absent.problems == [f"{tmp_path}: 2 of 3 runs"]
    assert {absent.verdict(n) for n in row.numbers} == {"missing"}
    assert exit_code([alone, absent]) == 2


def test_a_run_that_fails_and_a_metric_that_is_not_there_are_named(tmp_path):
    row = Row("r", (), (Number("a", 2.0, 1.9, 2.1),), "x", seeds=2)
    put(tmp_path, 0, a=2.0)
    Result({"seed": 1}, ["seed=1"], status="failed", error="no power").write(tmp_path / "1-seed=1")
    assert "no power" in read(row, tmp_path, 2).problems[0]
    put(tmp_path, 1, b=2.0)
    (problem_,) = read(row, tmp_path, 2).problems
    assert problem_.endswith("no a of seeds [1]")
    assert read(row, tmp_path / "nowhere", 2).problems
    assert as_json([Measured(row)])["r"]["numbers"]["a"]["verdict"] == "missing"


def test_wrong_words_are_refused(capsys):
    assert main(["--only", "label_nose"]) == 2
    assert "did you mean 'label_noise'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["--seeds", "0"])
    assert end.value.code == 2


def test_the_modified_flow():
    # the oracle of the field: the Hessian by torch.func, -(g + h/2 H g)
    net, loss = problem(0)
    params = dict(net.named_parameters())
    theta = torch.nn.utils.parameters_to_vector(net.parameters()).detach()

    rng = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=rng, dtype=torch.float64)
    y = (x @ torch.randn(4, 1, generator=rng, dtype=torch.float64)).sin()

    def of(vector):
        parts = torch.split(vector, [p.numel() for p in params.values()])
        named = {k: v.view_as(p) for (k, p), v in zip(params.items(), parts, strict=True)}
        return (torch.func.functional_call(net, named, (x,)) - y).square().mean()

    g, hessian = torch.func.grad(of)(theta), torch.func.jacrev(torch.func.grad(of))(theta)
    found = descent(net, loss, 0.3 / 4)(theta)
    torch.testing.assert_close(found, -(g + 0.3 / 2 * hessian @ g))
    measured = orders(0)
    assert measured["order/plain"] == pytest.approx(1.0, abs=0.08)
    assert measured["order/modified"] == pytest.approx(2.0, abs=0.1)
    assert all(math.isfinite(v) for v in measured.values())
