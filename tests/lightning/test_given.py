"""What penalties take from the batch, and several activations, against loops by hand."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from modules import QUIET
from torch import nn
from torch.func import functional_call, grad, vmap

import gpkit

B, D = 6, 4
RATE = 0.05
SGD = partial(torch.optim.SGD, lr=RATE)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(D, 5), nn.Linear(D, 5)
        self.head = nn.Linear(10, 1)
        self.double()

    def forward(self, x):
        return self.head(torch.cat([torch.tanh(self.a(x)), torch.sin(self.b(x))], 1)).squeeze(1)


def batch():
    rng = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=rng, dtype=torch.float64)
    return {
        "x": draw(B, D),
        "labels": draw(B),
        "forces": draw(B, D),
        "mask": (draw(B, D) > 0).double(),
        "w": torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0], dtype=torch.float64),
    }


class Regression(pl.LightningModule):
    """Knows nothing of gpkit."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, batch_idx):
        return (self.net(batch["x"]) - batch["labels"]).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters())


class Batches(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield batch()


def by_callback(penalty, losses=None):
    module = Regression()
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        callbacks=[gpkit.GradientPenaltyCallback(penalty, module="net", losses=losses)],
        **QUIET,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Batches(), batch_size=None))
    return [p.detach() for p in module.net.parameters()]


def by_module(penalty):
    module = gpkit.PenalizedModule(Net(), nn.MSELoss(), penalty, optimizer=SGD, inputs="x")
    loss = module.penalized_loss(batch())
    grads = torch.autograd.grad(loss, list(module.net.parameters()))
    return [(p - RATE * g).detach() for p, g in zip(module.net.parameters(), grads, strict=True)]


def by_hand(penalty):
    """Return the parameters after a step on the mean loss and a penalty."""
    net, given = Net(), batch()
    params = {name: p.detach() for name, p in net.named_parameters()}

    def total(params):
        return losses(net, params, given).mean() + penalty(net, params, given)

    grads = grad(total)(params)
    return [params[name] - RATE * grads[name] for name in params]


def losses(net, params, given):
    return (functional_call(net, params, (given["x"],)) - given["labels"]).square()


def slopes(net, params, given):
    return vmap(grad(lambda x: functional_call(net, params, (x[None],))[0]))(given["x"])


def sobolev(net, params, given):
    e = given["mask"] * (slopes(net, params, given) - given["forces"])
    return 0.7 * (given["w"] * e.square().sum(1)).sum() / given["w"].sum()


def weighted_losses(net, params, given):
    def loss(x, y):
        return (functional_call(net, params, (x[None],))[0] - y).square()

    g = vmap(grad(loss))(given["x"], given["labels"])
    return 0.7 * (given["w"] * g.square().sum(1)).sum() / given["w"].sum()


def in_weights(net, params, given):
    def weighted(params):
        return (given["w"] * losses(net, params, given)).sum() / given["w"].sum()

    return 0.7 * sum(g.square().sum() for g in grad(weighted)(params).values())


def of_each(net, params, given):
    def one(i):
        return grad(lambda p: losses(net, p, given)[i])(params)

    n2 = [sum(g.square().sum() for g in one(i).values()) for i in range(B)]
    return 0.7 * (given["w"] * torch.stack(n2)).sum() / given["w"].sum()


def matching(net, params, given):
    g = grad(lambda p: losses(net, p, given).mean())(params)
    return 0.7 * sum((v - 0.1).square().sum() for v in g.values())


def in_activations(net, params, given):
    def after(u, v):
        h = torch.cat([torch.tanh(u), torch.sin(v)])
        return (h * params["head.weight"][0]).sum()

    u, v = (given["x"] @ params[f"{n}.weight"].T + params[f"{n}.bias"] for n in "ab")
    du, dv = vmap(grad(after, (0, 1)))(u, v)
    n = torch.cat([du, dv], 1).square().sum(1)
    return 0.7 * (given["w"] * n).sum() / given["w"].sum()


WEIGHTS = {"sample_weight": "w"}
ALL = {"target": "forces", "metric": lambda batch: batch["mask"], **WEIGHTS}
BOTH = [gpkit.activation("a"), gpkit.activation("b")]
CENTRAL = gpkit.finite_difference(side="central")
STENCIL = gpkit.stencil(1e-3, taps=4)
build = partial(partial, gpkit.GradientPenalty, weight=0.7)

CASES = {
    "sobolev": (build(given=ALL), sobolev),
    "weighted losses": (build(of="loss", given=WEIGHTS), weighted_losses),
    "in the weights": (build(of="loss", wrt="weight", given=WEIGHTS), in_weights),
    "of each sample": (build(of="loss", wrt="weight", scope="sample", given=WEIGHTS), of_each),
    "matching": (
        build(of="loss", wrt="weight", given={"target": lambda _: [0.1] * 6}),
        matching,
    ),
    "activations": (build(wrt=BOTH, given=WEIGHTS), in_activations),
}


@pytest.mark.parametrize("train", [by_callback, by_module])
@pytest.mark.parametrize("estimator", ["exact", CENTRAL], ids=["exact", "difference"])
@pytest.mark.parametrize(("penalty", "oracle"), CASES.values(), ids=CASES)
def test_the_step_is_that_of_a_loop(penalty, oracle, estimator, train):
    wanted = by_hand(oracle)
    for p, q in zip(train(penalty(estimator=estimator)), wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("train", [by_callback, by_module])
def test_differences_along_the_axes_train_as_the_gradient(train):
    wanted = by_hand(sobolev)
    for p, q in zip(train(build(given=ALL)(estimator=STENCIL)), wanted, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_the_callback_refuses_differences_of_the_mean_loss_and_takes_losses():
    penalty = gpkit.input_grad_norm(estimator="random_difference")
    words = r"needs the loss of each sample.*give the callback losses"
    with pytest.raises(ValueError, match=words):
        by_callback(penalty)
    penalty = build(of="loss", given=WEIGHTS)(estimator=STENCIL)
    found = by_callback(penalty, lambda output, batch: (output - batch["labels"]).square())
    for p, q in zip(found, by_hand(weighted_losses), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_entries_by_position():
    entries = list(batch().values())
    x, y, forces = entries[:3]
    net = Net()
    penalty = gpkit.GradientPenalty(given={"target": 2})
    module = gpkit.PenalizedModule(net, nn.MSELoss(), penalty, optimizer=SGD)
    wanted = (net(x) - y).square().mean() + penalty(net, x, target=forces)
    torch.testing.assert_close(module.penalized_loss((x, y, forces)), wanted)


def test_norms_are_logged_as_a_weighted_mean():
    """The entry is no input of the net."""
    given = {key: value for key, value in batch().items() if key in ("x", "labels", "w")}
    penalty = gpkit.GradientPenalty(given=WEIGHTS)
    module = gpkit.PenalizedModule(Net(), nn.MSELoss(), penalty, optimizer=SGD)
    module.log = module.log_dict = lambda *_, **__: None
    module.trainer = pl.Trainer(logger=False, **QUIET)
    module.training_step(given, 0)
    n = slopes(module.net, dict(module.net.named_parameters()), given).norm(dim=1)
    wanted = (given["w"] * n).sum() / given["w"].sum()
    torch.testing.assert_close(module.latest_step.scalars["penalty/penalty/norm"], wanted.detach())


def test_what_the_batch_does_not_have_is_named():
    penalty = gpkit.GradientPenalty(given={"target": "force"})
    with pytest.raises(TypeError, match=r"entry 'force' of the batch.*did you mean 'forces'"):
        by_module(penalty)
    with pytest.raises(TypeError, match=r"entry 'force' of the batch.*did you mean 'forces'"):
        by_callback(penalty)


def test_what_makes_no_sense_is_refused_before_the_first_step():
    penalty = gpkit.weight_grad_norm(scope="accumulated", given=WEIGHTS)
    with pytest.raises(ValueError, match="takes no sample_weight: weigh the samples in the loss"):
        by_callback(penalty)
    with pytest.raises(TypeError, match=r"'r1' needs target= of samples.*a pack is one: call the"):
        gpkit.GANModule(
            nn.Linear(2, 2),
            nn.Linear(2, 1),
            latent_dim=2,
            pac=2,
            penalty=gpkit.r1(given={"target": "forces"}),
        )


def test_activations_are_named_once_and_alone():
    with pytest.raises(ValueError, match=r"must name each activation once; got \['a', 'a'\]"):
        gpkit.r1(wrt=[gpkit.activation("a")] * 2)
    with pytest.raises(TypeError, match=r"is a list of gpkit.activation\(...\); got 'input'"):
        gpkit.r1(wrt=[gpkit.activation("a"), "input"])
