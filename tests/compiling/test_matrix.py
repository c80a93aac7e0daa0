"""gpkit.compile in full: any net under any penalty equals the eager loss. By hand, with -m slow."""

import pytest
import torch
from compiling import critic, needs_compiler, same, samples
from torch import nn

import gpkit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.compiler,
    needs_compiler,
    pytest.mark.usefixtures("graphs_alone"),
]


class Attention(nn.Sequential):
    def __init__(self):
        block = nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True)
        super().__init__(block, nn.Linear(4, 1))

    def forward(self, x):
        return super().forward(x.unsqueeze(1).expand(-1, 3, -1)).mean(1)


class Convolutions(nn.Sequential):
    def __init__(self):
        # Over two numbers alone a norm is ±1, and its derivatives are rounding.
        layers = [nn.Conv2d(1, 8, 2), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(), nn.Linear(8, 1)]
        super().__init__(nn.Unflatten(1, (1, 2, 2)), *layers)


NETS = {
    "linear": critic,
    "layer norm": lambda: critic(nn.LayerNorm(6)),
    "batch norm": lambda: critic(nn.BatchNorm1d(6)),
    "dropout": lambda: critic(nn.Dropout(0.5)),
    "convolutions": Convolutions,
    "attention": Attention,
    "spectral norm": lambda: critic(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))),
}


def of_order(k, estimator):
    """A penalty of order k; of order 4 so small that two steps of SGD do not diverge."""
    options = {"weight": 1e-7} if k == 4 else {}
    return gpkit.GradientPenalty(order=k, estimator=estimator, seed=1, **options)


PENALTIES = {
    **{f"order {k}": lambda k=k: of_order(k, "projection") for k in (1, 2, 3, 4)},
    **{f"taylor {k}": lambda k=k: of_order(k, gpkit.taylor()) for k in (1, 2, 3, 4)},
    "trace by jets": lambda: gpkit.GradientPenalty(order=2, estimator=gpkit.trace(jets=True)),
    "exact 2": lambda: gpkit.GradientPenalty(order=2, seed=1),
    "two-sided": lambda: gpkit.GradientPenalty(form=gpkit.two_sided(1.0), at="interpolate", seed=1),
    "part": lambda: gpkit.r1(subsample=0.5, seed=1),
    "both": lambda: gpkit.r1_r2(seed=1),
    "forwards": lambda: gpkit.approximate_r1(seed=1),
    "singular value": lambda: gpkit.spectral_jacobian(seed=1),
    "laplacian": lambda: gpkit.laplacian(seed=1),
    "forward mode": lambda: gpkit.r1(estimator="jvp", seed=1),
    "activation": lambda: gpkit.r1(wrt=gpkit.activation("0"), seed=1),
    "average": lambda: gpkit.r1(form=gpkit.two_sided(gpkit.running_average(0.9)), seed=1),
    "eval": lambda: gpkit.r1(forward="eval", seed=1),
    "weights": lambda: gpkit.weight_grad_norm(seed=1),
    "each sample": lambda: gpkit.per_sample_grad_norm(seed=1),
}


COUPLED = ("exact 2", "laplacian", "trace by jets")


@pytest.mark.filterwarnings("ignore::UserWarning:gpkit.findings.trained")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("net", NETS)
def test_any_net_and_penalty(net, penalty, backend):
    torch.compiler.reset()
    if penalty == "forward mode" and ("norm" in net or net in ("convolutions", "attention")):
        pytest.skip("torch does not trace the forward-mode derivative of norm layers")
    if net == "batch norm" and penalty in COUPLED:
        pytest.skip("refused: the derivative of the sum over a normalised batch is zero")

    def make_loss(net):
        own = PENALTIES[penalty]()

        def loss(real, fake):
            losses = net(fake).squeeze(1).tanh() - net(real).squeeze(1)
            if own.wrt.batched:
                return losses.mean() + own(net, real=real, fake=fake)
            return losses.mean() + own(
                lambda: net(fake).squeeze(1).tanh() - net(real).squeeze(1), net
            )

        return loss, (own,)

    # A norm over so few numbers has large derivatives, which cancel: float32 agrees to 1e-6 or so.
    dtype = torch.float64 if net == "convolutions" else torch.float32
    batches = [tuple(x.to(dtype) for x in samples()) for _ in range(2)]
    same(lambda: NETS[net]().to(dtype), make_loss, batches, backend=backend)
