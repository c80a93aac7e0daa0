"""A loss that cannot be compiled runs as it is, and the reason is said once."""

import copy

import pytest
import torch
from compiling import Graphs, critic, samples
from torch import nn

import gpkit

pytestmark = [pytest.mark.compiler, pytest.mark.usefixtures("graphs_alone")]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x):
        return self.out(self.rnn(x.unsqueeze(1))[0][:, -1])


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def variable_inside(net, penalty):
    def loss(x, _):
        x = x.detach().requires_grad_()
        return net(x).mean() + penalty(net(x), x)

    return loss


OBSTACLES = {
    "recurrent": (Recurrent, gpkit.r1, None, "does not trace recurrent nets, as nn.LSTM"),
    "noise": (
        lambda: critic(Noise()),
        gpkit.r1,
        None,
        "forward pass of a penalty draws random numbers that are not those of F.dropout",
    ),
    "twice": (
        critic,
        lambda: gpkit.r1(form=gpkit.two_sided(gpkit.running_average(0.9))),
        lambda net, penalty: lambda x, _: penalty(net, real=x) + penalty(net, real=-x),
        "'r1' is called twice in a step, and the second call reads the average that the first",
    ),
    "adaptive, twice": (
        critic,
        lambda: gpkit.r1(gpkit.target_norm(1.0)),
        lambda net, penalty: lambda x, _: penalty(net, real=x) + penalty(net, real=-x),
        "'r1' is called twice in a step, and the second call reads the weight that the first",
    ),
    "variable": (
        critic,
        gpkit.input_grad_norm,
        variable_inside,
        r"requires_grad_\(\).*: give the penalty the function, penal",
    ),
    "differences": (
        critic,
        lambda: gpkit.r1(estimator="finite_difference"),
        None,
        "'r1' takes differences, by finite_difference.*torch.compile the net alone",
    ),
    "step": (
        critic,
        gpkit.r1,
        lambda net, penalty: lambda x, _: net(x).mean() + penalty(net, real=x, step=3),
        "'r1' is called with step=: leave it out",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning:gpkit.findings.trained")
@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_compiled_runs_as_it_is(name):
    build, make, make_loss, said = OBSTACLES[name]
    net, penalty = build(), make()
    other = copy.deepcopy(penalty)
    losses = [
        make_loss(net, p) if make_loss else lambda x, _, p=p: net(x).mean() + p(net, real=x)
        for p in (penalty, other)
    ]
    step = gpkit.compile(losses[0], backend=Graphs())
    x = samples()[0]
    torch.manual_seed(4)
    with pytest.warns(UserWarning, match=said):
        found = [step(x, None)]
    found.append(step(x, None))
    torch.manual_seed(4)
    assert found == [losses[1](x, None) for _ in range(2)]


def test_refusals():
    with pytest.raises(TypeError, match=r"takes the function that returns the loss; got a Tensor"):
        gpkit.compile(torch.ones(1))
    assert repr(gpkit.compile(len)) == "gpkit.compile(<built-in function len>)"
