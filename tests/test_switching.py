"""Networks that switch between components: variance that few draws hold is in the bars of samples that have none."""

import math

import pytest
import torch
from mixtures import ExactEps, Mixture
from torch import nn

import fastscore as fs
from fastscore.estimator import statistics
from fastscore.estimator.nodes import FittedNodes, NodeDensity
from fastscore.estimator.switching import LEAST, SURE, unseen

SHAPE = (3, 8, 8)


def test_the_least_variance_is_that_of_a_switch_between_two():
    """By the trapezoid rule over both log mu and the log-odds' noise, whose ends and steps leave less than 1e-5."""
    noise = torch.linspace(-9, 9, 1801, dtype=torch.float64)
    mu = torch.logspace(-6, 3, 1801, dtype=torch.float64)
    mass = torch.exp(-noise.square() / 2) / math.sqrt(2 * math.pi) * 0.01
    value = mu[:, None] * torch.sigmoid(-(mu[:, None] + (2 * mu[:, None]).sqrt() * noise)).square()
    mean = value @ mass
    variance = value.square() @ mass - mean.square()
    assert float(torch.trapezoid(variance, mu.log())) == pytest.approx(LEAST, abs=5e-4)
    # What the switch adds to log p is the log of the number of components, which says that the integrand is right.
    assert float(torch.trapezoid(mean, mu.log())) == pytest.approx(math.log(2), abs=1e-5)


def terms_of(seen: float, spacing: float, count: int = 40):
    """Terms whose third differences say that draws show `seen` of u: alternating signs have differences of 8."""
    size = math.sqrt(20 * seen * spacing / (64 * (count - 3)))
    return size * torch.tensor([1.0, -1.0]).double().repeat(count // 2), torch.full(
        (count,), spacing, dtype=torch.float64
    )


@pytest.mark.parametrize("spacing", [0.04, 0.16])
@pytest.mark.parametrize(
    ("seen", "added"), [(0.0, 0.0), (1e-3, 0.0), (SURE, LEAST - SURE), (0.5, LEAST - 0.5), (2.0, 0)]
)
def test_what_draws_do_not_show_is_added_where_they_show_a_switch(seen, added, spacing):
    terms, weight = terms_of(seen, spacing)
    assert float(unseen(terms, weight)) == pytest.approx(spacing * added, rel=1e-9, abs=1e-12)


def test_little_is_added_where_little_is_seen():
    added = [float(unseen(*terms_of(share * SURE, 1.0))) for share in (0.1, 0.3, 0.6, 1.0)]
    expected = [max(0.0, LEAST * share**2 - share * SURE) for share in (0.1, 0.3, 0.6, 1.0)]
    assert added == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [0, 3])
def test_fewer_than_four_draws_say_nothing(count):
    assert unseen(torch.ones(5, count), torch.ones(count)).tolist() == [0.0] * 5


def test_a_slope_of_the_weights_goes_with_the_draws_there():
    """Half of the draws at four times the spacing: each stretch counts with its own."""
    (terms, weight), (other, wide) = terms_of(0.2, 0.1), terms_of(0.2, 0.4)
    both = float(unseen(torch.cat([terms, other]), torch.cat([weight, wide])))
    # The stretches share u as 0.2 and 0.2, 1.055 in all, but for the three differences that lie across.
    assert both == pytest.approx((LEAST / 0.4 - 1) * 0.2 * (0.1 + 0.4), rel=0.1)


@pytest.mark.parametrize("std", [0.5, 1.0, 3.0])
def test_coarse_draws_move_with_the_scale_of_the_data(std):
    even = NodeDensity.uniform(-10, 14)
    nodes = FittedNodes(even, torch.empty(6, 0), (std, std), own=NodeDensity.uniform(-10, 14, 100))
    assert nodes.own_coarse == pytest.approx((-1 - 2 * math.log(std) + 10) / 24)


class OfImages(nn.Module):
    def __init__(self, target, schedule):
        super().__init__()
        self.exact = ExactEps(target, schedule)

    def forward(self, x, t):
        return self.exact(x.flatten(1), t).reshape(x.shape)


def none_unseen(monkeypatch):
    """Plant the mistake of taking a sample's draws for all that there is."""
    monkeypatch.setattr(statistics, "unseen", lambda terms, weight: terms.new_zeros(terms.shape[:-1]))


def errors_and_bars(components: int, nfe: int, seeds: int):
    """Return errors of log p of 48 images under an exact network and their standard errors, (seeds, 48) each."""
    schedule, generator = fs.VP(), torch.Generator().manual_seed(2)
    mean = 0.5 * torch.randn(components, *SHAPE, generator=generator)
    mean = (mean + mean.roll(1, 3) + mean.roll(1, 2)).flatten(1)
    target = Mixture(mean, torch.full((components, 1), 0.3))
    x = target.sample(48, generator)
    density = fs.ScoreDensity(OfImages(target, schedule), schedule, "eps", program=False)
    found = [density.estimate(x.view(-1, *SHAPE), nfe=nfe, seed=seed, progress=False) for seed in range(seeds)]
    assert found[0].control == "self"
    error = torch.stack([each.log_prob.double() for each in found]) - target.log_prob(x)
    return error, torch.stack([each.stderr.double() for each in found])


@pytest.mark.parametrize(
    ("components", "nfe", "seeds", "planted"),
    [(4, 256, 5, False), (4, 256, 5, True), (8, 256, 5, False), (4, 128, 5, False)],
)
def test_bars_of_networks_that_switch_cover(components, nfe, seeds, planted, monkeypatch):
    if planted:
        none_unseen(monkeypatch)
    error, stderr = errors_and_bars(components, nfe, seeds)
    # 240 intervals, of which chance alone moves the share by 1.4 % at 95 %, and by 2.2 % at 87 %, of those that have
    # only what their draws show.
    share = float((error.abs() < 1.96 * stderr).double().mean())
    assert (0.92 <= share <= 0.99) is not planted, share


def test_bars_of_one_gaussian_are_what_they_were(monkeypatch):
    error, stderr = errors_and_bars(1, 256, 2)
    # 96 intervals, a standard error of 2.2 %.
    assert float((error.abs() < 1.96 * stderr).double().mean()) >= 0.89
    none_unseen(monkeypatch)
    _, before = errors_and_bars(1, 256, 2)
    assert float(stderr.median()) == pytest.approx(float(before.median()), rel=1e-3)
    assert float((stderr / before).max()) < 1.1  # of the two of 96 whose draws show most
