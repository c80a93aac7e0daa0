"""The batch's standard deviation is that of the joint batch of all ranks."""

import pytest
import ranks
import torch

import gpkit
from gpkit.autodiff.distributed import batch_std

PARTS = (slice(3), slice(3, 8))  # ranks with other numbers of samples


def batch(dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    scale = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(8, 1, 1)
    x = torch.randn(8, 2, 3, generator=rng, dtype=torch.float64) * scale + 100
    return x.to(dtype)


def of_rank(rank):
    found = {dtype: batch_std(batch(dtype)[PARTS[rank]]) for dtype in DTYPES}
    x = batch()[PARTS[rank]].requires_grad_()
    at = gpkit.perturb(0.5, noise="uniform", relative=True)
    (z,) = at((x,), None, torch.Generator().manual_seed(rank))
    return found, (z - x).detach()


DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.ddp
def test_two_ranks_have_the_joint_deviation():
    # catches the deviation of each rank, their mean, and the weight of unequal ranks
    results = ranks.run(of_rank)
    true = batch().std(correction=0)
    for rank, (found, delta) in enumerate(results):
        assert found[torch.float64].item() == pytest.approx(true.item(), rel=1e-12)
        assert found[torch.float32].item() == pytest.approx(true.item(), rel=1e-6)
        assert found[torch.bfloat16].item() == pytest.approx(
            batch(torch.bfloat16).double().std(correction=0).item(), rel=1e-2
        )
        assert [t.dtype for t in found.values()] == list(DTYPES)
        rng = torch.Generator().manual_seed(rank)
        u = 2 * torch.rand(delta.shape, generator=rng, dtype=torch.float64) - 1
        torch.testing.assert_close(delta, 0.5 * true * u, rtol=1e-9, atol=1e-12)
    assert abs(batch()[PARTS[0]].std(correction=0) / true - 1) > 0.1  # a rank alone is wrong


def test_one_process():
    x = batch().requires_grad_()
    assert batch_std(x).item() == pytest.approx(x.std(correction=0).item(), rel=1e-12)
    assert not batch_std(x).requires_grad
    assert batch_std(torch.full((4, 2), 7.0)) == 0
