"""What an estimate says of its numbers."""

import math
from dataclasses import replace

import pytest
import torch
from analytic import ExactNet, mixture

import fastscore as fs
from fastscore.estimator.curve import CurveSum
from fastscore.estimator.estimate import Estimate
from fastscore.estimator.rules import Rule


def estimate(log_prob, stderr=0.5, dims=10):
    log_prob = torch.as_tensor(log_prob)
    return Estimate(
        log_prob,
        torch.full_like(log_prob, stderr),
        torch.full_like(log_prob, stderr).square(),
        torch.zeros_like(log_prob),
        torch.full((len(log_prob),), 64),
        CurveSum.empty(200),
        dims,
        "density",
        "sobol",
        torch.zeros(len(log_prob), dtype=torch.int64),
        torch.arange(len(log_prob)),
        torch.zeros(len(log_prob), 2, 7),
        torch.zeros(len(log_prob), 2),
    )


def test_one_sample_has_no_spread():
    assert repr(estimate([-1.5])).startswith(
        "Estimate(1 sample, 10 dims, log_prob -1.5 nats, stderr 0.5 per sample, 64"
    )
    assert "2 samples, 10 dims, log_prob -1 +- 0.5 nats" in repr(estimate([-1.5, -0.5]))


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


def test_the_mean_in_bits_is_that_in_nats_and_has_its_error():
    density = fs.ScoreDensity(ExactNet(mixture(2), fs.VP()), fs.VP(), "eps")
    found = density.estimate(mixture(2).sample(40), nfe=16)
    (bits, error), (nats, of_nats) = found.mean_bits_per_dim(bins=256), found.mean()
    # Affine in the mean; float64 sums of float64 values.
    assert bits == pytest.approx(-(nats / 2 + math.log(2 / 256)) / math.log(2), rel=1e-12)
    assert error == pytest.approx(of_nats / 2 / math.log(2), rel=1e-9)
    # With a mask every sample counts by its own dimensions.
    mask = torch.tensor([[True, True]] * 20 + [[True, False]] * 20)
    masked = density.estimate(mixture(2).sample(40), nfe=16, mask=mask)
    bits, error = masked.mean_bits_per_dim()
    per_sample = -masked.log_prob / torch.tensor([2] * 20 + [1] * 20) / math.log(2)
    assert bits == pytest.approx(float(per_sample.mean()), rel=1e-12)
    assert error > float(per_sample.std()) / 40**0.5 * (1 - 1e-9)


def test_the_curve_is_the_mean_over_samples_with_its_error():
    f = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    log_snr = torch.linspace(-3, 3, 12, dtype=torch.float64)
    one = torch.ones_like(log_snr)
    rule, summed = Rule.plain(log_snr, one, one, one > 2), CurveSum.empty(12)
    for part in f.split(13):
        summed.add(part, rule.log_snr)
    half, found = -0.5 * f.double(), summed.curve()
    # Sums of float64; the error is that of the population's spread with one degree of freedom taken off.
    torch.testing.assert_close(found.log_snr, log_snr, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.mean, half.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.stderr, half.std(0) / 30**0.5, rtol=1e-10, atol=1e-12)


def test_comparisons_and_captured_estimates_are_one_readable_line():
    density, x = fs.ScoreDensity(ExactNet(mixture(2), fs.VP()), fs.VP(), "eps"), mixture(2).sample(3)
    found = density.compare(x, {"shift": torch.zeros(3, 2)}, {"shift": torch.ones(3, 2)}, nfe=16)
    (mean, error), own = found.mean(), f"stderr {float(found.stderr.mean()):.2g} per sample"
    beyond = f"largest truncation about {found.truncation:.2g})"
    assert repr(found) == f"Comparison(3 samples, difference {mean:.4g} +- {error:.2g} nats, {own}, {beyond}"
    found = fs.CapturedDensity(density, x, nfe=16)(x)
    own = f"stderr {float(found.stderr.mean()):.2g} per sample)"
    assert repr(found) == f"CapturedEstimate(3 samples, log_prob {float(found.log_prob.mean()):.4g} nats, {own}"
    assert "largest truncation about" in repr(density.estimate(x, nfe=16))


def test_levels_bring_their_bins_and_ends():
    # k/127.5 - 1 has levels 2/255 apart; uniform over [-1 - 1/255, 1 + 1/255) each has 8 bits exactly.
    levels = fs.Levels(256)
    found = estimate([-10 * math.log(2 + 2 / 255)] * 2)
    assert found.bits_per_dim(levels).tolist() == pytest.approx([8, 8], rel=1e-6)  # log_prob is float32
    assert found.bits_per_dim(levels).tolist() == found.bits_per_dim(256, levels.low, levels.high).tolist()
    assert found.mean_bits_per_dim(levels)[0] == pytest.approx(8, rel=1e-6)
    assert found.mean_bits_per_dim(levels, levels.low, levels.high) == found.mean_bits_per_dim(levels)
    with pytest.raises(ValueError, match=r"\[-1\.00392, 1\.00392\), and besides low=0\.0, high=1\.0; .* leave low"):
        found.bits_per_dim(levels, 0.0, 1.0)


def test_a_mean_over_samples_with_the_same_noise_is_warned_of():
    # Of 128 samples with the same index the mean over seeds was off by 0.93, where it stated 0.29.
    found = fs.ScoreDensity(ExactNet(mixture(3), fs.VP()), fs.VP(), "eps").estimate(
        torch.randn(6, 3), nfe=16, sample_index=torch.tensor([0, 1, 1, 5, 1, 7])
    )
    repr(found)  # says nothing of it
    for mean in (found.mean, lambda: found.mean_bits_per_dim(256)):
        with pytest.warns(UserWarning, match=r"2 of 6 samples have the sample_index of another one.*too small"):
            mean()


def test_the_mean_of_differences_with_the_same_noise_is_warned_of():
    # 100 equal differences with the same index: the mean over seeds was off by 10^4 of the errors that it stated.
    index, x = torch.tensor([0, 1, 1, 5, 1, 7]), torch.randn(6, 3)
    density, other = (fs.ScoreDensity(ExactNet(mixture(3), fs.VP()), fs.VP(), "eps") for _ in range(2))
    shifts = {"shift": torch.zeros(6, 3)}, {"shift": torch.ones(6, 3)}
    for found in (
        fs.compare_densities(density, other, x, nfe=16, sample_index=index),
        density.compare(x, *shifts, nfe=16, sample_index=index),
    ):
        repr(found)  # says nothing of it
        with pytest.warns(UserWarning, match=r"2 of 6 samples have the sample_index of another one.*too small"):
            found.mean()
        assert found.sample_index.tolist() == index.tolist()


def test_ends_without_bins_are_refused():
    # They were not read: data in [0, 1) and in [0, 255) had the same bits.
    for ends in ({"low": 0.0, "high": 1.0}, {"high": 255.0}):
        with pytest.raises(ValueError, match=r"low and high say where the levels .* without bins; give bins="):
            estimate([-1.0]).bits_per_dim(**ends)


@pytest.mark.parametrize("bins", [256, fs.Levels(256)])
def test_bins_of_a_log_probability_are_refused(bins):
    # 5.24 bits a dimension of discrete_log_prob were 12.24 with bins=256: the width of a level counted twice.
    found = replace(estimate([-10 * 5.24 * math.log(2)] * 2), method="discrete_log_prob")
    assert found.mean_bits_per_dim()[0] == pytest.approx(5.24, rel=1e-6)
    for call in (found.bits_per_dim, found.mean_bits_per_dim):
        with pytest.raises(ValueError, match=r"without bins, since .* got bins=.*256.*; call bits_per_dim\(\)"):
            call(bins)


@pytest.mark.parametrize(("schedule", "scale"), [(fs.VE(0.01, 50.0), 1e-6), (fs.VP(), 1e6)])
def test_truncation_is_unknown_where_all_noise_is_coarser_or_finer_than_the_data(schedule, scale):
    """It was NaN, which compares as small; log_prob is the fitted reference's there."""
    from mixtures import ExactEps, Mixture

    generator = torch.Generator().manual_seed(5)
    target = Mixture(scale * torch.randn(3, 3, generator=generator).double(), torch.tensor(0.4 * scale))
    density = fs.ScoreDensity(ExactEps(target, schedule), schedule, "eps")
    with pytest.warns(UserWarning, match="noise of the schedule"):
        density.fit(target.sample(1000, generator), progress=False)
    found = density.estimate(target.sample(20, generator), nfe=64, progress=False)
    assert bool((found.truncation_per_sample == torch.inf).all())
    assert "truncation unknown with so few draws in the range" in repr(found)


def test_samples_whose_draws_say_nothing_of_the_ends_leave_the_others_what_they_are():
    from fastscore.estimator.curve import truncation

    generator = torch.Generator().manual_seed(0)
    ends = torch.rand(9, 2, 7, generator=generator, dtype=torch.float64)
    some = ends.clone()
    some[[2, 5], :, :4] = torch.nan
    found, kept = truncation(some), [0, 1, 3, 4, 6, 7, 8]
    assert bool(found[[2, 5]].isinf().all())
    torch.testing.assert_close(found[kept], truncation(ends[kept]), rtol=1e-12, atol=0)
