"""Every kind of batch and loader: the callback trains as a penalty by hand."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from twin import DATA, KINDS, Twin, X, Y, assert_trained_as_by_hand


def stacked(rows):
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


def collated(make):
    """Return a form whose batches are made of x and y by a function, and how to read them."""

    def train_dataloader(self):
        return DataLoader(DATA, batch_size=8, collate_fn=lambda rows: make(*stacked(rows)))

    return train_dataloader


Named = namedtuple("Named", "x y")


@dataclass
class Data:
    x: torch.Tensor
    y: torch.Tensor


class Own:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, *args, **kwargs):
        return Own(self.x.to(*args, **kwargs), self.y.to(*args, **kwargs))


class Rows(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def attributes(batch):
    return batch.x, batch.y


BATCHES = {
    "list": (lambda x, y: [x, y], tuple),
    "dict": (lambda x, y: {"name": ["s"] * 8, "x": x, "y": y}, lambda b: (b["x"], b["y"])),
    "a mapping": (lambda x, y: UserDict(x=x, y=y), lambda b: (b["x"], b["y"])),
    "a named tuple": (Named, attributes),
    "a dataclass": (Data, attributes),
    "an object": (Own, attributes),
    "nested": (
        lambda x, y: {"none": None, "a": ({"x": x}, y, None, "s")},
        lambda b: (b["a"][0]["x"], b["a"][1]),
    ),
}


@pytest.mark.parametrize(("where", "estimator"), KINDS)
@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch(kind, where, estimator):
    make, read = BATCHES[kind]

    class Form(Twin):
        train_dataloader = collated(make)

        def pair(self, batch):
            return read(batch)

    assert_trained_as_by_hand(Form, where, estimator)


class OneTensor(Twin):
    def pair(self, batch):
        return batch, None

    def criterion(self, scores, y):
        return scores.square().mean(1).mean()

    def train_dataloader(self):
        return DataLoader(X, batch_size=8)


class TwoLoaders(Twin):
    def pair(self, batch):
        return tuple(torch.cat(pair) for pair in zip(batch["a"], batch["b"], strict=True))

    def train_dataloader(self):
        return {"a": DataLoader(DATA, batch_size=4), "b": DataLoader(DATA, batch_size=4)}


class Iterates(Twin):
    def train_dataloader(self):
        return DataLoader(Rows(), batch_size=8)


class Batches:
    def __iter__(self):
        return iter(zip(X.split(8), Y.split(8), strict=True))

    def __len__(self):
        return 3


class AnyIterable(Twin):
    def train_dataloader(self):
        return Batches()


@pytest.mark.parametrize(("where", "estimator"), KINDS)
@pytest.mark.parametrize("form", [OneTensor, TwoLoaders, Iterates, AnyIterable])
def test_a_loader(form, where, estimator):
    assert_trained_as_by_hand(form, where, estimator)
