"""Where a density puts its draws, and what it knows of the integrand."""

import pytest
import torch

from fastscore.estimator.nodes import NodeDensity


def bumpy(lo, hi):
    edges = torch.linspace(lo, hi, 9, dtype=torch.float64)
    single = torch.tensor([0.1, 1, 5, 3, 2, 1, 0.5, 0.1]).double()
    pair = single / torch.tensor([1, 1, 1, 1, 1, 4, 4, 4])
    return NodeDensity.from_spread(edges, single, pair)


def test_from_spread_follows_the_standard_deviation_and_pairs_above_one_log_snr():
    edges = torch.arange(6).double()
    single, pair = torch.full((5,), 2.0).double(), torch.tensor([2.0, 2, 2, 0.5, 0.5]).double()
    density = NodeDensity.from_spread(edges, single, pair, 0)
    # Variances smoothed twice with (1, 2, 1) / 4: of the pairs, 4 becomes 4, 3.77, 2.83, 1.42, 0.48 or thereabouts.
    smooth = torch.tensor([4.0, 4, 4, 0.25, 0.25]).double()
    for _ in range(2):
        smooth = torch.nn.functional.conv1d(
            torch.cat([smooth[:1], smooth, smooth[-1:]])[None, None], torch.tensor([[[0.25, 0.5, 0.25]]]).double()
        )[0, 0]
    cheaper = (2 * smooth).sqrt() < 2
    assert density.paired.tolist() == cheaper.tolist() == [False, False, False, True, True]
    spread = torch.where(cheaper, (2 * smooth).sqrt(), single)
    assert torch.allclose(density.share, spread / spread.sum())
    assert density.draws_per_evaluation == pytest.approx(float((density.share / (1 + cheaper)).sum()))


def test_one_noisy_bin_of_a_pilot_does_not_starve():
    # A bin whose four draws happened to agree keeps a good part of its neighbours' share: 6/16 + 4/16 of their
    # variance comes in by the two passes.
    single = torch.tensor([1.0, 1, 0, 1, 1]).double()
    density = NodeDensity.from_spread(torch.arange(6).double(), single, 9 * torch.ones(5).double(), 0)
    assert float(density.share[2] / density.share[0]) > 0.7


def test_the_known_curve_is_linear_between_centres_and_integrates_exactly():
    edges = torch.tensor([0.0, 1, 3, 4]).double()
    curve = torch.tensor([2.0, 5, -1]).double()
    density = NodeDensity(edges, torch.ones(3).double() / 3, torch.zeros(3).bool(), curve)
    at = torch.tensor([0.0, 0.5, 1.25, 2.0, 3.5, 4.0]).double()
    assert density.curve_at(at).tolist() == pytest.approx([2, 2, 3.5, 5, -1, -1])
    fine = torch.linspace(0, 4, 40001, dtype=torch.float64)
    assert density.curve_integral == pytest.approx(float(torch.trapezoid(density.curve_at(fine), fine)), abs=1e-6)
    assert float(density.without_curve().curve_at(at).abs().sum()) == density.without_curve().curve_integral == 0


def test_quantile_cumulative_and_density_agree():
    density = bumpy(-3.0, 5.0)
    u = torch.linspace(0.001, 0.999, 77, dtype=torch.float64)
    at = density.quantile(u)
    assert torch.allclose(density.cumulative_at(at), u, atol=1e-12)
    h = 1e-6
    slope = (density.cumulative_at(at + h) - density.cumulative_at(at - h)) / (2 * h)
    assert torch.allclose(slope, density.density_at(at), rtol=1e-6)
