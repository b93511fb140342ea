"""Sums over draws and means over samples, on integrands that are known."""

import math

import pytest
import torch

import fastscore as fs
from fastscore.estimator.calibration import calibrated, uncalibrated
from fastscore.estimator.curve import Curve, CurveSum, EndTable, ends, table_error, truncation
from fastscore.estimator.methods import DENSITY, table_of
from fastscore.estimator.nodes import NodeDensity
from fastscore.estimator.rules import GROUPS, Rules, group_shifts, make_rules
from fastscore.estimator.statistics import (
    GroupSums,
    Spread,
    contrast_variance,
    draw_jump,
    draw_sum,
    draw_variance,
    successive_variance,
    widened,
)

RULE = Rules(NodeDensity.uniform(-10, 10), 200, fs.LogSNR(-10, 10), DENSITY, 0.5).of(0)


def noisy(count, spread, seed=0):
    """A smooth course over log-SNR plus independent noise of a known standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return 50 * torch.sigmoid(RULE.log_snr) + spread * torch.randn(count, 200, generator=generator)


def test_sum_and_its_variance():
    f = noisy(4000, 2.0)
    exact = -0.5 * float((RULE.weight * 50 * torch.sigmoid(RULE.log_snr)).sum())
    sums, variance = draw_sum(f, RULE), widened(*draw_variance(f, RULE))
    expected = (0.5 * 2.0) ** 2 * float(RULE.weight.square().sum())
    assert float(sums.mean()) == pytest.approx(exact, abs=4 * math.sqrt(expected / 4000))
    # Second differences do not see the smooth course, whose first ones would add 2.6 %. Student's t with 0.51 of 200
    # degrees of freedom adds 2 x 1.21 / 102 = 2.4 %.
    assert float(variance.mean()) == pytest.approx(1.024 * expected, rel=0.01)
    assert float(sums.var()) == pytest.approx(expected, rel=0.1)
    covered = (sums - exact).abs() < 1.96 * variance.sqrt()
    assert float(covered.double().mean()) == pytest.approx(0.95, abs=0.015)


def test_a_known_curve_is_added_as_a_whole_and_taken_off_the_differences():
    density = NodeDensity.uniform(-10, 10, 40)
    centres = (density.edges[1:] + density.edges[:-1]) / 2
    known = NodeDensity(density.edges, density.share, density.paired, 50 * torch.sigmoid(centres))
    rule = make_rules(known, 200, fs.LogSNR(-10, 10)).of(5)
    f = 50 * torch.sigmoid(rule.log_snr)[None]
    exact = -0.5 * 50 * float(torch.nn.functional.softplus(torch.tensor(10.0).double()) - math.log1p(math.exp(-10)))
    # The curve's chords leave h^2/8 |f''| <= 0.15 of the integrand at h = 0.5, of one sign on each half: they cancel.
    assert float(draw_sum(f, rule)) == pytest.approx(exact, abs=0.01)
    # What is left differs from draw to draw by a tenth of what the course itself does, or less.
    left, course = (((f - r.curve) * r.weight).diff().square().sum() for r in (rule, RULE))
    assert float(left) < float(course) / 10
    assert float(draw_variance(f, rule)[0]) <= 0.25 * float(left) * 200 / 398 * (1 + 1e-9)


def test_curve_sum_is_the_mean_over_chunks():
    f, sums, parts = noisy(30, 1.0), CurveSum.empty(200), []
    for chunk in f.split(7):
        sums.add(chunk, RULE.log_snr)
        parts.append(CurveSum.empty(200))
        parts[-1].add(chunk, RULE.log_snr)
    for curve in (sums.curve(), CurveSum.joined(parts).curve()):
        assert torch.allclose(curve.mean, -0.5 * f.double().mean(0))
        assert torch.allclose(curve.stderr, 0.5 * f.double().std(0) / math.sqrt(30))
        assert torch.allclose(curve.log_snr, RULE.log_snr)


@pytest.mark.parametrize(
    ("course", "tail"),
    [
        # (f at log-SNR l, its integral beyond 10): a decay at the full rate, a plateau's edge, growth that ends later.
        (lambda x: torch.exp(-x), math.exp(-10)),
        (lambda x: torch.sigmoid(10.5 - x), math.log1p(math.exp(0.5))),
        (lambda x: torch.sigmoid(8 - x), math.log1p(math.exp(-2))),
        (lambda x: torch.sigmoid(11 - x) * torch.sigmoid(x - 11), 1 - 1 / (1 + math.exp(1))),
    ],
)
@pytest.mark.parametrize("clean", [True, False])
def test_truncation_is_the_tail_of_a_known_course(course, tail, clean):
    toward = RULE.log_snr if clean else -RULE.log_snr
    f = -2 * torch.where(toward > 0, course(toward), 0.0)[None]
    found = float(truncation(ends(f.expand(5, -1), EndTable.of(RULE.log_snr, (-10.0, 10.0)), (1.0, 1.0)))[0])
    # The end value is a mean over one unit of log-SNR, and its successive differences count as noise.
    assert 0.95 * tail < found < 2.2 * tail


def test_truncation_knows_how_wide_the_reference_is():
    # A plateau says nothing of where it ends; a reference of width e^3 beyond the end does: 6 units of log-SNR.
    f = -2 * torch.ones(4, 200).double()
    slowest = 1 / (1 + math.exp(6))
    found = truncation(ends(f, EndTable.of(RULE.log_snr, (-10.0, 10.0)), (1.0, slowest)))
    # The noisy end has no decay either, and nothing but the slowest that draws can tell: -log(0.02) / 0.98.
    assert float(found[0]) == pytest.approx(6 + 4, rel=0.05)


def test_truncation_tells_samples_apart_as_far_as_their_noise_lets():
    generator = torch.Generator().manual_seed(0)
    noise = 0.3 * torch.randn(400, 200, generator=generator).double()
    decay = torch.where(RULE.log_snr > 5, torch.exp(10 - RULE.log_snr), 0.0)[None]
    same = truncation(ends(noise + decay, EndTable.of(RULE.log_snr, (-10.0, 10.0)), (1.0, 1.0)))
    assert float(same.std()) < 0.02  # of equal samples the mean is as good as any
    size = torch.linspace(-40, 40, 400).double()[:, None]
    own = truncation(ends(noise + size * decay, EndTable.of(RULE.log_snr, (-10.0, 10.0)), (1.0, 1.0)))
    exact = 0.5 * size[:, 0].abs()
    assert float((own > 0.9 * exact).double().mean()) > 0.97
    assert float(own.median()) < 2 * float(exact.median())


def test_truncation_of_ordinary_samples_does_not_ask_an_outlier():
    generator = torch.Generator().manual_seed(0)
    noise, table = 0.3 * torch.randn(40, 200, generator=generator).double(), EndTable.of(RULE.log_snr, (-10.0, 10.0))
    decay = torch.where(RULE.log_snr > 5, torch.exp(10 - RULE.log_snr), 0.0)[None]
    plateau = torch.where(RULE.log_snr > 5, 1.0, 0.0)[None]
    own = truncation(ends(noise + 2 * decay, table, (1.0, 0.001)))
    for size in (100.0, 1e4, 1e9):
        found = truncation(ends(torch.cat([noise + 2 * decay, size * plateau]), table, (1.0, 0.001)))
        # The others' rates and means are theirs; with one pool they stated up to three times as much.
        torch.testing.assert_close(found[:40], own, rtol=0.05, atol=0.02)
        # The outlier has its own rate: a plateau goes on as far as the reference may be wide.
        assert float(found[40]) == pytest.approx(size / 2 * math.log(1000) / 0.999, rel=0.05)


def test_the_trapezoid_error_of_two_timesteps_is_not_known():
    table = table_of(fs.DDPM(torch.tensor([0.9, 0.1])))[1]
    assert math.isnan(table_error(Curve(table, torch.ones(2).double(), torch.zeros(2).double()), table.sort().values))


def test_the_trapezoid_error_of_a_coarse_table():
    schedule = fs.DDPM.linear(40)
    table = table_of(schedule)[1]
    fine = torch.linspace(float(table[0]), float(table[-1]), 100001, dtype=torch.float64)

    def course(log_snr):
        return 30 * torch.sigmoid(log_snr + 2) * torch.sigmoid(2 - log_snr)

    error = abs(float(DENSITY.weights(table) @ course(table) - torch.trapezoid(course(fine), fine)))
    found = table_error(Curve(table, course(table), torch.zeros_like(table)), table)
    assert error < found < 10 * error  # absolute values: errors of both signs do not cancel in it


def test_the_error_of_a_mean_does_not_depend_on_the_order_of_samples():
    generator = torch.Generator().manual_seed(1)
    values = torch.cat([torch.randn(500, generator=generator), 5 + torch.randn(500, generator=generator)]).double()
    group, jump = torch.arange(1000) // 64 % GROUPS, torch.full((1000,), 0.1)
    by_class, mixed = (GroupSums.of(v, jump, group) for v in (values, values[torch.randperm(1000)]))
    for found in (by_class, mixed):
        mean, error = found.mean_with_error()
        torch.testing.assert_close(mean, values.mean())
        # The shift adds a jump of 0.1, over 16 groups, to a spread of 2.7.
        assert float(error) == pytest.approx(float(values.std()) / 1000**0.5, rel=1e-3)


def test_means_of_one_group_and_of_one_sample():
    group = torch.zeros(5, dtype=torch.int64)
    sums = GroupSums.of(torch.arange(5.0), torch.arange(5.0), group)
    assert (float(sums.mean()), float(sums.spread())) == (2.0, 2.5)
    assert float(sums.common_variance()) == pytest.approx(2.0**2 / 12)
    assert math.isnan(float(GroupSums.of(torch.ones(1), torch.zeros(1), group[:1]).spread()))


@pytest.mark.parametrize("sizes", [[64], [64, 64], [64, 3], [5, 64, 20], [64] * 16, [128, *[64] * 15]], ids=str)
def test_the_shift_of_all_nodes_has_the_error_that_jumps_say(sizes):
    """Over all shifts U, for terms that rise evenly from 0 to the jump, whose error is (1/2 - U) J exactly."""
    jump = torch.linspace(1, 3, len(sizes)).double()
    shift = (torch.arange(4096).double() + 0.5)[:, None] / 4096 + group_shifts()[: len(sizes)]
    share = torch.tensor(sizes).double() / sum(sizes)
    error = ((0.5 - shift % 1) * jump) @ share
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    sums = GroupSums.of(torch.zeros(len(group)), jump[group], group)
    # 4096 shifts instead of all of them leave 1e-6 of it.
    assert float(sums.common_variance()) == pytest.approx(float(error.square().mean()), rel=1e-4)


def test_the_shift_is_in_the_bar_of_every_sample():
    """Of an integrand that rises evenly, with noise that is too small to count."""
    density = NodeDensity.uniform(-10, 10)
    rules = [make_rules(density, 24, fs.LogSNR(-10, 10), seed=seed).of(0) for seed in range(200)]
    generator, inside = torch.Generator().manual_seed(0), []
    for rule in rules:
        f = 8 * (rule.log_snr + 10) + 0.01 * torch.randn(1, 24, generator=generator)
        bar = calibrated(Spread.of(f, rule, 3), 24, uncalibrated())[0].sqrt()
        inside.append(float((draw_sum(f, rule) + 0.5 * 8 * 20**2 / 2).abs()) < 1.96 * float(bar))
    # An error that is uniform, and a bar of 1.13 times its largest value.
    assert sum(inside) == 200


def test_entries_drawn_once_or_twice_in_turns_are_no_noise():
    """The noise alone is seen of terms with a large mean, at numbers of draws around that of a table's entries."""
    generator = torch.Generator().manual_seed(0)
    for schedule in (fs.DDPM.linear(1000), fs.DDPM.linear(100), fs.DDPM.cosine(60)):
        for nfe in (16, 64, 100, 256):
            rule = make_rules(NodeDensity.uniform(*schedule.log_snr_range), nfe, schedule).of(3)
            f = 50 + torch.randn(4000, nfe, generator=generator).double()
            right = float((0.5 * rule.weight).square().sum())
            # 4,000 samples leave 0.5 %. Half an entry more or less than it deserves is 3 % of a variance at most.
            assert float(draw_variance(f, rule)[0].mean()) == pytest.approx(right, rel=0.05)
            jump = draw_jump(f, rule)
            assert float(jump.mean().abs()) <= 4 * float(jump.std()) / 4000**0.5 + 1e-9


@pytest.mark.parametrize("nfe", [16, 32, 64])
def test_the_course_of_an_integrand_in_many_dimensions_is_no_noise(nfe):
    """The difference of two Gaussians in 3,072 dimensions: hundreds of nats from a draw to the next, tens of noise."""
    rule = make_rules(NodeDensity.uniform(-12, 12), nfe, fs.LogSNR(-12, 12)).of(0)
    noise = 40 * torch.randn(2000, nfe, generator=torch.Generator().manual_seed(0)).double()
    f = noise + 1500 * (torch.sigmoid(rule.log_snr + 2) - torch.sigmoid(rule.log_snr - 4))
    right = float((0.5 * 40 * rule.weight).square().sum())
    variance = float(draw_variance(f, rule)[0].mean())
    first = float((0.5 * f * rule.weight).diff(dim=1).square().sum(1).mean()) * nfe / (2 * (nfe - 1))
    # 16 draws see a bend in the course as well.
    assert right < variance < (8 if nfe == 16 else 1.3) * right
    if nfe < 64:
        assert first > 4 * variance


def test_second_differences_do_not_see_a_slope():
    noise = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)).double()
    variance, nu = successive_variance(noise + 100 * torch.arange(16.0).double())
    torch.testing.assert_close(variance, noise.diff(n=2, dim=1).square().sum(1) * 16 / 84, rtol=1e-9, atol=0)
    # 16 terms of variance one, with 0.51 N degrees of freedom: the mean of 4,000 has a standard error of 0.8 %.
    assert float(variance.mean()) == pytest.approx(16, rel=0.03)
    assert float(variance.var()) == pytest.approx(2 * 16**2 / (0.51 * 16), rel=0.15)
    # Most samples of 14 differences have no large one, and so more degrees by themselves than all together.
    assert 0.51 * 16 < float(nu.mean()) < 0.65 * 16


def test_contrasts_have_second_differences_where_they_say_far_less_alone():
    noise = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0)).double()
    variance, _ = contrast_variance(noise)
    first = noise.diff(dim=1).square().sum(1) * 16 / 30
    assert float(((variance - first).abs() > 1e-12 * first).double().mean()) < 0.003
    steep = noise + 100 * torch.arange(16.0).double()
    torch.testing.assert_close(contrast_variance(steep)[0], successive_variance(noise)[0], rtol=1e-9, atol=0)


def test_few_draws_have_first_differences():
    noise = torch.randn(100, 7, generator=torch.Generator().manual_seed(0)).double()
    expected = noise.diff(dim=1).square().sum(1) * 7 / 12
    torch.testing.assert_close(successive_variance(noise)[0], expected, rtol=1e-14, atol=0)
