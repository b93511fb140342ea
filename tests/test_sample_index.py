"""A sample index is any integer from 0 on, of any dtype."""

import numpy as np
import pytest
import torch
from analytic import ExactNet, mixture

import fastscore as fs


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_an_index_of_any_integers_is_the_same_index(dtype):
    """Torch reckons little with the larger unsigned integers: they ended in its own error."""
    density, x = fs.ScoreDensity(ExactNet(mixture(3), fs.VP()), fs.VP(), "eps"), torch.randn(5, 3)
    index = torch.tensor([3, 1, 200, 0, 7])
    found = density.estimate(x, nfe=16, sample_index=index.to(dtype))
    assert torch.equal(found.log_prob, density.estimate(x, nfe=16, sample_index=index).log_prob)


def test_an_index_beyond_what_int64_holds_is_refused():
    density = fs.ScoreDensity(ExactNet(mixture(3), fs.VP()), fs.VP(), "eps")
    beyond = torch.from_numpy(np.array([0, 2**64 - 1], dtype=np.uint64))
    with pytest.raises(ValueError, match=r"sample_index must be 2 non-negative integers below 2\^60"):
        density.estimate(torch.randn(2, 3), nfe=16, sample_index=beyond)
