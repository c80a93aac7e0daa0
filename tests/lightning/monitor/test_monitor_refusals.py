"""What the monitor refuses, before the first step."""

import copy
from functools import partial

import pytest
import torch
from modules import SGD, Plain
from monitored import Manual, approx, fit, seen_by_hand, size
from torch import nn

import gpkit
from gpkit.findings.monitor import findings_of_strategy

REFUSED = {
    "there is no submodule 'net.bakbone' \\(did you mean 'net.backbone'\\?\\); there are 'net'": {
        "inputs": "net.bakbone"
    },
    "there is no submodule 'nett'.*there is no submodule 'hed'": {
        "inputs": "nett",
        "activations": ["hed"],
    },
    "training_step does not call the submodule 'unused': name one that it calls": {
        "inputs": "unused"
    },
    "training_step does not call the submodule 'unused': name one": {"activations": "unused"},
    "calls the submodule 'net.again' 2 times: name one that is called once": {
        "inputs": "net.again"
    },
    "the input of the submodule 'net.embed' is torch.int64, which has no gradient": {
        "inputs": "net.embed"
    },
    "the output of the submodule 'net.single' must have samples": {"activations": "net.single"},
    "`manual_backward=...` is for manual optimisation; leave it out": {"manual_backward": 0},
}


@pytest.mark.parametrize("said", REFUSED)
def test_refusals_before_the_first_step(said):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.again = nn.Embedding(3, 5), nn.Tanh()
            self.backbone, self.single = nn.Linear(5, 3), nn.Identity()

        def forward(self, x):
            h = self.backbone(self.again(self.again(self.embed(x.argmax(1) % 3))))
            return h * self.single(h.mean())

    module = Plain(Odd())
    module.unused = nn.Linear(1, 1)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=said):
        fit(module, gpkit.GradientNormMonitor(**REFUSED[said]), log_every_n_steps=2)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert "training_step" not in module.__dict__


@pytest.mark.parametrize("kind", ["DeepSpeedStrategy", "FSDPStrategy"])
def test_strategies_whose_gradients_are_not_the_parameters(kind):
    strategy = type(kind, (), {})()
    (said,) = findings_of_strategy(strategy, reads=True, own=False)
    assert f"{kind} keeps pieces of gradients" in str(said)
    assert not list(findings_of_strategy(strategy, reads=False, own=False))


def test_manual_optimisation_must_say_which_backward(net):
    with pytest.raises(ValueError, match="optimises manually: say which of the manual_backward"):
        fit(Manual(net), gpkit.GradientNormMonitor(inputs="net"))


def test_a_penalized_module_logs_its_own(net):
    loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match=r"under the same names: .*gradient_norms=False"):
        fit(gpkit.PenalizedModule(net, loss), gpkit.GradientNormMonitor())
    module = gpkit.PenalizedModule(copy.deepcopy(net), loss, gradient_norms=False, optimizer=SGD)
    logged = fit(module, gpkit.GradientNormMonitor())
    true = seen_by_hand(net, lambda net, x, y: size(*net.parameters()))
    assert logged.columns("grad_norm/weight") == [approx(true)]


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (
            partial(gpkit.GradientNormMonitor, "layers"),
            ValueError,
            r"`weights=...` must be one of .* got 'layers' \(did you mean 'layer'\?\)",
        ),
        (
            partial(gpkit.GradientNormMonitor, inputs=[nn.Linear(1, 1)]),
            TypeError,
            "`inputs=...` must be names of submodules, such as 'backbone'; got Linear",
        ),
        (
            partial(gpkit.GradientNormMonitor, histogram_every_n_epochs=-1),
            ValueError,
            "`histogram_every_n_epochs=...` must be an integer >= 0; got -1",
        ),
        (
            partial(gpkit.GradientNormMonitor, manual_backward=True),
            ValueError,
            "`manual_backward=...` must be an integer >= 0; got True",
        ),
    ],
)
def test_wrong_arguments(made, error, said):
    with pytest.raises(error, match=said):
        made()
