"""Discrete data: levels, dequantization, and the bound of log P(k), on a problem whose probabilities are known."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import fastscore as fs
from fastscore.densities.discrete import Levels, discrete_log_prob, reconstruction

pytestmark = pytest.mark.usefixtures("one_thread")

PROBABILITY = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)
EVERY = torch.arange(3)[:, None]


class PointMasses(nn.Module):
    """The exact noise prediction for d independent coordinates, each at level k with the same probabilities."""

    def __init__(self, levels, schedule, gain=1.0):
        super().__init__()
        self.values, self.schedule, self.gain = levels.values(torch.arange(levels.bins), torch.float64), schedule, gain

    def forward(self, x_t, t):
        alpha, sigma = (v.reshape(-1, *[1] * x_t.ndim) for v in self.schedule.alpha_sigma(t))
        distance = (x_t.double()[..., None] - alpha * self.values) / sigma
        posterior = (PROBABILITY.log() - 0.5 * distance**2).softmax(-1)
        return (self.gain * (posterior * distance).sum(-1)).to(x_t.dtype)


def density_of(levels, schedule, gain=1.0, noise="sobol"):
    return fs.ScoreDensity(PointMasses(levels, schedule, gain), schedule, "eps", noise=noise)


def bounds(density, levels, nfe=4096, copies=32):
    """Return the bound of every level averaged over copies with their own noise, and its standard error."""
    found = discrete_log_prob(density, EVERY.repeat(copies, 1), levels, nfe=nfe).log_prob.double().reshape(copies, 3)
    return found.mean(0), found.std(0) / copies**0.5


def test_values_are_equidistant_and_reach_both_ends():
    levels = Levels(256, -1, 1)
    k = torch.arange(256).reshape(2, 128)
    assert torch.allclose(levels.values(k, torch.float64), k.double() / 127.5 - 1, atol=1e-15)
    assert levels.values(k).dtype == torch.float32
    assert torch.equal(levels.values(k.to(torch.uint8)), levels.values(k))
    assert (float(levels.values(k).min()), float(levels.values(k).max())) == (-1, 1)
    assert levels.width == 2 / 255
    assert (levels.low, levels.high) == (-1 - 1 / 255, 1 + 1 / 255)
    # 8-bit images in [0, 1) as most people dequantize them: low = 0, high = 1.
    unit = Levels(256, 0.5 / 256, 255.5 / 256)
    assert (unit.low, unit.high, unit.width) == pytest.approx((0, 1, 1 / 256), abs=1e-15)


def test_dequantized_data_are_uniform_within_their_level():
    levels = Levels(4, -1, 2)
    k = torch.randint(0, 4, (20_000, 2, 3), generator=torch.Generator().manual_seed(0))
    x = levels.dequantize(k, seed=5, dtype=torch.float64)
    u = (x - levels.low) / levels.width - k
    assert bool(((u >= -1e-15) & (u < 1)).all())
    assert torch.equal(((x - levels.low) / levels.width).floor().long(), k)
    u, n = u.flatten().sort().values, u.numel()
    # Kolmogorov-Smirnov: the largest deviation exceeds 1.95 / sqrt(n) once in a thousand seeds.
    assert float((u - (torch.arange(n) + 0.5) / n).abs().max()) < 1.95 / n**0.5
    columns = ((x - levels.low) / levels.width - k).flatten(1)
    correlation = torch.corrcoef(columns.T) - torch.eye(6)
    assert float(correlation.abs().max()) < 4 / 20_000**0.5  # 4 standard errors
    assert abs(float(torch.corrcoef(torch.stack([columns[:-1, 0], columns[1:, 0]]))[0, 1])) < 4 / 20_000**0.5


def test_dequantization_belongs_to_the_sample_and_not_to_its_batch():
    levels, k = Levels(), torch.randint(0, 256, (6, 5), generator=torch.Generator().manual_seed(0))
    whole = levels.dequantize(k, seed=1)
    assert torch.equal(levels.dequantize(k[4:], seed=1, sample_index=torch.tensor([4, 5])), whole[4:])
    order = torch.tensor([3, 0, 5])
    assert torch.equal(levels.dequantize(k[order], seed=1, sample_index=order), whole[order])
    assert not torch.equal(levels.dequantize(k, seed=2), whole)
    same = levels.dequantize(k[:1].expand(6, 5), seed=1)
    assert len(same.unique(dim=0)) == 6


def test_levels_that_are_no_tensor_are_refused():
    for k in ([[0, 1]], torch.zeros(2, 3, dtype=torch.int64).numpy()):
        with pytest.raises(ValueError, match=r"must be a tensor of integers 0 .. 255, got \w+; give torch.as_tensor"):
            Levels().dequantize(k)


def test_dequantized_data_stay_within_both_ends_in_float32():
    k = torch.full((50_000, 4), 255)
    x = Levels(256, 0.5 / 256, 255.5 / 256).dequantize(k)
    # Rounding to nearest may reach the end itself, as it does for one in 2^17 values of the last level, not pass it.
    assert float(x.max()) <= 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Levels(1), "bins >= 2 and last > first"),
        (lambda: Levels(4, 1, 1), "bins >= 2 and last > first"),
        (lambda: Levels(4).values(torch.tensor([0.0])), "integers 0 .. 3, got torch.float32; round and cast"),
        (lambda: Levels(2).values(torch.tensor([True])), "got torch.bool"),
        (lambda: Levels(4).dequantize(torch.tensor([[0, 4]])), "must be 0 .. 3, got 0 .. 4"),
        (lambda: Levels(4).values(torch.tensor([-1])), "got -1 .. -1"),
    ],
)
def test_what_is_no_level_gets_one_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("log_snr", [-2.0, 1.0, 4.0, 12.0])
def test_reconstruction_is_the_mean_log_mass_of_the_discretized_gaussian(log_snr):
    levels, draws = Levels(4, -1, 1), 50_000
    k = torch.tensor([[0, 1], [2, 1], [3, 0], [1, 3]])
    alpha, sigma = (float(v) for v in fs.LogSNR().alpha_sigma(torch.tensor(log_snr)))
    x, half = levels.values(k, torch.float64), levels.width / 2
    x_t = alpha * x + sigma * torch.randn(draws, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    decoder = Normal(x_t / alpha, sigma / alpha)
    below = torch.where(k == 0, 0.0, decoder.cdf(x - half))
    above = torch.where(k == 3, 1.0, decoder.cdf(x + half))
    # A mass below 1e-12 is lost to cancellation here; where that happens it has no weight.
    log_mass = (above - below).clamp(min=1e-12).log().sum(-1)
    error = log_mass.std(0) / draws**0.5
    assert bool(((reconstruction(k, levels, log_snr) - log_mass.mean(0)).abs() < 4 * error + 1e-9).all())


def test_reconstruction_is_finite_where_the_levels_are_far_too_fine_or_far_too_coarse():
    k = torch.tensor([[7, 9]])
    fine, coarse = (reconstruction(k, Levels(256), end) for end in (-40.0, 40.0))
    # Inside, half a level is h = e^-20 / 255 standard deviations wide: log(2 h density), with E eps^2 / 2 = 1/2.
    h = math.exp(-20) / 255
    assert float(fine) == pytest.approx(2 * (math.log(2 * h / math.sqrt(2 * math.pi)) - 0.5), rel=1e-6)
    assert float(coarse) == pytest.approx(0, abs=1e-12)


def test_bound_is_the_probability_where_the_schedule_leaves_nothing_out():
    levels = Levels(3, -1, 1)
    mean, error = bounds(density_of(levels, fs.LogSNR(-14, 10)), levels)
    assert float(error.max()) < 0.02
    # Prior and decoder leave e^-14 and less; what remains is noise, within 4 of its standard errors.
    assert bool(((mean - PROBABILITY.log()).abs() < 4 * error + 1e-5).all())


def test_error_bars_of_the_bound_cover_it():
    levels, copies = Levels(3, -1, 1), 200
    density = density_of(levels, fs.LogSNR(-14, 10), noise="independent")
    found = discrete_log_prob(density, EVERY.repeat(copies, 1), levels, nfe=256)
    assert (found.truncation, found.method, found.dims) == (0.0, "discrete_log_prob", 1)
    error = (found.log_prob.double() - PROBABILITY.log().repeat(copies)).abs() / found.stderr
    # 600 intervals of 95 %: their share has a standard error of 0.9 %.
    assert 0.92 <= float((error < 1.96).double().mean()) <= 0.98


def test_log_probabilities_of_a_samples_elements_add_up():
    levels, k = Levels(3, -1, 1), torch.tensor([[0, 1, 2, 2], [1, 1, 0, 0]])
    density = density_of(levels, fs.LogSNR(-14, 10), noise="independent")
    found = discrete_log_prob(density, k, levels, nfe=4096)
    assert bool(((found.log_prob.double() - PROBABILITY.log()[k].sum(1)).abs() < 4 * found.stderr).all())
    image = discrete_log_prob(density, k.reshape(2, 1, 2, 2), levels, nfe=4096)
    assert torch.allclose(image.log_prob, found.log_prob, rtol=1e-5)
    # -log P / (d log 2), without an offset for the width of a level.
    assert torch.allclose(found.bits_per_dim(), -found.log_prob / (4 * math.log(2)), rtol=1e-6)


@pytest.mark.parametrize(
    ("lo", "hi", "gain"), [(-14, 10, 1.0), (-14, 2.5, 1.0), (2, 10, 1.0), (-14, 10, 0.8), (-14, 10, 1.2)]
)
def test_it_is_a_bound_for_narrow_ranges_and_wrong_networks(lo, hi, gain):
    levels = Levels(3, -1, 1)
    value, error = bounds(density_of(levels, fs.LogSNR(lo, hi), gain), levels)
    # Mean log P(k) is above it, and it is the log-probability of something that sums to one at most: both hold
    # exactly, so that nothing but noise, 4 standard errors, may break them.
    gap, gap_error = PROBABILITY @ (PROBABILITY.log() - value), (PROBABILITY * error).square().sum().sqrt()
    total, total_error = value.exp().sum(), (value.exp() * error).square().sum().sqrt()
    assert float(gap) > -4 * float(gap_error)
    assert float(total) < 1 + 4 * float(total_error)
    if (lo, hi, gain) != (-14, 10, 1.0):  # something is lost, and the noise does not hide it
        assert float(gap) > 4 * float(gap_error)
        assert float(total) < 1 - 4 * float(total_error)


@pytest.mark.parametrize(("first", "last"), [(0.0, 1.0), (-1.0, 1.0), (-3.0, 3.0)])
def test_bits_per_dim_do_not_depend_on_the_scaling(first, last):
    levels = Levels(3, first, last)
    mean, error = bounds(density_of(levels, fs.VE(sigma_min=0.005, sigma_max=2000.0)), levels)
    # The prior's mismatch is (3 / 2000)^2 at most. A wrong Delta would be off by log 2 or log 3.
    assert bool(((mean - PROBABILITY.log()).abs() < 4 * error + 1e-5).all())
    assert float(error.max()) < 0.02


def test_a_table_and_a_mixture_reference_give_the_same_probability():
    levels = Levels(3, -1, 1)
    table = fs.DDPM(torch.sigmoid(torch.linspace(10, -14, 1000, dtype=torch.float64)))
    density = density_of(levels, table)
    mixture = fs.Reference(PROBABILITY, torch.tensor([[-1.0], [0.0], [1.0]]), torch.full((3, 1), 0.05))
    for q in (density, density.with_reference(mixture)):
        mean, error = bounds(q, levels)
        # The trapezoid rule's own error is (24 / 1000)^2 / 12 times a slope of order one; 4 standard errors of noise.
        assert bool(((mean - PROBABILITY.log()).abs() < 4 * error + 1e-4).all())


def test_same_seed_same_bound_in_any_batch():
    levels = Levels(3, -1, 1)
    density = density_of(levels, fs.LogSNR(-14, 10))
    whole = discrete_log_prob(density, EVERY, levels, nfe=64, seed=2)
    one = discrete_log_prob(density, EVERY[2:], levels, nfe=64, seed=2, sample_index=torch.tensor([2]))
    assert float(one.log_prob) == pytest.approx(float(whole.log_prob[2]), rel=1e-5)
    with pytest.raises(ValueError, match=r"must be 0 .. 2, got 3 .. 3"):
        discrete_log_prob(density, torch.tensor([[3]]), levels)


def test_a_method_is_refused():
    density = fs.ScoreDensity(nn.Identity(), fs.VP(), "eps")
    with pytest.raises(ValueError, match="discrete_log_prob is a method of its own, got method='elbo'; leave it out"):
        fs.discrete_log_prob(density, torch.zeros(2, 3, dtype=torch.int64), fs.Levels(8), method="elbo")


@pytest.mark.parametrize("ends", [(0.0, math.inf), (math.nan, 1.0), ("a", "b")])
def test_levels_are_finite(ends):
    with pytest.raises(ValueError, match=r"(first|last) of Levels must be a finite number, got"):
        fs.Levels(256, *ends)
