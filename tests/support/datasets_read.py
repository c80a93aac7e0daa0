"""Data modules that are set up, and all that they hold."""

import torch


def ready(module, *args, **options):
    data = module(*args, **options)
    data.setup("fit")
    return data


def parts(data):
    """Return (x, y) of train, validation and test."""
    return [dataset.tensors for dataset in (data.train_set, data.val_set, data.test_set)]


def loaded(data):
    """Return all (x, y) that the loaders of train, validation and test give; None for no loader."""
    loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    return [
        tuple(map(torch.cat, zip(*loader, strict=True))) if loader else None for loader in loaders
    ]


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
