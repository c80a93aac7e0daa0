"""What a net checkpoints is run again in a backward pass as it was in the penalty's own forward."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import gpkit
from tests.support.compare import relative_error


class Checkpointed(nn.Module):
    """A net whose first part is run again in each backward pass."""

    def __init__(self, part: nn.Module, head: nn.Module, *, on: bool = True) -> None:
        super().__init__()
        self.part, self.head, self.on = part, head, on

    def forward(self, x):
        h = checkpoint(self.part, x, use_reentrant=False) if self.on else self.part(x)
        return self.head(h.flatten(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x, need_weights=False)[0]


PARTS = {
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3), nn.Tanh()), 12),
    "spectral norm": (lambda: nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Tanh()), 12),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.5)), 12),
    "attention": (Attention, 12),
}


def flat(net):
    return torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.grad is not None])


def pair(kind):
    """Return the same net with and without checkpointing."""
    make, width = PARTS[kind]
    torch.manual_seed(0)
    nets = [Checkpointed(make(), nn.Linear(width, 1), on=on).double() for on in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    return nets


@pytest.mark.parametrize("forward", ["isolated", "eval"])
@pytest.mark.parametrize("kind", PARTS)
def test_a_checkpointed_net_is_penalised_as_without(kind, forward):
    x = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for net in pair(kind):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        penalty = gpkit.GradientPenalty(forward=forward, seed=0)
        state = torch.get_rng_state()
        value = penalty(lambda x, net=net: net(x).tanh(), x)
        value.backward()
        assert torch.equal(torch.get_rng_state(), state)
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        found.append((value, flat(net)))
    (value, grads), (true, theirs) = found
    assert relative_error(value, true) < 1e-12
    assert relative_error(grads, theirs) < 1e-10


def test_a_weight_penalty_of_a_checkpointed_net():
    x = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for net in pair("batch norm"):
        before = {k: v.clone() for k, v in net.state_dict().items()}
        value = gpkit.weight_grad_norm()(lambda net=net: net(x).square().mean(), net)
        value.backward()
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        found.append((value, flat(net)))
    assert relative_error(found[0][0], found[1][0]) < 1e-12
    assert relative_error(found[0][1], found[1][1]) < 1e-10


def test_the_training_forward_is_recomputed_as_ever():
    net, _ = pair("batch norm")
    x = torch.randn(5, 3, 4).double()
    gpkit.r1()(lambda x: net(x).tanh(), real=x).backward()
    net(x).sum().backward()  # torch's own: the forward and the recomputation both count
    assert net.part[1].num_batches_tracked == 2
