"""What a release of torch must have, or a test says what goes wrong without it."""

import torch
import torch.nn.functional as F


def require(there, entry, without):
    """Fail with the entry, the release, and what goes wrong."""
    assert there, f"compat.{entry} is not as it was in torch {torch.__version__}: {without}"


def attention():
    """Return a function of attention with one weight, and points."""
    torch.manual_seed(0)
    weight = torch.randn(4, 4).double().requires_grad_()

    def score(x):
        h = x @ weight
        return F.scaled_dot_product_attention(h, h, x).square().sum((1, 2))

    return score, weight, torch.randn(2, 3, 4).double()
