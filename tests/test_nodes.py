"""Nodes and weights: exact where they must be, convergent where they can be."""

import pytest
import torch
from analytic import SCHEDULES

import fastscore as fs
from fastscore.nodes import NodeDensity, make_rule, method_table, method_weights


def bumpy(lo, hi):
    edges = torch.linspace(lo, hi, 9, dtype=torch.float64)
    single = torch.tensor([0.1, 1, 5, 3, 2, 1, 0.5, 0.1]).double()
    pair = single / torch.tensor([1, 1, 1, 1, 1, 4, 4, 4])
    return NodeDensity.from_spread(edges, single, pair)


@pytest.mark.parametrize("nfe", [8, 33, 256, 3000])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("fitted", [False, True])
def test_weights_fill_the_range_and_evaluations_stay_below_nfe(name, nfe, fitted):
    schedule = SCHEDULES[name]
    lo, hi = schedule.log_snr_range
    rule = make_rule(bumpy(lo, hi) if fitted else NodeDensity.uniform(lo, hi), nfe, schedule)
    assert float(rule.weight.sum()) == pytest.approx(hi - lo, rel=1e-12)
    assert bool((rule.weight > 0).all())
    assert bool((rule.log_snr.diff() >= 0).all())
    assert nfe - 2 <= rule.nfe <= nfe
    assert torch.allclose(schedule.log_snr(rule.time), rule.log_snr, atol=1e-8)
    if nfe > 8:
        assert bool(rule.paired.any()) == fitted


@pytest.mark.parametrize("name", ["log-snr", "ddpm-linear"])
def test_rule_integrates_smooth_functions_to_second_order(name):
    schedule = SCHEDULES[name]
    lo, hi = schedule.log_snr_range
    exact = torch.atan(torch.tensor(hi)) - torch.atan(torch.tensor(lo))
    for nfe in (64, 256):
        rule = make_rule(NodeDensity.uniform(lo, hi), nfe, schedule)
        error = float((rule.weight / (1 + rule.log_snr**2)).sum() - exact)
        width = (hi - lo) / nfe
        # |f''| <= 2 inside about 4 units of log-SNR: midpoint error h^2/24 * 8, with room for a table's uneven cells.
        assert abs(error) < width**2


def test_from_spread_follows_the_standard_deviation_and_pairs_where_they_pay():
    edges = torch.arange(4).double()
    density = NodeDensity.from_spread(edges, torch.tensor([1.0, 2, 4]).double(), torch.tensor([1.0, 1, 4]).double(), 0)
    assert density.paired.tolist() == [False, True, False]
    spread = torch.tensor([1.0, 2**0.5, 4]).double()
    assert torch.allclose(density.share, spread / spread.sum())
    assert density.draws_per_evaluation == pytest.approx(float((5 + 2**0.5 / 2) / (5 + 2**0.5)))


def test_quantile_cumulative_and_density_agree():
    density = bumpy(-3.0, 5.0)
    u = torch.linspace(0.001, 0.999, 77, dtype=torch.float64)
    at = density.quantile(u)
    assert torch.allclose(density.cumulative_at(at), u, atol=1e-12)
    h = 1e-6
    slope = (density.cumulative_at(at + h) - density.cumulative_at(at - h)) / (2 * h)
    assert torch.allclose(slope, density.density_at(at), rtol=1e-6)


def test_discrete_and_elbo_weights_are_their_papers():
    schedule = fs.DDPM.linear(50)
    bar = torch.sigmoid(schedule.table)
    alpha = torch.cat([bar[:1], bar[1:] / bar[:-1]])
    _, log_snr = method_table(schedule)
    # Li and Yan: (1 - alpha_{t+1}) / (1 - abar_t) for t = 1 .. T-1; ascending log-SNR is descending t.
    found = method_weights(log_snr, "discrete").flip(0)
    assert torch.allclose(found[:-1], (1 - alpha[1:]) / (1 - bar[:-1]), rtol=1e-10)
    # Ho et al. with posterior variances: (1 - alpha_t) / (alpha_t - abar_t) for t >= 2, 1 / alpha_1 for the decoder.
    found = method_weights(log_snr, "elbo").flip(0)
    assert torch.allclose(found[1:], (1 - alpha[1:]) / (alpha[1:] - bar[1:]), rtol=1e-10)
    assert float(found[0]) == pytest.approx(1 / float(alpha[0]), rel=1e-12)


@pytest.mark.parametrize("method", ["discrete", "elbo"])
def test_chosen_entries_carry_the_weight_of_the_whole_table(method):
    schedule = fs.DDPM.linear(1000)
    _, log_snr = method_table(schedule)
    rule = make_rule(NodeDensity.uniform(*schedule.log_snr_range), 60, schedule, method)
    assert float(rule.weight.sum()) == pytest.approx(float(method_weights(log_snr, method).sum()), rel=1e-12)
    density = make_rule(NodeDensity.uniform(*schedule.log_snr_range), 60, schedule)
    assert torch.equal(rule.time, density.time)
    assert torch.equal(rule.density_weight, density.weight)


def test_too_few_evaluations_and_unknown_methods():
    schedule = fs.LogSNR()
    nodes = NodeDensity.uniform(*schedule.log_snr_range)
    with pytest.raises(ValueError, match=r"nfe=3 leaves fewer than 4 draws.*use nfe >= 8"):
        make_rule(nodes, 3, schedule)
    with pytest.raises(ValueError, match="density, discrete, elbo; got 'vlb'"):
        make_rule(nodes, 64, schedule, "vlb")
