"""What `gpkit.bench` measures, where it is known by hand."""

import copy
import importlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from compiling import Graphs
from rich.console import Console
from torch import nn

import gpkit
from gpkit.bench.__main__ import main
from gpkit.bench.counted import flops_of, memory_of
from gpkit.bench.measure import Benchmark, Row, bench
from gpkit.bench.shown import chart, notes, tables
from gpkit.bench.steps import Steps
from gpkit.bench.variants import variants

N, B = 32, 16


def setting():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(N, N), nn.Tanh(), nn.Linear(N, 1))
    return net, torch.randn(B, N), torch.randn(B, 1)


def test_operations_are_those_of_the_products():
    net, x, y = setting()
    steps = Steps(net, x, y)
    first, last = 2 * B * N * N, 2 * B * N  # of one product with each layer
    # forward, the gradient in the weights, and the one in the hidden layer
    assert flops_of(steps.plain) == 2 * first + 3 * last
    found = bench(net, gpkit.r1(), (x, y), rounds=1)
    # each layer in a forward pass and in the gradient in x, and two products for the gradients of
    # both of these; without that of the forward pass in x, and of the last layer, where δ is one
    plain, penalty = 2 * first + 3 * last, 5 * first + 3 * last
    assert found.rows[0].flops == pytest.approx((plain + penalty) / plain)


def test_memory_is_what_is_allocated():
    kept = []
    assert memory_of(lambda: kept.append(torch.empty(1000, 250))) == 1e6
    assert memory_of(lambda: [torch.empty(1000, 250) for _ in range(2)].clear()) == 2e6


QUIET = """
import os, torch
from gpkit.bench.counted import memory_of
x = torch.zeros(4, requires_grad=True)
y = x.exp()  # memory from before
print(memory_of(lambda: torch.empty(1000, 250)), os.environ.get("KINETO_LOG_LEVEL"))
memory_of(lambda: y.sum().backward())
"""


def test_a_measurement_writes_nothing_to_the_terminal():
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("1000000.0 None\n", "")


def test_errors_are_against_exact_in_float64():
    net, x, y = setting()
    found = bench(net, gpkit.jacobian(of=lambda h: h), (x, y), rounds=2)
    rows = {row.estimator: row for row in found.rows}
    assert rows["exact"].error < 1e-5
    found = bench(net, gpkit.curvature(), (x, y), rounds=1)
    rows = {row.estimator: row for row in found.rows}
    assert rows["exact"].error < 1e-5
    assert 0.05 < rows["projection"].error < 5
    assert rows["exact"].time > 1


def test_the_advice_takes_the_cheapest_within_the_error():
    rows = (
        Row("p", "exact", time=3.0, error=1e-6),
        Row("p", "finite_difference", time=2.0, error=0.01),
        Row("p", "projection", time=1.5, error=0.5),
    )
    assert Benchmark(rows, 1e-3, 0.1).advice() == [
        "p: exact: exact, 3.00 plain steps; within 10%: finite_difference, 2.00 plain steps"
    ]
    assert Benchmark(rows[2:], 1e-3, 0.1).advice() == ["p: no estimator is within the error"]


@pytest.mark.compiler
@pytest.mark.usefixtures("graphs_alone")
def test_what_is_timed_is_compiled():
    net, x, y = setting()
    graphs = Graphs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
        (row,) = bench(net, gpkit.spectral_jacobian(), (x, y), rounds=3, compile=True).rows
    assert (graphs.compiled, graphs.run) == (1, 4)  # compared once, and three rounds
    assert row.compiled > 0
    assert row.least == min(row.time, row.compiled)
    step, said = Steps(net, x, y).compiled(gpkit.r1(estimator="finite_difference"))
    assert step is None
    assert "takes differences" in said


def test_the_advice_takes_what_is_compiled_where_it_is_faster():
    rows = (Row("p", "exact", time=3.0, compiled=2.0, error=1e-6),)
    assert Benchmark(rows, 1e-3, 0.1).advice() == [
        "p: exact: exact compiled, 2.00 plain steps; within 10%: exact compiled, 2.00 plain steps"
    ]


def test_every_way_to_call_a_penalty():
    net, x, y = setting()
    parts = {
        "wgan_gp": gpkit.wgan_gp(),
        "r2": gpkit.r2(),
        "loss": gpkit.input_grad_norm(of="loss"),
        "weights": gpkit.weight_grad_norm(),
        "samples": gpkit.weight_grad_norm(scope="sample"),
        "activation": gpkit.input_grad_norm(wrt=gpkit.activation("1")),
        "part": gpkit.r1(subsample=0.25),
    }
    found = bench(net, parts, (x, y), rounds=1)
    measured = {row.penalty for row in found.rows if not row.refused and row.time > 0}
    assert measured == set(parts)
    assert all("\n" not in row.refused for row in found.rows)
    refused = bench(net, gpkit.irm(), (x, y), rounds=1).rows[0].refused
    assert "environments" in refused


def test_variants_keep_the_choices():
    made = variants(gpkit.r1(3.0, subsample=0.5, estimator=gpkit.projection(4)))
    assert made["projection"].estimator.n == 4
    assert made["exact"].subsample == 0.5
    assert made["exact"].weight == 3.0
    torch.manual_seed(0)
    net, x, _ = setting()
    assert len(made["exact"].terms(net, x).norms) == B // 2


@pytest.mark.app
def test_the_command(capsys, tmp_path):
    png = tmp_path / "bench.png"
    words = ["model=mlp", "penalty=r1", "data.batch_size=8", "--rounds", "1", "--json", "--eager"]
    main([*words, "--png", str(png)])
    said = json.loads(capsys.readouterr().out)
    assert {row["estimator"] for row in said["rows"]} >= {"exact", "projection"}
    assert png.stat().st_size > 1000
    with pytest.raises(SystemExit):
        main(["penalty=r11"])
    assert capsys.readouterr().err.count("\n") == 1
    for name, said in (("no/a.png", "a folder that exists"), ("a.txt", "ends in .png")):
        with pytest.raises(SystemExit):
            main(["penalty=r1", "--png", str(tmp_path / name)])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["penalty=none"])
    assert "there is no penalty" in capsys.readouterr().err


def test_the_tables_fit_a_terminal_of_80_columns():
    costs = {"time": 12.345, "low": 10.0, "high": 21.0, "flops": 2.0, "memory": 3.0, "error": 1e-4}
    rows = (
        Row("weight_grad_norm", "finite_difference", compiled=11.0, **costs),
        Row("weight_grad_norm", "exact", refused="the net has no second derivative"),
        Row("r1", "exact", **costs),
    )
    found = Benchmark(rows, 1e-3, 0.1)
    console = Console(width=80, file=io.StringIO())
    for table in tables(found):
        console.print(table)
    said = console.file.getvalue()
    assert [line.split() for line in said.splitlines() if "finite_difference" in line] == [
        ["finite_difference", "12.35", "10.00-21.00", "11.00", "2.00", "3.00", "1.0e-04"]
    ]
    assert "weight_grad_norm, in plain steps of 1 ms" in said
    assert "r1, in plain steps of 1 ms" in said
    assert notes(found) == ["weight_grad_norm, exact: the net has no second derivative"]
    assert "not steady" in found.advice()[-1]


def test_a_chart_of_what_is_unknown(tmp_path):
    rows = (Row("p", "exact", time=2.0, low=1.0, high=3.0), Row("p", "own", refused="no"))
    chart(Benchmark(rows, 1.0, 0.1), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_package_and_the_function_are_one_name():
    net = nn.Linear(3, 1)
    found = gpkit.bench(net, {"mine": gpkit.weight_grad_norm()}, torch.randn(4, 3), rounds=1)
    assert {row.penalty for row in found.rows} == {"mine"}
    package = importlib.import_module("gpkit.bench")
    assert package(net, gpkit.weight_grad_norm(), torch.randn(4, 3), rounds=1).rows


SMALL = (torch.randn(4, 3), torch.randn(4, 1))


def smooth():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Tanh(), nn.Linear(4, 1))


@pytest.mark.parametrize(
    "penalty",
    [
        gpkit.r1(gpkit.warmup(1.0, steps=9)),
        gpkit.r1(gpkit.target_norm(1.0)),
        gpkit.r1(every=4),
        gpkit.r1(form=gpkit.two_sided(gpkit.running_average(0.9))),
    ],
    ids=["schedule", "adaptive", "lazy", "average"],
)
def test_what_counts_steps_has_its_error(penalty):
    before = penalty.state_dict()
    found = bench(smooth(), penalty, SMALL, rounds=1)
    assert all(row.error < 1e-5 for row in found.rows if row.estimator != "finite_difference")
    assert all(row.flops > 2 for row in found.rows)  # each step that is measured has the penalty
    assert penalty.state_dict() == before


def test_differences_are_never_called_exact():
    net = smooth().double()
    found = bench(net, gpkit.weight_grad_norm(), tuple(t.double() for t in SMALL), rounds=1)
    (row,) = [row for row in found.rows if row.estimator == "finite_difference"]
    assert row.error < 1e-6
    assert row.differs
    rows = (Row("p", "exact", time=3.0, error=1e-15), Row("p", "d", time=2.0, error=1e-9))
    differs = replace(rows[1], differs=True)
    assert Benchmark((rows[0], differs), 1.0, 0.1).advice() == [
        "p: exact: exact, 3.00 plain steps; within 10%: d, 2.00 plain steps"
    ]


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        assert x.dtype == torch.float32, "float32 alone"
        return self.layer(x).tanh()


def test_a_net_in_which_something_fails():
    found = bench(Single(), gpkit.r1(), SMALL, rounds=1)
    assert "r1, exact: its error is not known: float32 alone" in notes(found)
    assert found.rows[0].time > 0
    assert found.advice()[0].startswith("r1: no error is known: ")
    words = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2))
    tokens = torch.randint(0, 5, (4, 3)), torch.tensor([0, 1, 1, 0])
    found = bench(words, gpkit.weight_grad_norm(), tokens, rounds=1)
    assert found.rows[0].error < 1e-5
    found = bench(Single(), gpkit.r1(wrt=gpkit.activation("head")), SMALL, rounds=1)
    assert found.advice() == ["r1: no estimator can be measured"]


def test_the_net_and_the_penalties_stay_as_they_were():
    net, penalty = smooth().train(), gpkit.spectral_jacobian()
    state, before = copy.deepcopy(net.state_dict()), penalty.state_dict()
    found = bench(net, [penalty, gpkit.spectral_jacobian()], SMALL, rounds=1)
    assert [row.penalty for row in found.rows] == ["spectral_jacobian", "spectral_jacobian 2"]
    assert penalty.state_dict() == before
    assert all(torch.equal(own, state[name]) for name, own in net.state_dict().items())


def test_refusals():
    with pytest.raises(TypeError, match=r"needs penalties, such as gpkit.r1\(\).*; got a str"):
        bench(smooth(), "r1", SMALL)
    with pytest.raises(
        TypeError, match=r"must be a tensor x, or \(x, y\); got Tensor, Tensor, Ten"
    ):
        bench(smooth(), gpkit.r1(), (*SMALL, SMALL[0]))
    with pytest.raises(ValueError, match="needs a net with parameters that require grad; got none"):
        bench(smooth().requires_grad_(False), gpkit.r1(), SMALL)
