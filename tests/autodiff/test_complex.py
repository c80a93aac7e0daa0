"""Complex parameters count as their real and imaginary parts: ‖g‖² is the sum of |g|²."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

import gpkit
from gpkit.axes.adaptive import gradient_share
from tests.support.modules import QUIET

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Waves(nn.Module):
    """A net with a complex and a real parameter: the real part of a complex layer's powers."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(2)
        self.spectrum = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128, generator=rng))
        self.head = nn.Parameter(torch.randn(4, dtype=torch.float64, generator=rng))

    def forward(self, x):
        return forward(x, self.spectrum, self.head)


def forward(x, spectrum, head):
    z = x.to(spectrum.dtype) @ spectrum
    return (z.square().real.sin() + z.imag.tanh()) @ head


def losses_of(real, head):
    """Return the losses [5] as a function of the real and imaginary parts: the oracle's net."""
    return (forward(X, torch.view_as_complex(real), head) - Y).square()


def loss_of(real, head):
    return losses_of(real, head).mean()


def parts(net):
    return torch.view_as_real(net.spectrum.detach()).clone(), net.head.detach().clone()


def flat(grads):
    return torch.cat([g.reshape(-1) for g in grads])


def oracle(of, net):
    """Return a value and its gradient in the net's parameters, from one in the real parts."""
    given = parts(net)
    value = of(*given)
    real, head = torch.func.grad(of, (0, 1))(*given)
    return value, torch.view_as_complex(real), head


def norm_of(order):
    def norm(real, head):
        return torch.linalg.vector_norm(
            flat(torch.func.grad(loss_of, (0, 1))(real, head)), ord=order
        )

    return norm


def sample_norms(real, head):
    jacobian = torch.func.jacrev(losses_of, (0, 1))(real, head)
    return torch.cat([j.flatten(1) for j in jacobian], 1).square().sum(1).mean()


def hessian_norm(real, head):
    def whole(both):
        return loss_of(both[:24].reshape(3, 4, 2), both[24:])

    return (
        torch.func.jacrev(torch.func.jacrev(whole))(torch.cat([real.reshape(-1), head]))
        .square()
        .sum()
    )


def squared(norm):
    return lambda real, head: norm(real, head).square()


def closure(net):
    return lambda: (net(X) - Y).square().mean()


def losses(net):
    return lambda: (net(X) - Y).square()


EXACT = {
    "l2": (gpkit.weight_grad_norm(weight=1.0), closure, squared(norm_of(2))),
    "l1": (
        gpkit.weight_grad_norm(weight=1.0, form=gpkit.norm(norm="l1")),
        closure,
        norm_of(1),
    ),
    "linf": (
        gpkit.weight_grad_norm(weight=1.0, form=gpkit.norm(norm="linf")),
        closure,
        norm_of(torch.inf),
    ),
    "per sample": (gpkit.per_sample_grad_norm(weight=1.0), losses, sample_norms),
    "hessian": (gpkit.hessian(weight=1.0, estimator="exact"), closure, hessian_norm),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_penalty_is_the_one_in_the_real_and_imaginary_parts(name):
    penalty, function, norm = EXACT[name]
    net = Waves()
    value, *grads = oracle(norm, net)
    found = penalty(function(net), net)
    assert not found.is_complex()
    torch.testing.assert_close(found, value, rtol=1e-10, atol=0)
    found.backward()
    for p, g in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_finite_differences_move_both_parts(norm):
    order = {"l2": 2, "l1": 1, "linf": torch.inf}[norm]
    net = Waves()
    value, *grads = oracle(norm_of(order), net)
    estimator = gpkit.finite_difference(1e-6, side="central")
    penalty = gpkit.weight_grad_norm(weight=1.0, form=gpkit.norm(norm=norm), estimator=estimator)
    found = penalty(closure(net), net)
    torch.testing.assert_close(found, value, rtol=1e-9, atol=0)
    found.backward()
    for p, g in zip(net.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-5, atol=1e-7)


def test_gnp_steps_along_the_whole_gradient():
    net = Waves()
    before = [p.detach().clone() for p in net.parameters()]
    gpkit.gnp(r=0.1, alpha=1.0).with_loss(closure(net), net).backward()
    real, head = parts(net)
    first = torch.func.grad(loss_of, (0, 1))(real, head)
    length = flat(first).norm()
    moved = [p + 0.1 * g / length for p, g in zip((real, head), first, strict=True)]
    there = torch.func.grad(loss_of, (0, 1))(*moved)
    torch.testing.assert_close(
        net.spectrum.grad, torch.view_as_complex(there[0]), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(net.head.grad, there[1], rtol=1e-9, atol=1e-12)
    for p, q in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, q)


def test_random_directions_have_two_entries_for_a_complex_one():
    net = Waves()
    penalty = gpkit.hessian(weight=1.0, estimator=gpkit.projection(400), seed=0)
    value, *_ = oracle(hessian_norm, net)
    # The standard deviation is at most (2/400)^½ = 7 %; one entry for both parts halves the value.
    assert abs(penalty(closure(net), net) / value - 1) < 0.25


def test_the_largest_singular_value_is_that_of_the_real_jacobian():
    net = Waves()
    jacobian = torch.func.jacrev(losses_of, (0, 1))(*parts(net))
    matrix = torch.cat([j.flatten(1) for j in jacobian], 1) / 5
    penalty = gpkit.GradientPenalty(
        of=lambda y: y[None] / 5, wrt="weight", estimator=gpkit.power_iteration(5), seed=0
    )
    found = penalty(losses(net), net)
    torch.testing.assert_close(found, torch.linalg.matrix_norm(matrix, 2) ** 2, rtol=1e-8, atol=0)


def test_an_adaptive_weight_measures_both_parts():
    net = Waves()
    weight = gradient_share(0.5, weight=1.0)
    penalty = gpkit.weight_grad_norm(weight=weight)
    loss = closure(net)()
    weight.measure(loss, penalty(loss, net.parameters()), list(net.parameters()))
    given = parts(net)
    of_loss = flat(torch.func.grad(loss_of, (0, 1))(*given)).norm()
    of_penalty = flat(torch.func.grad(squared(norm_of(2)), (0, 1))(*given)).norm()
    assert weight(1) == pytest.approx(float(0.5 * of_loss / of_penalty))


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Waves()

    def training_step(self, batch, _):
        return closure(self.net)()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_the_callback_and_the_monitor_see_both_parts():
    module = Module()
    value, *grads = oracle(squared(norm_of(2)), module.net)
    loss = torch.func.grad(loss_of, (0, 1))(*parts(module.net))
    start = [p.detach().clone() for p in module.net.parameters()]
    callbacks = [
        gpkit.GradientPenaltyCallback(gpkit.weight_grad_norm(weight=0.5)),
        gpkit.GradientNormMonitor(),
    ]
    trainer = pl.Trainer(
        max_steps=1,
        callbacks=callbacks,
        logger=False,
        log_every_n_steps=1,
        accelerator="cpu",
        **QUIET,
    )
    trainer.fit(module, torch.utils.data.DataLoader(X, batch_size=5))
    logged = trainer.callback_metrics
    assert float(logged["penalty/weight_grad_norm"]) == pytest.approx(float(value) / 2, rel=1e-5)
    steps = [torch.view_as_complex(loss[0]) + grads[0] / 2, loss[1] + grads[1] / 2]
    whole = sum(g.abs().square().sum() for g in steps).sqrt()
    assert float(logged["grad_norm/weight"]) == pytest.approx(float(whole), rel=1e-5)
    for p, before, g in zip(module.net.parameters(), start, steps, strict=True):
        torch.testing.assert_close(p.detach(), before - 0.1 * g, rtol=1e-9, atol=1e-12)


def test_complex_samples_are_refused_with_the_way_out():
    x = torch.ones(4, 2, dtype=torch.complex64)
    with pytest.raises(TypeError, match="view_as_real"):
        gpkit.r1()(lambda x: x.abs().sum(1), real=x)
