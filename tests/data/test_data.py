"""The data modules: splits, noise, statistics, loaders, columns, refusals."""

import inspect
import operator
import pickle
import sys

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from gpkit.app.overrides import CONFIG_DIR
from gpkit.data import (
    ArrayDataModule,
    BreastCancer,
    Diabetes,
    Digits,
    EightGaussians,
    Gaussian,
    HuggingFace,
    SwissRoll,
    TwentyFiveGaussians,
    TwoMoons,
)
from gpkit.data.decoders import Pictures
from gpkit.data.splits import split, split_sizes

MODULES = {
    Digits: ((1, 8, 8), 10, "classification", 1797),
    BreastCancer: ((30,), 2, "classification", 569),
    TwoMoons: ((2,), 2, "classification", 1000),
    Diabetes: ((10,), 1, "regression", 442),
    Gaussian: ((2,), 1, "classification", 25_000),
    EightGaussians: ((2,), 8, "classification", 25_000),
    TwentyFiveGaussians: ((2,), 25, "classification", 25_000),
    SwissRoll: ((2,), 1, "regression", 25_000),
}
modules = pytest.mark.parametrize("module", MODULES)


def ready(module, *args, **options):
    data = module(*args, **options)
    data.setup("fit")
    return data


def parts(data):
    """Return (x, y) of train, validation and test."""
    return [dataset.tensors for dataset in (data.train_set, data.val_set, data.test_set)]


def every(dataset):
    """Decode a whole data set."""
    x, y = zip(*(dataset[i] for i in range(len(dataset))), strict=True)
    return torch.stack(x), torch.stack(y)


# --- every data module ----------------------------------------------------------------------------


@modules
def test_attributes_and_batches(module):
    # catches float64 inputs, int32 labels, targets [B], and a last batch that is dropped
    shape, num_outputs, task, total = MODULES[module]
    data = ready(module, batch_size=50)
    assert (data.input_shape, data.num_outputs, data.task) == (shape, num_outputs, task)
    assert sum(len(x) for x, _ in parts(data)) == total
    batches = list(data.train_dataloader())
    assert sum(len(x) for x, _ in batches) == len(data.train_set)
    x, y = batches[0]
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
    for (x, y), (x_again, y_again), (x_other, _) in zip(first, second, other, strict=True):
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


def test_it_survives_pickling_and_a_spawned_process():
    # catches a generator among the attributes, which strategy=ddp_spawn cannot send
    data = ready(TwoMoons, n=100)
    twin = pickle.loads(pickle.dumps(data))
    orders = [torch.cat([x for x, _ in d.train_dataloader()]) for d in (data, twin)]
    assert torch.equal(*orders)
    torch.multiprocessing.start_processes(operator.is_, (data,), nprocs=1, start_method="spawn")


def test_loaders_are_plain_so_that_lightning_can_distribute_them():
    # catches a custom sampler, which Lightning does not replace by a distributed one
    data = ready(TwoMoons)
    samplers = {data.train_dataloader: RandomSampler, data.test_dataloader: SequentialSampler}
    for loader, sampler in ((make(), sampler) for make, sampler in samplers.items()):
        assert type(loader) is DataLoader
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


# --- splits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(700, 150, 150), (10, 3, 400), (997, 1, 2), (50, 0, 0)])
def test_splits_are_disjoint_exact_and_stratified(counts):
    # catches leaks from one part into another, and classes that are lost in a small part
    y = torch.tensor([0] * 500 + [1] * 300 + [2] * 190 + [3] * 10)
    drawn = split(y, counts, torch.Generator().manual_seed(0))
    assert tuple(len(i) for i in drawn) == counts
    assert len(torch.cat(drawn).unique()) == sum(counts)
    for indices in drawn:
        found = torch.bincount(y[indices], minlength=4)
        expected = torch.bincount(y) * len(indices) / len(y)
        assert (found - expected).abs().max() <= 1.5


def test_a_split_is_random_within_a_class():
    # catches a split that takes the first of each class
    drawn, *_ = split(torch.zeros(1000), (500, 0, 0), torch.Generator().manual_seed(0))
    assert 400 < drawn.double().mean() < 600
    assert not torch.equal(drawn, drawn.sort().values)


def test_digits_1000_0_797():
    # catches rounding, and samples that are lost or doubled: the parts are the data set
    data = ready(Digits, train_size=1000, val_size=0, test_size=797, flatten=True)
    (x, y), (x_val, _), (x_test, y_test) = parts(data)
    assert (len(x), len(x_val), len(x_test)) == (1000, 0, 797)
    images, labels = load_digits(return_X_y=True)
    rows = torch.cat([torch.cat([x, x_test]) * 16, torch.cat([y, y_test])[:, None]], 1)
    expected = np.column_stack([images, labels])
    assert sorted(rows.tolist()) == sorted(expected.tolist())
    expected = torch.bincount(torch.from_numpy(labels)) * 1000 / 1797
    assert (torch.bincount(y) - expected).abs().max() <= 1.5


def test_flat_digits_are_the_same_pixels():
    # catches a reshape that moves pixels
    square, flat = ready(Digits), ready(Digits, flatten=True)
    assert flat.input_shape == (64,)
    assert torch.equal(square.train_set.tensors[0].flatten(1), flat.train_set.tensors[0])
    assert square.train_set.tensors[0].max() == 1


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((None, 0.15, 0.15), (70, 15, 15)),
        ((0.7, 0.15, 0.15), (70, 15, 15)),
        ((0.29, 0.58, 0), (29, 58, 0)),
        ((50, 0, 0.5), (50, 0, 50)),
        ((1.0, 0, 0), (100, 0, 0)),
        ((1, 0, 0), (1, 0, 0)),
    ],
)
def test_sizes_are_counts_or_fractions(sizes, expected):
    # catches 0.29 * 100 = 28.999..., and 1 taken for 1.0
    assert split_sizes("Digits", 100, *sizes) == expected


# --- label noise ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3333, 1.0])
def test_noise_changes_the_chosen_training_labels_alone(p):
    # catches noise in test labels, a wrong count, and a split that depends on the noise
    clean, noisy = ready(Digits), ready(Digits, label_noise=p)
    (x, y), *rest = parts(clean)
    (x_noisy, y_noisy), *rest_noisy = parts(noisy)
    chosen = noisy.relabelled
    assert len(chosen.unique()) == len(chosen) == round(p * len(y))
    changed = (y != y_noisy).nonzero().squeeze(1)
    assert set(changed.tolist()) <= set(chosen.tolist())
    assert torch.equal(x, x_noisy)
    for pair, pair_noisy in zip(rest, rest_noisy, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, pair_noisy, strict=True))


def test_noise_is_uniform_over_all_ten_classes():
    # catches noise that always changes the label, and noise that depends on it
    (_, y), *_ = parts(ready(Digits))
    (_, noisy), *_ = parts(ready(Digits, label_noise=1.0))
    assert 0.06 < (y == noisy).double().mean() < 0.14  # a tenth keeps its label
    assert (torch.bincount(noisy, minlength=10) / len(noisy) - 0.1).abs().max() < 0.04


def test_noise_is_seeded_and_grows():
    # catches noise from the global random state, and levels that cannot be compared
    first, again = (ready(Digits, label_noise=0.2) for _ in range(2))
    more = ready(Digits, label_noise=0.4)
    other = ready(Digits, label_noise=0.2, seed=1)
    assert torch.equal(first.train_set.tensors[1], again.train_set.tensors[1])
    assert set(first.relabelled.tolist()) < set(more.relabelled.tolist())
    assert set(first.relabelled.tolist()) != set(other.relabelled.tolist())


# --- statistics -----------------------------------------------------------------------------------


def assert_standardised(raw, train, rest):
    """Check that one affine map, from the training values alone, made all parts out of `raw`."""
    torch.testing.assert_close(train.mean(0), torch.zeros(train.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(train.shape[1]))
    made = torch.cat([train, *rest]).double().sort(0).values
    raw = torch.as_tensor(raw).double().sort(0).values  # an increasing map keeps the order
    scale = (made[-1] - made[0]) / (raw[-1] - raw[0])
    torch.testing.assert_close(made, made[0] + (raw - raw[0]) * scale, atol=1e-4, rtol=0)
    for part in rest:
        assert (part.mean(0).abs() > 1e-4).all()


def test_breast_cancer_is_standardised_by_the_training_part():
    # catches statistics of the whole, which leak, and of each part, which are inconsistent
    (x, _), (x_val, _), (x_test, _) = parts(ready(BreastCancer))
    assert_standardised(load_breast_cancer().data, x, [x_val, x_test])


def test_diabetes_is_standardised_by_the_training_part():
    # the same, and for the target
    (x, y), (x_val, y_val), (x_test, y_test) = parts(ready(Diabetes))
    raw_x, raw_y = load_diabetes(return_X_y=True, scaled=False)
    assert_standardised(raw_x, x, [x_val, x_test])
    assert_standardised(raw_y[:, None], y, [y_val, y_test])


def test_a_seed_changes_the_moons_themselves():
    # catches points that are always the same, only cut in another way
    first, other = (torch.cat([x for x, _ in parts(ready(TwoMoons, seed=seed))]) for seed in (0, 1))
    assert not torch.equal(first.sort(0).values, other.sort(0).values)


def test_moons_without_noise_lie_on_their_circles():
    # catches labels that are not carried along with the points
    for x, y in parts(ready(TwoMoons, noise=0.0)):
        centre = torch.tensor([[0.0, 0.0], [1.0, 0.5]])[y]
        torch.testing.assert_close((x - centre).norm(dim=1), torch.ones(len(x)))


# --- the datasets library -------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Keep the library offline and its cache in the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def write_csv(path, rows=60):
    """Write columns a, b, name, label: the label says whether a is even."""
    lines = [f"{i},{1e6 + i / 2},n{i},{('even', 'odd')[i % 2]}" for i in range(rows)]
    path.write_text("\n".join(["a,b,name,label", *lines]))
    return str(path)


def write_images(folder, shade=lambda part, label, i: 20 * i, size=(6, 8), channels=3):
    """Write 10 images of each class, for train and test."""
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / part / label).mkdir(parents=True)
            for i in range(10):
                pixels = np.full((*size, channels), 0, dtype=np.uint8)
                pixels[0], pixels[1] = shade(part, label, i), 200 if label == "dog" else 100
                image = Image.fromarray(pixels.squeeze())
                image.save(folder / part / label / f"{i}.png")
    return str(folder)


def test_csv_with_string_labels(library, tmp_path):
    # catches classes in order of appearance, labels among the inputs, rows that lose their labels
    data = ready(HuggingFace, "csv", data_files=write_csv(tmp_path / "t.csv"), batch_size=7)
    assert (data.input_shape, data.num_outputs, data.task) == ((2,), 2, "classification")
    assert data.class_names == ["even", "odd"]
    x, y = next(iter(data.train_dataloader()))
    assert (x.dtype, x.shape, y.dtype, y.shape) == (torch.float32, (7, 2), torch.int64, (7,))
    raw = ready(HuggingFace, "csv", data_files=str(tmp_path / "t.csv"), normalise=False)
    for dataset in raw._sets:
        x, y = every(dataset)
        assert torch.equal(x[:, 0].long() % 2, y)


def test_missing_parts_are_cut_from_train(library, tmp_path):
    # catches parts that overlap, that are not stratified, or that ignore the seed
    path = write_csv(tmp_path / "t.csv")

    def cut(**options):
        data = ready(HuggingFace, "csv", data_files=path, normalise=False, **options)
        return [every(dataset) if len(dataset) else None for dataset in data._sets]

    train, val, test = cut(val_size=10, test_size=0.2)
    assert [len(y) for _, y in (train, val, test)] == [38, 10, 12]
    rows = torch.cat([x[:, 0] for x, _ in (train, val, test)])
    assert rows.sort().values.tolist() == list(range(60))
    assert [y.sum().item() for _, y in (train, val, test)] == [19, 5, 6]
    assert torch.equal(cut(val_size=10, test_size=0.2)[1][0], val[0])
    assert not torch.equal(cut(val_size=10, test_size=0.2, seed=1)[1][0], val[0])
    assert cut(val_size=0)[1] is None


def test_columns_are_standardised_by_the_training_part(library, tmp_path):
    # catches statistics of all rows, and cancellation in float32 where the offset is large
    data = ready(HuggingFace, "csv", data_files=write_csv(tmp_path / "t.csv"))
    x, x_val, x_test = (every(dataset)[0] for dataset in data._sets)
    raw = np.array([[i, 1e6 + i / 2] for i in range(60)])
    assert_standardised(raw, x, [x_val, x_test])


def test_a_float_target_is_a_regression(library, tmp_path):
    # catches targets [B], and a target among the inputs
    path = write_csv(tmp_path / "t.csv")
    data = ready(HuggingFace, "csv", data_files=path, target_key="b")
    assert (data.input_shape, data.num_outputs, data.task) == ((1,), 1, "regression")
    x, y = every(data._sets[0])
    assert y.dtype == torch.float32
    assert y.shape == (len(x), 1)
    torch.testing.assert_close(x, y, atol=1e-5, rtol=0)  # b is affine in a
    forced = ready(HuggingFace, "csv", data_files=path, target_key="a", task="regression")
    assert forced.task == "regression"


def test_parquet_with_named_parts_and_integer_labels(library, tmp_path):
    # catches labels 1..3 taken for indices, a class that only the test part has, and a part that is
    # there and is cut all the same
    files = {}
    for part, labels in {"train": [3, 1] * 10, "valid": [1] * 4, "test": [1, 2, 3]}.items():
        columns = {"vector": [[label, 0.5, -1.0] for label in labels], "y": labels}
        files[part] = str(tmp_path / f"{part}.parquet")
        library.Dataset.from_dict(columns).to_parquet(files[part])
    options = {"input_key": "vector", "normalise": False}
    data = ready(HuggingFace, "parquet", data_files=files, **options)
    assert [len(dataset) for dataset in data._sets] == [20, 4, 3]
    assert (data.input_shape, data.num_outputs, data.class_names) == ((3,), 3, ["1", "2", "3"])
    x, y = every(data._sets[2])
    assert y.tolist() == [0, 1, 2]
    assert x[:, 0].tolist() == [1, 2, 3]


def test_images_of_a_folder(library, tmp_path):
    # catches channels last, values outside [-1, 1], and images that lose their labels
    data = ready(HuggingFace, "imagefolder", data_dir=write_images(tmp_path / "i"), val_size=6)
    assert (data.input_shape, data.num_outputs, data.task) == ((3, 6, 8), 2, "classification")
    assert data.class_names == ["cat", "dog"]
    assert [len(dataset) for dataset in data._sets] == [14, 6, 20]
    x, y = every(data._sets[2])
    assert x.dtype == torch.float32
    level = torch.tensor([100.0, 200.0])[y] / 255 * 2 - 1
    torch.testing.assert_close(x[:, :, 1], level[:, None, None].expand(-1, 3, 8))
    assert sorted(x[y == 0, 0, 0, 0].tolist()) == pytest.approx(
        [2 * 20 * i / 255 - 1 for i in range(10)]
    )
    unit, _ = every(ready(HuggingFace, **data.source, normalise=False)._sets[2])
    torch.testing.assert_close(2 * unit - 1, x)


def test_images_are_decoded_when_they_are_needed(library, tmp_path, monkeypatch):
    # catches a setup that reads the whole data set into memory
    decoded = []
    pixels = Pictures.pixels
    monkeypatch.setattr(Pictures, "pixels", lambda *args: decoded.append(1) or pixels(*args))
    folder = write_images(tmp_path / "i")
    data = ready(HuggingFace, "imagefolder", data_dir=folder, batch_size=5)
    assert len(decoded) == 1  # for the shape
    next(iter(data.train_dataloader()))
    assert len(decoded) == 6


def test_image_size_and_grayscale(library, tmp_path):
    # catches height and width exchanged, and a mode that is not converted
    folder = write_images(tmp_path / "i")
    options = {"path": "imagefolder", "data_dir": folder}
    assert ready(HuggingFace, **options, image_size=[4, 10]).input_shape == (3, 4, 10)
    assert ready(HuggingFace, **options, image_size=5).input_shape == (3, 5, 5)
    assert ready(HuggingFace, **options, grayscale=True).input_shape == (1, 6, 8)
    gray = write_images(tmp_path / "g", channels=1)
    assert ready(HuggingFace, "imagefolder", data_dir=gray).input_shape == (1, 6, 8)
    assert ready(HuggingFace, "imagefolder", data_dir=gray, grayscale=False).input_shape[0] == 3


def test_sixteen_bit_images_keep_their_range():
    # catches PIL's conversion, which clips them at 255
    image = Image.fromarray(np.array([[0, 256 * 100, 65535]], dtype=np.uint16))
    decode = Pictures("image", "L", (1, 3), resize=False, centre=False)
    assert decode({"image": [image]}).flatten().tolist() == pytest.approx([0, 100 / 255, 1])


def test_images_of_two_sizes_are_refused(library, tmp_path):
    # catches a failure of torch.stack without a word on what to do
    folder = tmp_path / "i"
    write_images(folder)
    Image.new("RGB", (9, 9)).save(folder / "train" / "cat" / "odd.png")
    data = ready(HuggingFace, "imagefolder", data_dir=str(folder), val_size=0, batch_size=50)
    with pytest.raises(ValueError, match=r"needs pictures of one size; got .*: set image_size=\["):
        next(iter(data.train_dataloader()))
    assert len(ready(HuggingFace, **data.source, image_size=6)._sets[0]) == 18


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_key": "lable"}, r"target_key=.*got 'lable' \(did you mean 'label'\?\)"),
        ({"input_key": ["a", "nam"]}, r"input_key=.*did you mean 'name'"),
        ({"input_key": ["a", "label"]}, r"input_key=.* one of 'a', 'b', 'name'; got 'label'"),
        ({"input_key": "name"}, r"`HuggingFace\(input_key='name'\)` must be one image column"),
        ({"train_split": "trian"}, r"train_split=.*did you mean 'train'"),
        ({"val_split": "tset"}, r"`HuggingFace\(val_split=.*got 'tset'"),
        ({"task": "regression"}, r"that fits the task; got .*or task='classification'"),
        ({"target_key": "a"}, r"needs a column of few values; got 60 in 60 rows: set task"),
        ({"val_size": 60}, r"`HuggingFace\(.*val_size=60.*the 60 samples there are"),
    ],
)
def test_options_that_do_not_fit_the_columns_are_refused(library, tmp_path, options, words):
    # catches a silent choice of another column or part than the one that was asked for
    data = HuggingFace("csv", data_files=write_csv(tmp_path / "t.csv"), **options)
    with pytest.raises(ValueError, match=words) as error:
        data.setup("fit")
    assert "\n" not in str(error.value)


def test_columns_that_cannot_be_guessed_are_refused(library, tmp_path):
    # catches a guess where there is no ground for one
    (tmp_path / "t.csv").write_text("a,b\n1,x\n2,y\n3,x\n4,y\n5,x\n6,y\n7,x\n8,y\n")
    path = str(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=r"target_key=None.* found neither .*set .*one of a, b"):
        ready(HuggingFace, "csv", data_files=path)
    (tmp_path / "s.csv").write_text("a,y\nu,1\nv,0\nw,1\nz,0\n")
    with pytest.raises(
        ValueError, match=r"input_key=None.* must be .*choose from a: .*string, y: int64"
    ):
        ready(HuggingFace, "csv", data_files=str(tmp_path / "s.csv"))


def test_missing_values_are_refused(library, tmp_path):
    # catches inputs that are not numbers, and rows without a label taken for a class
    (tmp_path / "x.csv").write_text("a,b,label\n1,1,u\n2,,v\n" + "3,3,u\n4,4,v\n" * 5)
    options = {"val_size": 0, "test_size": 0}
    with pytest.raises(ValueError, match="number in every row; column 'b' has a missing"):
        ready(HuggingFace, "csv", data_files=str(tmp_path / "x.csv"), **options)
    (tmp_path / "y.csv").write_text("a,label\n1,u\n2,\n" + "3,u\n4,v\n" * 5)
    with pytest.raises(ValueError, match="label in every row, but some have none"):
        ready(HuggingFace, "csv", data_files=str(tmp_path / "y.csv"), **options)
    names = library.Features(a=library.Value("float32"), label=library.ClassLabel(names=["u", "v"]))
    table = library.Dataset.from_dict({"a": [0.0] * 4, "label": [0, 1, -1, 0]}, features=names)
    table.to_parquet(str(tmp_path / "z.parquet"))
    with pytest.raises(ValueError, match="label in every row, but some have none"):
        ready(HuggingFace, "parquet", data_files=str(tmp_path / "z.parquet"), **options)


def test_a_missing_library_says_what_to_install(monkeypatch):
    # catches an import at the top, and an error in the middle of a run
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"^`HuggingFace` .* pip install 'gpkit\[data\]'$"
    ):
        HuggingFace("csv")


# --- refusals -------------------------------------------------------------------------------------


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
    if module is HuggingFace:
        assert config.pop("path") == "???"
        assert options.pop("path")
    assert config == options
