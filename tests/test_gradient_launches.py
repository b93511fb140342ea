"""What the gradient of `log_prob` in a network's parameters launches on a GPU, and that nothing crosses or waits.

The device is pretended, and a kernel counts as one launch (`counted_kernels.py`): numbers do not matter here.
"""

import pytest
import torch
from counted_kernels import counted_kernels  # noqa: F401
from pretended_device import PretendedDevice
from real_networks import MARHead

import fastscore as fs

pytestmark = pytest.mark.filterwarnings("ignore")
DEPTH = 2


@pytest.fixture
def device():
    with PretendedDevice() as pretended:
        yield pretended


def launches(device, groups, of_x):
    """Return the counts of a repeated forward and backward pass for samples of so many groups."""
    torch.manual_seed(0)
    density = fs.ScoreDensity(MARHead(16, 16, DEPTH).eval().cuda(), fs.VP(), "eps", backend="triton")
    x = torch.randn(2 * groups, 16).cuda().requires_grad_(of_x)
    index = 64 * torch.arange(2 * groups).div(2, rounding_mode="floor") + torch.arange(2 * groups) % 2
    for _ in range(2):
        density.log_prob(x, nfe=8, sample_index=index).sum().backward()
    with device.counting() as forward:
        total = density.log_prob(x, nfe=8, sample_index=index).sum()
    with device.counting() as backward:
        total.backward()
    return forward, backward


@pytest.mark.parametrize("of_x", [False, True])
def test_nothing_crosses_or_waits_and_a_group_takes_few_launches_more(device, counted_kernels, of_x):  # noqa: F811
    few, many = (launches(device, groups, of_x) for groups in (2, 6))
    for counts in (*few, *many):
        assert (counts.crossings, counts.waits) == (0, 0)
    forward, backward = ((more.launches - less.launches) / 4 for less, more in zip(few, many, strict=True))
    # Forward: weights and vectors laid out in three, the reference's table and the rows' numbers in eight, the rest for
    # the samples' rows, keys and sums.
    assert forward <= 18
    # Backward: three to lay out weights and vectors, the kernel, the product of all layers and the sum of its parts,
    # and the sum over the rows of what all of them share. That of each of the 6 weights, and of 4 vectors that all rows
    # share, is added to the other groups'. Where x wants one: the reference's table, a sum, and the cut of x.
    assert backward <= 7 + 6 + 4 + (16 if of_x else 0)
