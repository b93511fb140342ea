"""Levels of transformed data are those of the network, where the transform keeps them equidistant."""

import pytest
import torch
from analytic import ExactNet, Target
from torch.distributions import AffineTransform
from transformed_densities import COUNT, MEAN, SHAPE, STD, TRANSFORMS, core, through

import fastscore as fs
from fastscore.transforms import Logit, zscore

pytestmark = pytest.mark.usefixtures("one_thread")


def levels_of(count=COUNT, bins=16):
    return torch.randint(bins, (count, *SHAPE), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("transforms", [TRANSFORMS["zscore"], [zscore(0.25, 0.25), AffineTransform(0.0, 2.0)]])
def test_levels_are_those_of_the_network(transforms):
    k, levels = levels_of(), fs.Levels(16, 0.0, 1.0)
    found = fs.discrete_log_prob(through(core(), transforms), k, levels, nfe=16)
    expected = fs.discrete_log_prob(core(), k, fs.Levels(16, -1.0, 1.0), nfe=16)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=1e-4)  # float32 sums of about 30 nats
    assert float(found.truncation) == 0


def test_levels_turn_round_with_a_negative_scale():
    k, levels = levels_of(), fs.Levels(16, -1.0, 1.0)
    found = fs.discrete_log_prob(fs.Transformed(core(), AffineTransform(0.0, -1.0)), k, levels, nfe=16)
    expected = fs.discrete_log_prob(core(), 15 - k, levels, nfe=16)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=0, atol=1e-4)


def test_levels_of_elements_with_scales_of_their_own():
    """A Gaussian of independent elements, its own reference: the bound is the sum of those of one element each."""
    variance, k, levels = torch.tensor([0.2, 1.0, 3.0, 0.5]).double(), levels_of(), fs.Levels(16, 0.0, 15.0)

    def gaussian(own):
        target = Target(torch.ones(1), torch.zeros(1, len(own)), torch.diag(own)[None])
        reference = fs.Reference(torch.ones(1), torch.zeros(1, len(own)), own[None])
        return fs.ScoreDensity(
            ExactNet(target, fs.LogSNR(-8, 8)), fs.LogSNR(-8, 8), "eps", reference=reference, program=False
        )

    found = fs.discrete_log_prob(fs.Transformed(gaussian(variance), zscore(MEAN, STD)), k, levels, nfe=16)
    total = 0.0
    for i, (mean, std) in enumerate(zip(MEAN.flatten().double(), STD.flatten().double())):
        ends = float((0 - mean) / std), float((15 - mean) / std)
        alone, own_k = gaussian(variance[i : i + 1]), k.flatten(1)[:, i : i + 1]
        own = fs.discrete_log_prob(alone, own_k, fs.Levels(16, *ends), nfe=16)
        total = total + own.log_prob
    # float32 values of size up to 150 / 0.2, of a log-probability of up to 1e5 nats at the far levels.
    torch.testing.assert_close(found.log_prob, total, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("kind", ["logit", "whitening", "composed"])
def test_levels_that_are_not_equidistant_are_refused(kind):
    low, high = {"logit": (1.0, 254.0), "whitening": (0.0, 1.0), "composed": (0.0, 4.0)}[kind]
    with pytest.raises(ValueError, match=r"equidistant for the network.*dequantize them"):
        fs.discrete_log_prob(through(core(), TRANSFORMS[kind]), levels_of(), fs.Levels(16, low, high), nfe=16)
    with pytest.raises(ValueError, match=r"inside the range of Logit|no value for some of the levels"):
        fs.discrete_log_prob(fs.Transformed(core(), Logit(0, 1)), levels_of() // 16 + 1, fs.Levels(16, 0, 1), nfe=16)
