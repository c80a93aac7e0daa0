"""Random numbers and states of a GANModule: resumed runs, seeds, samples, other processes."""

import copy
import math
import pickle

import pytorch_lightning as pl
import torch
from gans import UNVALIDATED, B, D, critic, data, generator, lively, module, same, trainer
from torch.utils.data import DataLoader

from gpkit.data.arrays import ArrayDataModule


class Points(ArrayDataModule):
    """Samples in an order that checkpoints keep."""

    task, num_outputs = "classification", 2

    def arrays(self, generator):
        x, y = data().tensors
        empty = x[:0], y[:0]
        return [(x, y), empty, empty]


def states(made, runner):
    return {
        "nets": made.state_dict(),
        "optimizers": [o.state_dict() for o in runner.optimizers],
        "schedulers": [c.scheduler.state_dict() for c in runner.lr_scheduler_configs],
        "penalties": [p.state_dict() for p in made.penalties.values()],
        "path": made.generator_penalties["path_length"].state_dict(),
        "counts": made.counts,
    }


def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path):
    whole, runner = lively(), trainer(max_epochs=4, log_every_n_steps=3, **UNVALIDATED)
    runner.fit(whole, Points(batch_size=B))
    assert whole.counts == {"critic": 16, "generator": 8, "draws": 16}

    half, first = lively(), trainer(max_epochs=2, **UNVALIDATED)
    first.fit(half, Points(batch_size=B))
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert not same(half.state_dict(), whole.state_dict())
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["gpkit_gan"]
    assert saved == {"critic": 8, "generator": 4, "draws": 8, "seed": 0}

    resumed, second = lively(), trainer(max_epochs=4, log_every_n_steps=3, **UNVALIDATED)
    torch.manual_seed(99)
    second.fit(resumed, Points(batch_size=B), ckpt_path=tmp_path / "half.ckpt")
    assert same(states(resumed, second), states(whole, runner))


def test_the_seed_decides_and_the_streams_of_others_stay():
    nets = []
    for seed, state in ((1, 5), (1, 6), (2, 5)):
        made = lively(seed)
        made.penalties.parts.clear()
        made.generator_penalties.parts.clear()
        torch.manual_seed(state)
        before = torch.get_rng_state()
        trainer(max_epochs=1, log_every_n_steps=3, **UNVALIDATED).fit(made, Points(batch_size=B))
        assert torch.equal(torch.get_rng_state(), before)
        nets.append(made.state_dict())
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


def test_latents_are_standard_normal_and_fresh():
    G = generator()
    trainer().fit(module(G, critic()), DataLoader(data(1400), 100))
    z = torch.cat(G.seen)
    assert len(z.unique(dim=0)) == len(z) == 100 * (28 + 14)
    assert z.mean(0).abs().max() < 4 / math.sqrt(len(z))
    assert (z.T @ z / len(z) - torch.eye(3)).abs().max() < 4 * math.sqrt(2 / len(z))


def test_samples_are_of_the_average_in_evaluation_mode_and_leave_no_trace():
    G = generator()
    made = module(G, critic(), ema=0.5)
    trainer(max_epochs=1).fit(made, DataLoader(data(), B))
    before, state = copy.deepcopy(made.state_dict()), torch.get_rng_state()
    modes, counts = [m.training for m in made.modules()], dict(made.counts)
    first, again, other = made.sample(6), made.sample(6), made.sample(6, seed=1)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not first.requires_grad
    assert same(made.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [m.training for m in made.modules()]
    assert made.counts == counts
    made.ema_generator.eval()
    z = []
    made.ema_generator.register_forward_pre_hook(lambda net, x: z.append(x[0]))
    made.sample(6)
    torch.testing.assert_close(first, made.ema_generator(z[0]))
    assert not torch.allclose(first, G.eval()(z[0]))


def test_samples_of_labels():
    made = module(generator(2), critic(2), conditional=True)
    zeros, ones = made.sample(4, torch.zeros(4).long()), made.sample(4, torch.ones(4).long())
    assert zeros.shape == (4, D)
    assert not torch.allclose(zeros, ones)
    assert made(torch.zeros(4, 3).double(), torch.zeros(4).long()).shape == (4, D)


def test_a_module_goes_to_another_process():
    made = lively(seed=1)
    copied = pickle.loads(pickle.dumps(made))
    assert same(copied.state_dict(), made.state_dict())
    assert copied.loss == made.loss


def test_batches_of_an_epoch_that_was_broken_off_are_left():
    C = critic()
    made = module(generator(), C, accumulate=7)
    loader = DataLoader(data(), B)

    class BreakOff(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    trainer(max_epochs=1, callbacks=[BreakOff()]).fit(made, loader)
    assert not C.seen  # the first of seven batches alone
    trainer(max_epochs=1).fit(made, loader)
    assert made.counts["critic"] == 1
