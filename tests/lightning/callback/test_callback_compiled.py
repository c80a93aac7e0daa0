"""The callback on compiled modules: as on plain ones; and what a copy of a module has of it."""

import copy
import warnings

import matrix
import nets
import pytest
import pytorch_lightning as pl
import torch
from compiling import Graphs
from matrix import Cell
from modules import Plain

import gpkit

pytestmark = pytest.mark.compiler

UNCOMPILED = "ignore:the penalties run the compiled module uncompiled"


def compiled(how):
    """A module to fit, and the same without the wrapper of torch.compile."""
    module = Plain(nets.net(torch.float32))
    if how == "module":
        return torch.compile(module, backend="aot_eager"), module
    if how == "submodule":
        module.net.backbone = torch.compile(module.net.backbone, backend="aot_eager")
    else:
        module.net.compile(backend="aot_eager")
    return module, module


@pytest.mark.filterwarnings(UNCOMPILED)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's
@pytest.mark.parametrize("how", ["module", "submodule", "in place"])
@pytest.mark.parametrize("estimator", matrix.ESTIMATORS)
@pytest.mark.parametrize("where", matrix.WHERE)
def test_trains_as_a_plain_module(where, estimator, how):
    cell = Cell(where, estimator, "32", "1", "one", "tensor")
    fitted, module = compiled(how)
    torch._dynamo.reset()
    matrix.trainer(cell).fit(fitted, matrix.Shares())
    mine = [p.detach() for p in module.parameters()]
    assert matrix.difference(mine, matrix.expected(cell)) < 1e-6


@pytest.mark.parametrize(("estimator", "runs"), [("exact", False), ("difference", True)])
def test_what_runs_compiled(estimator, runs):
    torch._dynamo.reset()
    module, graphs = Plain(nets.net(torch.float32)), Graphs()
    module.net.compile(backend=graphs)
    cell = Cell("weight", estimator, "32", "1", "one", "tensor")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        matrix.trainer(cell).fit(module, matrix.Shares())
    lines = [str(w.message) for w in said if "run the compiled module uncompiled" in str(w.message)]
    assert len(lines) == (not runs)
    steps = matrix.EPOCHS * matrix.BATCHES
    # two evaluations a step, one more in the first, to compare; none is compiled anew
    assert (graphs.run, graphs.compiled) == ((2 * steps + 1, 1) if runs else (0, 0))


@pytest.mark.filterwarnings(UNCOMPILED)
def test_a_lazy_penalty_leaves_the_other_steps_compiled():
    """Of two steps one runs compiled, once and for all: hooks that stay on would be compiled in."""
    torch._dynamo.reset()
    graphs, hooks = Graphs(), []

    class Looks(Plain):
        def training_step(self, batch, batch_idx):
            hooks.append(len(self.net._forward_pre_hooks))
            return super().training_step(batch, batch_idx)

    module = Looks(nets.net(torch.float32))
    module.net.compile(backend=graphs)
    cb = gpkit.GradientPenaltyCallback(gpkit.input_grad_norm(0.3, every=2), "net")
    cell = Cell("input", "exact", "32", "1", "one", "tensor")
    matrix.trainer(cell, callbacks=[cb]).fit(module, matrix.Shares())
    steps = matrix.EPOCHS * matrix.BATCHES
    assert hooks == [1, 0] * (steps // 2)
    assert (graphs.run, graphs.compiled) == (steps // 2, 1)


class Copies(pl.Callback):
    """Copies the module in the middle of a fit, as weight averaging does at its beginning."""

    def on_train_batch_end(self, trainer, module, *args):
        self.copied = copy.deepcopy(module)


def test_a_copy_made_in_a_fit_is_a_plain_module():
    cell, copies = Cell("weight", "exact", "32", "1", "one", "tensor"), Copies()
    module = Plain(nets.net(torch.float32))
    matrix.trainer(cell, callbacks=[copies]).fit(module, matrix.Shares())
    copied = copies.copied
    assert copied.training_step.__func__ is Plain.training_step
    assert copied.training_step.__self__ is copied
    assert copied.log.__self__ is copied
