"""The datasets library: columns, parts, labels, images, and what is refused; all offline."""

import sys

import numpy as np
import pytest
import torch
from datasets_read import assert_standardised, loaded, ready
from PIL import Image

from gpkit.data import (
    HuggingFace,
)
from gpkit.data.decoders import Pictures


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
    for x, y in loaded(raw):
        assert torch.equal(x[:, 0].long() % 2, y)


def test_missing_parts_are_cut_from_train(library, tmp_path):
    # catches parts that overlap, that are not stratified, or that ignore the seed
    path = write_csv(tmp_path / "t.csv")

    def cut(**options):
        return loaded(ready(HuggingFace, "csv", data_files=path, normalise=False, **options))

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
    x, x_val, x_test = (x for x, _ in loaded(data))
    raw = np.array([[i, 1e6 + i / 2] for i in range(60)])
    assert_standardised(raw, x, [x_val, x_test])


def test_a_float_target_is_a_regression(library, tmp_path):
    # catches targets [B], and a target among the inputs
    path = write_csv(tmp_path / "t.csv")
    data = ready(HuggingFace, "csv", data_files=path, target_key="b")
    assert (data.input_shape, data.num_outputs, data.task) == ((1,), 1, "regression")
    x, y = loaded(data)[0]
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
    found = loaded(data)
    assert [len(y) for _, y in found] == [20, 4, 3]
    assert (data.input_shape, data.num_outputs, data.class_names) == ((3,), 3, ["1", "2", "3"])
    x, y = found[2]
    assert y.tolist() == [0, 1, 2]
    assert x[:, 0].tolist() == [1, 2, 3]


def test_images_of_a_folder(library, tmp_path):
    # catches channels last, values outside [-1, 1], and images that lose their labels
    data = ready(HuggingFace, "imagefolder", data_dir=write_images(tmp_path / "i"), val_size=6)
    assert (data.input_shape, data.num_outputs, data.task) == ((3, 6, 8), 2, "classification")
    assert data.class_names == ["cat", "dog"]
    found = loaded(data)
    assert [len(y) for _, y in found] == [14, 6, 20]
    x, y = found[2]
    assert x.dtype == torch.float32
    level = torch.tensor([100.0, 200.0])[y] / 255 * 2 - 1
    torch.testing.assert_close(x[:, :, 1], level[:, None, None].expand(-1, 3, 8))
    assert sorted(x[y == 0, 0, 0, 0].tolist()) == pytest.approx(
        [2 * 20 * i / 255 - 1 for i in range(10)]
    )
    unit, _ = loaded(ready(HuggingFace, **data.source, normalise=False))[2]
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
    resized = ready(HuggingFace, **data.source, image_size=6)
    assert len(loaded(resized)[0][0]) == 18


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
        ModuleNotFoundError, match=r"^`HuggingFace` .* pip install 'gradpen\[data\]'$"
    ):
        HuggingFace("csv")
