"""Sums and error bars on integrands that are known."""

import math

import pytest
import torch

import fastscore as fs
from fastscore.estimate import (
    Curve,
    CurveSum,
    Estimate,
    discretization_bound,
    draw_sum,
    draw_variance,
    truncation_bound,
)
from fastscore.nodes import NodeDensity, make_rule

RULE = make_rule(NodeDensity.uniform(-10, 10), 200, fs.LogSNR(-10, 10))


def noisy(count, spread, seed=0):
    """A smooth course over log-SNR plus independent noise of a known standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return 50 * torch.sigmoid(RULE.log_snr) + spread * torch.randn(count, 200, generator=generator)


def test_sum_and_its_variance():
    f = noisy(4000, 2.0)
    exact = -0.5 * float((RULE.weight * 50 * torch.sigmoid(RULE.log_snr)).sum())
    sums, variance = draw_sum(f, RULE), draw_variance(f, RULE)
    expected = (0.5 * 2.0) ** 2 * float(RULE.weight.square().sum())
    assert float(sums.mean()) == pytest.approx(exact, abs=4 * math.sqrt(expected / 4000))
    # The smooth course adds its own successive differences, 50^2 / 6 x 0.1 / (2 x 199 x 4) = 2.6 %: conservative.
    # Student's t with 2/3 of 200 degrees of freedom adds 2 x 1.21 / 133 = 1.8 %.
    assert float(variance.mean()) == pytest.approx(1.026 * 1.018 * expected, rel=0.01)
    assert float(sums.var()) == pytest.approx(expected, rel=0.1)
    covered = (sums - exact).abs() < 1.96 * variance.sqrt()
    assert float(covered.double().mean()) == pytest.approx(0.95, abs=0.015)


def estimate(log_prob, stderr=0.5, dims=10):
    log_prob = torch.as_tensor(log_prob)
    curve = Curve(RULE.log_snr, torch.zeros(200), torch.zeros(200))
    return Estimate(
        log_prob,
        torch.full_like(log_prob, stderr),
        torch.full((len(log_prob),), 64),
        curve,
        0.0,
        0.0,
        dims,
        "density",
        "sobol",
    )


def test_bits_per_dim_of_a_uniform_density():
    # Uniform over [-1, 1)^10 has density 2^-10, hence exactly 8 bits for each of 256 levels, in every scaling.
    assert float(estimate([-10 * math.log(2)]).bits_per_dim(256)) == pytest.approx(8, rel=1e-6)
    assert float(estimate([0.0]).bits_per_dim(256, 0.0, 1.0)) == pytest.approx(8, rel=1e-6)
    assert float(estimate([-10 * math.log(255)]).bits_per_dim(256, -0.5, 255.5)) == pytest.approx(
        math.log2(255 * 256 / 256), rel=1e-6
    )
    assert float(estimate([-10 * math.log(2)]).bits_per_dim()) == pytest.approx(1, rel=1e-6)
    assert float(estimate([0.0]).bits_per_dim_stderr()) == pytest.approx(0.05 / math.log(2), rel=1e-6)


def test_intervals_and_means():
    found = estimate([1.0, 3.0], stderr=0.5)
    low, high = found.interval(0.95)
    assert torch.allclose(high - low, torch.full((2,), 2 * 1.959964 * 0.5), rtol=1e-5)
    assert found.mean() == pytest.approx((2.0, 1.0))
    assert "2 samples, 10 dims, log_prob 2 +- 1 nats" in repr(found)


@pytest.mark.parametrize("arguments", [(1,), (256, 1.0, -1.0)])
def test_bad_bins(arguments):
    with pytest.raises(ValueError, match="bins >= 2 and high > low"):
        estimate([0.0]).bits_per_dim(*arguments)


def test_curve_sum_is_the_mean_over_chunks():
    f, sums = noisy(30, 1.0), CurveSum(RULE)
    for chunk in f.split(7):
        sums.add(chunk)
    curve = sums.curve()
    assert torch.allclose(curve.mean, -0.5 * f.double().mean(0))
    assert torch.allclose(curve.stderr, 0.5 * f.double().std(0) / math.sqrt(30))


def test_bounds_hold_for_a_known_integrand():
    # Tails that decay like exp(-|log_snr|): what lies beyond +-10 is 2 e^-10, and the bound is their end values.
    values = torch.exp(-RULE.log_snr.abs())
    bound = truncation_bound(Curve(RULE.log_snr, values, torch.zeros(200)))
    assert 2 * math.exp(-10) <= bound < 4 * math.exp(-10)
    exact = 2 * (1 - math.exp(-10))
    error = abs(float((RULE.weight * values).sum()) - exact)
    assert error < discretization_bound(Curve(RULE.log_snr, values, torch.zeros(200)), RULE) < 0.1
