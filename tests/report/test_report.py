"""``python -m gpkit.report``: the files that it writes, the plots, and wrong input."""

import base64
import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

import gpkit
from gpkit.report.__main__ import main
from gpkit.report.curves import curves_of, mean_curve
from gpkit.report.groups import tabulate
from gpkit.report.plots import against_norm, against_weight, gain_against_cost, learning_curves
from gpkit.report.read import find
from gpkit.report.tables import Spread, in_words

FILES = {"report.md", "report.html", "runs.csv", "groups.csv"}
PLOTS = {"metric_against_weight.png", "metric_against_norm.png", "gain_against_cost.png"}


@pytest.fixture
def logged(study):
    """Add TensorBoard events to a study: the loss of a seed s falls from 2 + s by 1 a step."""
    for folder in study.iterdir():
        with SummaryWriter(str(folder)) as writer:
            for step in range(3):
                writer.add_scalar("train/loss", 2 + int(folder.name[-1]) - step, step)
    return study


def test_the_files(logged, capsys):
    main([str(logged)])
    folder = logged / "report"
    assert {p.name for p in folder.iterdir()} == FILES | PLOTS | {"learning_curves.png"}
    text = (folder / "report.md").read_text()
    assert "Runs: 12 finished." in text
    assert "The largest test/acc has r1 weight=1: 0.8500 ± 0.0500 (n 3)." in text
    assert "| none | – | 3 | 0.7100 ± 0.0100 | baseline |" in text
    assert "| r1 | 0.1 | 3 | 0.7600 ± 0.0173 | +0.05000 ± 0.02000 | 0.049 | 0.052 |" in text
    assert "corrected for 2 comparisons" in text
    for link in re.findall(r"!\[.*\]\((.*)\)", text):
        with Image.open(folder / link) as image:
            assert image.size[0] > 500
    out = capsys.readouterr().out
    assert "0.7600 ± 0.0173" in out
    assert out.endswith("report  study/report/report.html\n")


def test_the_page_needs_no_other_file(logged):
    main([str(logged)])
    text = (logged / "report/report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 4
    for image in images:
        Image.open(io.BytesIO(base64.b64decode(image))).verify()
    outside = [link for link in re.findall(r'(?:src|href)="([^"]*)"', text) if "data:" not in link]
    assert not outside
    assert text.count("<tr>") == 5
    assert "<td>0.7600 ± 0.0173</td>" in text


def read_csv(path):
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_the_tables_are_numbers(study):
    main([str(study), "--out", "elsewhere"])
    runs = read_csv("elsewhere/runs.csv")
    assert len(runs) == 12
    (one,) = [r for r in runs if (r["penalty.weight"], r["seed"]) == ("0.1", "2")]
    assert float(one["test/acc"]) == 0.78
    assert {r["penalty.weight"] for r in runs if r["penalty"] == "none"} == {""}
    groups = {(g["penalty"], g["penalty.weight"]): g for g in read_csv("elsewhere/groups.csv")}
    r1 = groups["r1", "0.1"]
    assert float(r1["test/acc mean"]) == pytest.approx(0.76)
    assert float(r1["test/acc std"]) == pytest.approx(np.std([0.75, 0.75, 0.78], ddof=1))
    assert (r1["test/acc n"], r1["pairs"]) == ("3", "3")
    assert float(r1["difference"]) == pytest.approx(0.05)
    assert groups["fisher", "1.0"]["p"] == ""


def test_names_are_no_markup(put, place):
    put("none", 0.1, 0, {"test/acc": 0.5}, "a", error=None)
    put("r1", 0.1, 0, folder="b", status="failed", error="<b>x</b> [red]y")
    main([str(place)])
    assert "&lt;b&gt;x&lt;/b&gt;" in (place / "report/report.html").read_text()


def test_one_run(put, capsys):
    main([str(put("r1", 0.1, 0, {"test/acc": 0.5}))])
    out = capsys.readouterr().out
    assert "The largest test/acc has r1 weight=0.1: 0.5000 (n 1)." in out
    assert "There is no baseline among the runs" in out


def test_several_folders(put, place, capsys):
    first = put("none", 0.1, 0, {"test/acc": 0.5}, "one/0").parent
    second = put("r1", 0.1, 0, {"test/acc": 0.7}, "two/0").parent
    main([str(first), str(second)])
    assert "+0.2000" in capsys.readouterr().out
    assert (first / "report/report.html").is_file()


WRONG = {
    "nowhere": (1, "error: nowhere: no such folder"),
    "study --metric test/ac": (1, "did you mean 'test/acc'?"),
    "study --baseline penalty": (1, "--baseline penalty: must be KEY=VALUE"),
    "study --baseline penalty=r3": (1, "no group has this; there are"),
    "study --oot x": (2, "unrecognized arguments: --oot x"),
    "": (2, "the following arguments are required: DIR"),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_input_is_told_in_one_line(words, study, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    code, told = WRONG[words]
    errors = capsys.readouterr().err
    assert stopped.value.code == code
    assert told in errors
    assert errors.count("\n") == 1
    assert not list(Path().rglob("report.html"))


def test_a_sweep_of_failures_is_told(put, place, capsys):
    put(status="failed", error="the power is gone")
    with pytest.raises(SystemExit) as stopped:
        main([str(place)])
    assert stopped.value.code == 1
    assert (
        "study: no run is finished: study/none-0.1-0 failed: the power" in capsys.readouterr().err
    )


def test_it_loads_no_torch(study):
    code = f"import sys; from gpkit.report.__main__ import main; main([{str(study)!r}]); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules, 'hydra' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False False"


def test_runs_of_the_application(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fast = ["device=cpu", "trainer.enable_progress_bar=false", "data.train_size=128"]
    fast += ["model.width=8", "trainer.max_epochs=1", "trainer.log_every_n_steps=1"]
    for penalty in ("none", "jacobian"):
        gpkit.train([*fast, f"penalty={penalty}"], tmp_path / "runs" / penalty)
    main(["runs"])
    assert (tmp_path / "runs/report/learning_curves.png").is_file()
    assert "cost in plain steps" in capsys.readouterr().out


# The plots show the numbers.


def drawn(axes):
    """Return the lines of axes by their labels."""
    found = {}
    for container in axes.containers:
        data = container.lines[0]
        bars = container.lines[2][0].get_segments()
        found[container.get_label()] = data.get_xdata(), data.get_ydata(), bars
    return found


def test_the_metric_against_the_weight(put, study):
    for seed, value in enumerate((0.5, 0.6, 0.7)):
        put("fisher", 0.1, seed, {"test/acc": value})
    (axes,) = against_weight(tabulate(find([study]).runs)).axes
    lines = drawn(axes)
    assert lines.keys() == {"fisher (n 3)", "r1 (n 3)"}
    x, y, bars = lines["r1 (n 3)"]
    assert [*x] == [0.1, 1.0]
    assert [*y] == pytest.approx([0.76, 0.85])
    low, high = np.array(bars[1])[:, 1]
    assert (low, high) == pytest.approx((0.80, 0.90))  # mean ± standard deviation
    (level,) = [line for line in axes.lines if line.get_label() == "none (n 3)"]
    assert [*level.get_ydata()] == pytest.approx([0.71, 0.71])


def test_the_metric_against_norms(study):
    (axes,) = against_norm(tabulate(find([study]).runs)).axes
    points = {c.get_label(): np.asarray(c.get_offsets()) for c in axes.collections}
    assert points.keys() == {"none", "r1", "fisher"}
    assert len(points["r1"]) == 6
    for x, y in points["r1"]:
        assert x == pytest.approx(y**2)


def test_the_gain_against_the_cost(study):
    (axes,) = gain_against_cost(tabulate(find([study]).runs)).axes
    points = {
        c.get_label(): (*c.lines[0].get_xdata(), *c.lines[0].get_ydata()) for c in axes.containers
    }
    assert points["fisher"] == pytest.approx((3.0, -0.1))


def test_the_curves(logged):
    figure = learning_curves(tabulate(find([logged]).runs))
    (axes,) = figure.axes
    assert axes.get_ylabel() == "train/loss"
    labels = {line.get_label() for line in axes.lines}
    assert labels == {
        f"{name} (n 3)" for name in ("none", "r1 weight=0.1", "r1 weight=1", "fisher weight=1")
    }
    for line in axes.lines:
        assert [*line.get_ydata()] == pytest.approx([3.0, 2.0, 1.0])  # mean of 2 + s over seeds


def test_curves_meet_at_common_steps(logged):
    one = np.array([0, 1, 2, 5]), np.array([1.0, 2.0, 3.0, 4.0])
    other = np.array([1, 2, 3]), np.array([4.0, 5.0, 6.0])
    (steps, mean), std = mean_curve([one, other])
    assert [*steps] == [1, 2]
    assert [*mean] == [3.0, 4.0]
    assert [*std] == pytest.approx([np.std([2, 4], ddof=1)] * 2)
    assert curves_of(Path("nowhere")) == {}


@pytest.mark.parametrize(
    ("spread", "told"),
    [
        (Spread(0.0, 0.0, 3), "0.0000 ± 0.0000"),
        (Spread(93.85, 0.6, 3), "93.85 ± 0.60"),
        (Spread(-0.01, 0.02, 3), "-0.01000 ± 0.02000"),
        (Spread(3.1e-9, 2e-10, 3), "3.1e-09 ± 2e-10"),
        (None, ""),
    ],
)
def test_a_mean_in_words(spread, told):
    assert in_words(spread) == told
