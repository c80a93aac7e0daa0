"""Every data module: batches, seeds, order, loaders, options, configs."""

import inspect
import pickle

import numpy as np
import pytest
import ranks
import torch
from datasets_read import parts, ready
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from gpkit.app.overrides import CONFIG_DIR
from gpkit.data import (
    ArrayDataModule,
    BreastCancer,
    CirclePoints,
    ColoredDigits,
    Diabetes,
    Digits,
    EightGaussians,
    Gaussian,
    HuggingFace,
    NoisyCurve,
    SwissRoll,
    TwentyFiveGaussians,
    TwoMoons,
)

MODULES = {
    Digits: ((1, 8, 8), 10, "classification", 1797),
    BreastCancer: ((30,), 2, "classification", 569),
    TwoMoons: ((2,), 2, "classification", 1000),
    Diabetes: ((10,), 1, "regression", 442),
    Gaussian: ((2,), 1, "classification", 25_000),
    EightGaussians: ((2,), 8, "classification", 25_000),
    TwentyFiveGaussians: ((2,), 25, "classification", 25_000),
    SwissRoll: ((2,), 1, "regression", 25_000),
    CirclePoints: ((2,), 1, "regression", 25_000),
    NoisyCurve: ((1,), 1, "regression", 256),
    ColoredDigits: ((2, 8, 8), 2, "classification", 1259 * 8 + 2 * 269),
}

modules = pytest.mark.parametrize("module", MODULES)


@modules
def test_attributes_and_batches(module):
    # catches float64 inputs, int32 labels, targets [B], and a last batch that is dropped
    shape, num_outputs, task, total = MODULES[module]
    data = ready(module, batch_size=50)
    assert (data.input_shape, data.num_outputs, data.task) == (shape, num_outputs, task)
    assert sum(len(x) for x, *_ in parts(data)) == total
    batches = list(data.train_dataloader())
    assert sum(len(x) for x, *_ in batches) == len(data.train_set)
    x, y, *_ = batches[0]
    assert (x.dtype, x.shape) == (torch.float32, (50, *shape))
    classification = task == "classification"
    assert y.dtype == (torch.int64 if classification else torch.float32)
    assert y.shape == ((50,) if classification else (50, 1))


@modules
def test_a_seed_fixes_the_data_and_another_changes_it(module):
    # catches a split that ignores the seed, and a global random state that is used or moved
    torch.manual_seed(1)
    np.random.seed(1)
    first = parts(ready(module, seed=3))
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.get_rng_state()
    second, other = parts(ready(module, seed=3)), parts(ready(module, seed=4))
    assert torch.equal(torch.get_rng_state(), before)
    for (x, y, *_), (x_again, y_again, *_), (x_other, *_) in zip(first, second, other, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
        assert not torch.equal(x, x_other)


def test_the_order_is_shuffled_and_seeded():
    # catches an order that ignores the seed, is the same each epoch, or differs from fit to fit
    def epochs(data, count=2):
        loader = data.train_dataloader()
        return [torch.cat([x for x, _ in loader]) for _ in range(count)]

    data = ready(TwoMoons, seed=3)
    first, second = epochs(data)
    assert not torch.equal(first, second)
    assert not torch.equal(first, data.train_set.tensors[0])
    assert torch.equal(first.sort(0).values, data.train_set.tensors[0].sort(0).values)
    assert torch.equal(first, epochs(ready(TwoMoons, seed=3))[0])
    data.setup("fit")
    assert torch.equal(first, epochs(data)[0])
    assert torch.equal(torch.cat([x for x, _ in data.val_dataloader()]), data.val_set.tensors[0])


def test_a_checkpoint_goes_on_with_the_order():
    # catches a run that, once resumed, sees the first epoch's batches again
    data = ready(TwoMoons)
    loader = data.train_dataloader()
    torch.cat([x for x, _ in loader])
    state = pickle.loads(pickle.dumps(data.state_dict()))
    second = torch.cat([x for x, _ in loader])
    resumed = ready(TwoMoons)
    resumed.load_state_dict(state)
    assert torch.equal(torch.cat([x for x, _ in resumed.train_dataloader()]), second)


def in_order(rank, data):
    return torch.cat([x for x, _ in data.train_dataloader()])


@pytest.mark.ddp
def test_it_survives_pickling_and_a_spawned_process():
    # catches a generator among the attributes, which strategy=ddp_spawn cannot send
    data = ready(TwoMoons, n=100)
    twin = pickle.loads(pickle.dumps(data))
    orders = [in_order(None, d) for d in (data, twin)]
    assert torch.equal(*orders)
    for order in ranks.run(in_order, twin):
        assert not torch.equal(order, orders[0])  # the second epoch
        assert torch.equal(order.sort(0).values, orders[0].sort(0).values)


def test_loaders_are_plain_so_that_lightning_can_distribute_them():
    # catches a custom sampler, which Lightning does not replace by a distributed one
    data = ready(TwoMoons)
    samplers = {data.train_dataloader: RandomSampler, data.test_dataloader: SequentialSampler}
    for loader, sampler in ((make(), sampler) for make, sampler in samplers.items()):
        assert isinstance(loader, DataLoader)
        assert type(loader.batch_sampler) is BatchSampler
        assert type(loader.sampler) is sampler
        assert not loader.drop_last
        assert not loader.persistent_workers
        assert not loader.pin_memory


def test_loaders_go_by_the_machine(monkeypatch):
    # catches workers that are started anew each epoch, and slow copies to a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loader = ready(TwoMoons, num_workers=1).train_dataloader()
    assert loader.pin_memory
    assert loader.persistent_workers
    assert loader.num_workers == 1


def test_an_empty_part_has_no_loader():
    # catches an empty loader, over which a mean is not a number
    data = ready(TwoMoons, val_size=0, test_size=0)
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []
    assert len(data.train_set) == 1000


def test_setup_loads_once(monkeypatch):
    # catches data that is loaded again by each stage
    data = ready(TwoMoons)
    monkeypatch.setattr(data, "arrays", None)
    data.setup("fit")
    data.setup("test")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Digits(batch_size=0), r"`Digits\(batch_size=.* must be an integer >= 1; got 0"),
        (lambda: Diabetes(batch_size=2.5), r"`Diabetes\(batch_size=.*got 2\.5"),
        (lambda: TwoMoons(num_workers=-1), r"`TwoMoons\(num_workers=.*got -1"),
        (lambda: BreastCancer(seed="x"), r"`BreastCancer\(seed=.*got 'x'"),
        (
            lambda: Digits(label_noise=1.5),
            r"`Digits\(label_noise=1\.5\)` must lie in \[0, 1\]; use",
        ),
        (lambda: Digits(label_noise=-0.1), r"`Digits\(label_noise=.*got -0\.1"),
        (lambda: TwoMoons(n=1), r"`TwoMoons\(n=.* >= 2; got 1"),
        (lambda: TwoMoons(noise=-1), r"`TwoMoons\(noise=.*got -1"),
        (lambda: EightGaussians(n=7), r"`EightGaussians\(n=.* >= 8; got 7"),
        (lambda: TwentyFiveGaussians(noise="x"), r"`TwentyFiveGaussians\(noise=.*got 'x'"),
        (lambda: SwissRoll(n=1), r"`SwissRoll\(n=.* >= 2; got 1"),
        (lambda: SwissRoll(noise=-1), r"`SwissRoll\(noise=.*got -1"),
        (lambda: CirclePoints(radius=0), r"`CirclePoints\(radius=.* > 0; got 0"),
        (lambda: NoisyCurve(degree=-1), r"`NoisyCurve\(degree=.*got -1"),
        (lambda: NoisyCurve(passes=0), r"`NoisyCurve\(passes=.*got 0"),
        (lambda: ColoredDigits(agreement=[0.8, 1.2]), r"`ColoredDigits\(agreement=1\.2\)` must"),
        (lambda: HuggingFace("csv", batch_size=0), r"`HuggingFace\(batch_size=.*got 0"),
        (lambda: HuggingFace("csv", task="regress"), r"task=.*did you mean 'regression'"),
        (lambda: HuggingFace("csv", image_size=[1, 2, 3]), r"image_size=\[1, 2, 3\].* a height"),
        (lambda: HuggingFace("csv", image_size=0), r"`HuggingFace\(image_size=0\)` must be a side"),
        (
            lambda: ready(Digits, train_size=1500, val_size=0, test_size=797),
            r"`Digits\(train_size=1500, val_size=0, test_size=797\)` .* the 1797 samples there are",
        ),
        (lambda: ready(TwoMoons, val_size=0.5, test_size=0.5), r"1000 samples .*0 \+ 500 \+ 500"),
        (lambda: ready(TwoMoons, train_size=0), r"`TwoMoons\(train_size=0,.*one or more to train"),
        (lambda: ready(TwoMoons, test_size=1.5), r"`TwoMoons\(test_size=1\.5\)` must be a count"),
        (lambda: ready(TwoMoons, val_size=-3), r"`TwoMoons\(val_size=-3\)` must be a count"),
        (lambda: ready(TwoMoons, val_size=None), r"`TwoMoons\(val_size=None\)` must be a count"),
    ],
)
def test_wrong_options_are_refused(make, words):
    # catches a value that would fail later with another library's words, or not at all
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_loaders_before_setup_are_refused():
    # catches an attribute error that names an internal
    with pytest.raises(RuntimeError, match=r'`Digits` must be set up .* call `setup\("fit"\)`'):
        Digits().train_dataloader()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("digits", Digits),
        ("breast_cancer", BreastCancer),
        ("two_moons", TwoMoons),
        ("eight_gaussians", EightGaussians),
        ("twenty_five_gaussians", TwentyFiveGaussians),
        ("swiss_roll", SwissRoll),
        ("circle_points", CirclePoints),
        ("noisy_curve", NoisyCurve),
        ("colored_digits", ColoredDigits),
        ("diabetes", Diabetes),
        ("huggingface", HuggingFace),
    ],
)
def test_config_spells_out_the_defaults(name, module):
    # catches a default that is changed in one of the two places, and an option without a line
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = OmegaConf.to_container(compose("train", [f"data={name}"]).data)
    assert config.pop("_target_") == f"gpkit.data.{module.__name__}"
    assert config.pop("seed") == "${seed}"
    config.pop("_convert_", None)
    own = {p.name: p.default for p in inspect.signature(module).parameters.values()}
    options = {**ArrayDataModule.__init__.__kwdefaults__, **own} if own.pop("options", 0) else own
    assert options.pop("seed") == 0
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    if module is HuggingFace:
        assert config.pop("path") == "???"
        assert options.pop("path")
    assert config == options


def test_a_batch_at_once_is_the_batch_of_its_samples():
    # catches rows in another order, and a batch that is no list, as Lightning moves it
    data = ready(ColoredDigits, batch_size=7)
    loader = data.test_dataloader()
    one, other = next(iter(loader)), loader.collate_fn([data.test_set[i] for i in range(7)])
    assert type(one) is type(other) is list
    assert all(map(torch.equal, one, other))


def test_an_epoch_of_several_passes_has_the_whole_set_in_every_batch():
    # catches a sample that is drawn twice in a pass, as sampling with replacement does
    loader = ready(NoisyCurve, train_size=64, batch_size=64, passes=3).train_dataloader()
    xs = [x.sort(0).values for x, _ in loader]
    assert len(xs) == len(loader) == 3
    assert torch.equal(xs[0], xs[1])
    assert torch.equal(xs[0], xs[2])


def test_the_polynomial_is_the_least_squares_fit():
    # catches a fit of the noiseless function, and of the test points; the oracle: normal equations
    data = ready(NoisyCurve, degree=2, noise=0.5)
    (x, y), _, (x_test, y_test) = parts(data)
    powers = torch.arange(3)
    design = x.double() ** powers
    solved = torch.linalg.solve(design.T @ design, design.T @ y.double())
    torch.testing.assert_close((x_test.double() ** powers @ solved).float(), y_test)


def test_colours_agree_as_often_as_they_should_and_labels_are_flipped():
    # catches a colour that follows the digit instead of the label, and environments that are mixed
    data = ready(ColoredDigits, train_size=1297, val_size=0, test_size=500, agreement=[0.7, 0.95])
    clean = ready(Digits, train_size=1297, val_size=0, test_size=500)
    (x, y, env), _, (x_test, y_test, env_test) = parts(data)
    for images in (x, x_test):
        assert ((images.flatten(2) != 0).any(2).sum(1) == 1).all()  # one colour each
    agrees = (x[:, 1].flatten(1).any(1) == y).float()
    for e, share in enumerate((0.7, 0.95)):
        assert agrees[env == e].mean().item() == pytest.approx(share, abs=0.02)
    at_test = (x_test[:, 1].flatten(1).any(1) == y_test).float().mean().item()
    assert at_test == pytest.approx(0.1, abs=0.04)
    assert set(env_test.tolist()) == {2}
    (shown, digit), *_ = parts(clean)  # the same split, of the same seed
    assert torch.equal(x.sum(1)[:1297], shown[:, 0])
    below = (digit < 5).repeat(8)
    assert (y != below).float().mean().item() == pytest.approx(0.25, abs=0.02)
    copies = y.reshape(8, 1297)
    assert 0 < (copies[0] != copies[1]).float().mean() < 0.5  # flips of their own


def test_the_oracle_sees_no_colour():
    (x, *_), *_ = parts(ready(ColoredDigits, grey=True))
    assert torch.equal(x[:, 0], x[:, 1])
