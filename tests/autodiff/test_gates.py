"""What tells gpkit the pieces that a graph is on is there in this release of torch."""

import torch
import torch.nn.functional as F
from releases import require
from torch.utils.checkpoint import checkpoint

from gpkit.autodiff import compat

PLAIN = (
    "finite differences of nets with kinks get spikes of size 1/h, as if nothing held their units"
)


def test_saved():
    x = torch.randn(2, 3, 8, requires_grad=True)
    values = {
        "indices": x.max(1)[0],
        "dim": x.amax(1),
        "condition": torch.where(x > 0, x, -x),
        "mask": x.masked_fill(x < 0, 0.0),
        "self": F.elu(x),
        "result1": F.max_pool2d(x[None], 2),
    }
    for name, y in values.items():
        require(compat.saved(y.grad_fn, name) is not None, "saved", PLAIN)
    assert compat.saved(x.relu().grad_fn, "no such thing") is None


def test_packs_saved():
    x = torch.randn(3, requires_grad=True)
    packed = checkpoint(torch.relu, x, use_reentrant=False)
    assert compat.packs_saved(packed.grad_fn)
    require(not compat.packs_saved(x.relu().grad_fn), "packs_saved", "max pooling is not held")
