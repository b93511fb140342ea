"""Rules: no bias for any function, weights of their papers, and groups whose errors cancel."""

import math
from dataclasses import replace

import pytest
import torch
from analytic import SCHEDULES

import fastscore as fs
from fastscore.estimator.methods import DENSITY, METHODS, method_of, table_of
from fastscore.estimator.nodes import NodeDensity
from fastscore.estimator.rules import GROUPS, Rules, group_of, make_rules

SHIFTS, SEEDS = 64, 200


def bumpy(lo, hi):
    edges = torch.linspace(lo, hi, 9, dtype=torch.float64)
    single = torch.tensor([0.1, 1, 5, 3, 2, 1, 0.5, 0.1]).double()
    pair = single / torch.tensor([1, 1, 1, 1, 1, 4, 4, 4])
    return NodeDensity.from_spread(edges, single, pair, curve=torch.tensor([0.0, 3, 40, 30, 5, 1, -2, 0]).double())


def integral(rule, function, density=False):
    weight, remainder = (rule.density_weight, rule.density_remainder) if density else (rule.weight, rule.remainder)
    return float(weight @ function(rule.log_snr) + remainder)


def rough(log_snr):
    """A function that no quadrature likes: a step, a kink and a narrow bump."""
    return 30 * (log_snr > 1.7) + 5 * (log_snr + 3).abs() + 20 * torch.exp(-((4 * (log_snr - 0.3)) ** 2))


@pytest.mark.parametrize("nfe", [8, 33, 256, 3000])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("fitted", [False, True])
def test_draws_ascend_and_evaluations_stay_below_nfe(name, nfe, fitted):
    schedule = SCHEDULES[name]
    lo, hi = schedule.log_snr_range
    rules = make_rules(bumpy(lo, hi) if fitted else NodeDensity.uniform(lo, hi), nfe, schedule, seed=nfe)
    assert nfe - 2 <= rules.nfe <= nfe
    for group in range(GROUPS):
        rule = rules.of(group)
        assert rule.nfe == rules.nfe
        assert len(rule.log_snr) == rules.draws
        assert bool((rule.weight > 0).all())
        assert bool((rule.log_snr.diff() >= 0).all())
        assert torch.allclose(schedule.log_snr(rule.time), rule.log_snr, atol=1e-8)
        if nfe > 8:
            assert bool(rule.paired.any()) == fitted


@pytest.mark.parametrize("method", METHODS.values(), ids=repr)
@pytest.mark.parametrize("name", ["log-snr", "ddpm-linear"])
@pytest.mark.parametrize("nfe", [8, 50, 400])
@pytest.mark.parametrize("fitted", [False, True])
def test_sums_have_no_bias_for_any_function(name, nfe, fitted, method):
    schedule = SCHEDULES[name]
    lo, hi = schedule.log_snr_range
    density = bumpy(lo, hi) if fitted else NodeDensity.uniform(lo, hi)
    found = [integral(make_rules(density, nfe, schedule, method, seed).of(seed % 16), rough) for seed in range(SEEDS)]
    found = torch.tensor(found, dtype=torch.float64)
    if method.table(schedule) is None:
        fine = torch.linspace(lo, hi, 400001, dtype=torch.float64)
        exact = float(torch.trapezoid(rough(fine), fine))
    else:
        table = table_of(schedule)[1]
        exact = float(method.weights(table) @ rough(table))
    # Four standard errors of the mean over seeds; nodes in the middle of their cells are off by a standard deviation.
    assert float(found.mean()) == pytest.approx(exact, abs=4 * float(found.std()) / SEEDS**0.5)


def test_entries_that_are_drawn_in_any_case_carry_their_whole_weight():
    schedule = fs.DDPM.linear(50)
    lo, hi = schedule.log_snr_range
    rule = make_rules(bumpy(lo, hi), 4000, schedule).of(3)
    table = table_of(schedule)[1]
    summed = torch.zeros(50).double().index_add_(0, 49 - rule.time, rule.weight)
    assert torch.allclose(summed, DENSITY.weights(table), rtol=1e-12)


def test_the_known_curve_leaves_no_error_of_its_own():
    # A function that is the curve itself is integrated exactly by every shift.
    for schedule in (fs.LogSNR(), fs.DDPM.linear(200)):
        density = bumpy(*schedule.log_snr_range)
        found = [integral(Rules(density, 12, schedule, DENSITY, u).of(0), density.curve_at) for u in (0.0, 0.31, 0.77)]
        table = table_of(schedule)[1]
        whole = (
            density.curve_integral if not schedule.discrete else float(DENSITY.weights(table) @ density.curve_at(table))
        )
        assert found == pytest.approx([whole] * 3, rel=1e-12)


def test_errors_of_the_groups_cancel():
    # Of 16 equidistant shifts the mean error is that of 16 times as many nodes, and so are those of 2, 4 and 8.
    schedule = fs.LogSNR()
    density = bumpy(*schedule.log_snr_range).without_curve()
    fine = torch.linspace(*schedule.log_snr_range, 400001, dtype=torch.float64)

    def smooth(log_snr):
        return 60 / (1 + torch.exp(-log_snr)) + 10 * torch.exp(-(log_snr**2) / 8)

    exact = float(torch.trapezoid(smooth(fine), fine))
    rms = []
    for count in (1, 2, 4, 8, 16):
        means = []
        for k in range(SHIFTS):
            rules = Rules(density, 16, schedule, DENSITY, k / SHIFTS)
            means.append(sum(integral(rules.of(g), smooth) for g in range(count)) / count - exact)
        rms.append(math.sqrt(sum(m * m for m in means) / len(means)))
    # Independent shifts would leave a quarter of the error of one group, these leave less than an eighth.
    assert rms == sorted(rms, reverse=True)
    assert rms[-1] < rms[0] / 8


def test_groups_are_runs_of_consecutive_samples():
    index = torch.tensor([0, 63, 64, 127, 64 * 15, 64 * 16, 2**40 * 64 * 16 + 64])
    assert group_of(index).tolist() == [0, 0, 1, 1, 15, 0, 1]


def test_a_seed_and_a_round_decide_the_shifts_and_nothing_else_does():
    schedule, density = fs.LogSNR(), NodeDensity.uniform(-14, 16)
    first = make_rules(density, 32, schedule, seed=7).of(2).log_snr
    assert torch.equal(make_rules(density, 32, schedule, seed=7).of(2).log_snr, first)
    others = [make_rules(density, 32, schedule, seed=8), make_rules(density, 32, schedule, seed=7, round_=1)]
    assert not any(torch.equal(rules.of(2).log_snr, first) for rules in others)
    # Shifts of many seeds are uniform: the mean of 400 has a standard error of 0.0144.
    shifts = torch.tensor([make_rules(density, 8, schedule, seed=s).shift for s in range(400)])
    assert float(shifts.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(shifts.var()) == pytest.approx(1 / 12, rel=0.15)


def test_discrete_and_elbo_weights_are_their_papers():
    schedule = fs.DDPM.linear(50)
    bar = torch.sigmoid(schedule.table)
    alpha = torch.cat([bar[:1], bar[1:] / bar[:-1]])
    _, log_snr = table_of(schedule)
    # Li and Yan: (1 - alpha_{t+1}) / (1 - abar_t) for t = 1 .. T-1; ascending log-SNR is descending t.
    found = METHODS["discrete"].weights(log_snr).flip(0)
    assert torch.allclose(found[:-1], (1 - alpha[1:]) / (1 - bar[:-1]), rtol=1e-10)
    # Ho et al. with posterior variances: (1 - alpha_t) / (alpha_t - abar_t) for t >= 2, 1 / alpha_1 for the decoder.
    found = METHODS["elbo"].weights(log_snr).flip(0)
    assert torch.allclose(found[1:], (1 - alpha[1:]) / (alpha[1:] - bar[1:]), rtol=1e-10)
    assert float(found[0]) == pytest.approx(1 / float(alpha[0]), rel=1e-12)


def test_too_few_and_too_many_evaluations_and_unknown_methods():
    schedule = fs.LogSNR()
    nodes = NodeDensity.uniform(*schedule.log_snr_range)
    for share, least in ((0.0, 4), (0.5, 5), (1.0, 8)):
        halves = NodeDensity.uniform(*schedule.log_snr_range, bins=2)
        paired = replace(halves, share=torch.tensor([share, 1 - share]).double(), paired=torch.tensor([True, False]))
        with pytest.raises(ValueError, match=rf"nfe=3 leaves fewer than 4 draws.*use nfe >= {least} "):
            make_rules(paired, 3, schedule)
        with pytest.raises(ValueError, match=rf"nfe={least - 1} leaves fewer than 4 draws.*use nfe >= {least} "):
            make_rules(paired, least - 1, schedule)
        assert make_rules(paired, least, schedule).nfe == least
    with pytest.raises(ValueError, match=r"nfe must be at most 16777216 evaluations per sample, got 1000000000"):
        make_rules(nodes, 10**9, schedule)
    with pytest.raises(ValueError, match="density, discrete, elbo; got 'vlb'"):
        method_of("vlb")
