"""Every way to derive from `GANModule`: it trains as two nets by hand in torch."""

import copy
from functools import partial
from types import MappingProxyType

import pytest
import torch
from gan_by_hand import SGD, r1_term, train
from gans import assert_same, critic, data, generator, trainer
from torch.utils.data import DataLoader

import gpkit
from gpkit.lightning.gan import GANModule


class Plain(GANModule):
    """Forms derive from it. ``hand`` are the options of the loop by hand."""

    hand = MappingProxyType({})

    def __init__(self, generator, critic, **options):
        defaults = {"critic_optimizer": SGD, "generator_optimizer": SGD, "critic_steps": 2}
        defaults |= {"latent_dim": 3, "loss": "non_saturating", "penalty": gpkit.r1(3.0)}
        super().__init__(generator, critic, **{**defaults, **options})

    @staticmethod
    def batches(pairs):
        return pairs


class CallsSuper(Plain):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)


class OtherSignature(Plain):
    def training_step(self, *args, **kwargs):
        return super().training_step(*args, **kwargs)


class OnlyTheBatch(Plain):
    def training_step(self, batch):
        super().training_step(batch, 0)


class ChangesTheBatch(Plain):
    def training_step(self, batch, batch_idx):
        super().training_step([2 * batch[0]], batch_idx)

    @staticmethod
    def batches(pairs):
        return [(2 * x, y) for x, y in pairs]


class Augments(ChangesTheBatch):
    training_step = GANModule.training_step

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [2 * batch[0], batch[1]]


class GeneratorFirst(Plain):
    """Its optimisers are in another order."""

    def configure_optimizers(self):
        return [SGD(self.generator.parameters()), SGD(self.critic.parameters())]


class TwoLists(Plain):
    hand = MappingProxyType({"decay": 0.5})

    def configure_optimizers(self):
        both = SGD(self.critic.parameters()), SGD(self.generator.parameters())
        half = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
        return list(both), [{"scheduler": half(o), "interval": "step"} for o in both]


class EachEpoch(Plain):
    """A scheduler steps each epoch, as Lightning's do by default."""

    hand = MappingProxyType({"decay_each_epoch": 0.5})

    def configure_optimizers(self):
        both = SGD(self.critic.parameters()), SGD(self.generator.parameters())
        half = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
        return list(both), [half(optimizer) for optimizer in both]


class OnlyTheBoundIsGiven(Plain):
    hand = MappingProxyType({"gradient_clip": 0.05})

    def __init__(self, *nets, **options):
        super().__init__(*nets, gradient_clip=0.05, **options)

    def on_before_optimizer_step(self, optimizer):
        """Does not call the one of its base class."""


class Hooks(Plain):
    """Do not call those of the base class."""

    def on_fit_start(self):
        pass

    def on_train_epoch_end(self):
        pass

    def on_train_batch_start(self, batch, batch_idx):
        return None

    def on_after_backward(self):
        pass


class Backward(Plain):
    def backward(self, loss, *args, **kwargs):
        loss.backward(*args, **kwargs)


class Accumulates(Plain):
    hand = MappingProxyType({"accumulate": 2})

    def __init__(self, *nets, **options):
        super().__init__(*nets, accumulate=2, **options)


class ADict(Plain):
    """Its batch is a dict, which it reads itself."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"x": batch[0], "y": batch[1]}


class Latents(Plain):
    def latents(self, n):
        return 0.5 * super().latents(n)


class SeveralLoaders(Plain):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (torch.cat([batch["a"][0], batch["b"][0]]),)


class HasData(Plain):
    def train_dataloader(self):
        return DataLoader(data(12), batch_size=4)


FORMS = [CallsSuper, ChangesTheBatch, GeneratorFirst, TwoLists, EachEpoch, OnlyTheBoundIsGiven]
SLOW = [OtherSignature, OnlyTheBatch, Augments, Hooks, Backward, Accumulates, ADict, Latents]
SLOW += [SeveralLoaders, HasData]
SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in SLOW]


@pytest.mark.parametrize("form", [*FORMS, *SLOW])
def test_a_form(form):
    torch.manual_seed(0)
    G, C, rows = generator(), critic(), data(12)
    before = [copy.deepcopy(net) for net in (G, C)]
    loader, pairs = DataLoader(rows, 4), list(DataLoader(rows, 4))
    if form is SeveralLoaders:
        parts = [DataLoader(torch.utils.data.Subset(rows, range(i, 12, 2)), 2) for i in range(2)]
        loader = dict(zip("ab", parts, strict=True))
        pairs = [(torch.cat([a[0], b[0]]), None) for a, b in zip(*parts, strict=True)]
    module = form(G, C)
    trainer(limit_val_batches=0).fit(module, None if form is HasData else loader)
    epochs = [[(x, None) for x, _ in form.batches(pairs)]] * 2
    by_hand = train(*before, epochs, (list(G.seen), []), r1_term, **form.hand)
    assert_same(module.generator, by_hand[0])
    assert_same(module.critic, by_hand[1])


class NotCalled(Plain):
    def critic_loss(self, real, fake):
        return fake.mean()

    def optimizer_step(self, *args, **kwargs):
        raise AssertionError


def test_methods_that_nothing_calls_are_named():
    module = NotCalled(generator(), critic())
    with pytest.warns(UserWarning, match="which is not called") as said:
        trainer(limit_val_batches=0, max_epochs=1).fit(module, DataLoader(data(4), 4))
    lines = [str(warning.message) for warning in said]
    assert any("NotCalled defines critic_loss, which is not called: give" in line for line in lines)
    assert any("optimizer_step, which is not called: Lightning" in line for line in lines)


class OneForAll(Plain):
    def configure_optimizers(self):
        return SGD(self.parameters())


class ForOne(Plain):
    def configure_optimizers(self):
        return SGD(self.generator.parameters())


class OnPlateau(Plain):
    def configure_optimizers(self):
        both = [SGD(self.critic.parameters()), SGD(self.generator.parameters())]
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(both[0])
        return both, [plateau]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (OneForAll, "the optimiser of the critic has parameters of others too"),
        (ForOne, "no optimiser has parameters of the critic: return one for each net"),
        (OnPlateau, "steps schedulers without a metric; got ReduceLROnPlateau: step it in a hook"),
    ],
)
def test_optimisers_that_would_train_something_else(form, words):
    module = form(generator(), critic())
    with pytest.raises((ValueError, TypeError), match=words):
        trainer(limit_val_batches=0, max_epochs=1).fit(module, DataLoader(data(4), 4))
