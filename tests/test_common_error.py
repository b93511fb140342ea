"""What samples with the same nodes have in common is in the error of their mean, also where all share the same ones.

The network is exact for data with detail that is finer than the schedule's least noise, as photographs have: the
integrand is far from zero where the range ends, and the shift of the nodes moves every sample's number alike.
"""

import numpy as np
import pytest
import torch
from torch import nn

import fastscore as fs
from fastscore.estimator.statistics import GroupSums

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

D, FINE, SEEDS = 192, 0.002, 24
SCHEDULE = fs.DDPM.linear(1000)
VARIANCE = torch.cat([torch.full((2 * D // 3,), FINE**2), torch.full((D // 3,), 0.25)])
X = torch.randn(40, D, generator=torch.Generator().manual_seed(1)) * VARIANCE.sqrt()


class Fine(nn.Module):
    """The exact noise of N(0, scale diag(VARIANCE))."""

    def forward(self, x_t, t, scale=None):
        alpha, sigma = (v.to(x_t)[:, None] for v in SCHEDULE.alpha_sigma(t))
        variance = VARIANCE if scale is None else VARIANCE * scale[:, None]
        return sigma * x_t / (alpha**2 * variance + sigma**2)


def density():
    return fs.ScoreDensity(Fine(), SCHEDULE, "eps", program=False)


def error_on_these(found):
    """The standard error of a batch's mean as an estimate on these very samples."""
    common = GroupSums.of(found.log_prob, found.jump, found.group).common_variance()
    return float((found.variance.sum() / len(found.variance) ** 2 + common).sqrt())


@pytest.mark.parametrize("count", [12, 40])
@pytest.mark.parametrize("nfe", [16, 32, 64, 256])
@pytest.mark.parametrize("index", [torch.arange(40), 40 * torch.arange(40)], ids=["one run", "many runs"])
def test_a_mean_has_the_spread_over_seeds_that_it_states(nfe, count, index):
    found = [density().estimate(X[:count], nfe=nfe, seed=s, sample_index=index[:count]) for s in range(SEEDS)]
    spread = float(torch.tensor([float(each.log_prob.mean()) for each in found]).std())
    stated = sum(map(error_on_these, found)) / SEEDS
    # 24 seeds know a spread to 15 %. Where all share their nodes, what the samples' own noise says is half or less; 16
    # draws see some of the integrand's own course as noise, and the errors of many groups cancel better than their
    # spread can tell.
    most = 2.4 if nfe == 16 else 1.6 if int(index[-1]) < 64 else 2.0
    assert 0.7 * spread < stated < most * spread, (spread, stated)
    alone = float(torch.stack([each.log_prob for each in found]).std(0).mean())
    bar = float(torch.stack([each.stderr for each in found]).mean())
    assert 0.8 * alone < bar < (2 if nfe == 16 else 1.4) * alone, (alone, bar)


def test_batches_that_all_begin_at_zero_share_their_errors():
    """Sixteen batches of 16 with the same indices: their noise, of which their samples' errors know nothing, is one."""
    x = torch.randn(256, D, generator=torch.Generator().manual_seed(1)) * VARIANCE.sqrt()

    def ratio(sample_index):
        parts = [
            [density().estimate(b, nfe=32, seed=s, sample_index=i) for b, i in zip(x.split(16), sample_index.split(16))]
            for s in range(SEEDS)
        ]
        spread = torch.stack([torch.cat([each.log_prob for each in run]).mean() for run in parts]).std()
        own = torch.stack([torch.cat([each.variance for each in run]).sum().sqrt() / 256 for run in parts]).mean()
        return float(spread / own)

    # With common noise errors add up over 16 batches, up to fourfold; with their places there is the shift beside them.
    assert ratio(torch.arange(256) % 16) > 1.5 * ratio(torch.arange(256))


def test_metrics_and_data_sets_state_it_too(tmp_path):
    metrics = pytest.importorskip("fastscore.metrics")
    metric, bits = (kind(density(), nfe=32) for kind in (metrics.NegativeLogLikelihood, metrics.BitsPerDim))
    for number, batch in enumerate(X.split(9)):
        index = 9 * number + torch.arange(len(batch))
        metric.update(batch, sample_index=index)
        bits.update(batch, sample_index=index)
    whole = density().estimate(X, nfe=32)
    # Sums of float64, of numbers that are stored as float32.
    assert float(metric.compute()["nll_estimate_stderr"]) == pytest.approx(error_on_these(whole), rel=1e-6)
    in_bits = error_on_these(whole) / (D * np.log(2))
    assert float(bits.compute()["bits_per_dim_estimate_stderr"]) == pytest.approx(in_bits, rel=1e-6)
    run = fs.runs.evaluate_dataset(density(), X, tmp_path / "run.npz", nfe=32, batch=7, progress=False)
    assert run.mean() == pytest.approx(whole.mean(), rel=1e-6)
    assert run.mean()[1] > 1.3 * float(whole.log_prob.double().std()) / len(X) ** 0.5


def test_the_mean_of_a_comparison_has_it_as_well():
    """log N(x; 0, C) - log N(x; 0, 2 C): the two integrands end at other heights."""
    scales = {"scale": torch.ones(40)}, {"scale": torch.full((40,), 2.0)}
    found = [density().compare(X, *scales, nfe=32, seed=seed) for seed in range(SEEDS)]
    means, errors = torch.tensor([each.mean() for each in found], dtype=torch.float64).T
    own = torch.stack([each.stderr.double() for each in found]).square().mean().sqrt() / len(X) ** 0.5
    assert float(means.std()) < 1.4 * float(errors.mean())
    assert float(errors.mean()) > float(own)
    difference, stderr = found[0]
    assert torch.equal(difference, found[0].difference)
    assert torch.equal(stderr, found[0].stderr)
    assert repr(found[0]).startswith("Comparison(40 samples, difference ")


def test_further_rounds_keep_it():
    """With a target the rounds' jumps are averaged as if they were one: no less than the error of the mean."""
    found = [density().estimate(X[:12], nfe=16, seed=s, target_stderr=1e-3, max_nfe=64) for s in range(SEEDS)]
    spread = float(torch.tensor([float(each.log_prob.mean()) for each in found]).std())
    assert 0.7 * spread < sum(map(error_on_these, found)) / SEEDS < 1.8 * spread


class OfClasses(nn.Module):
    """The exact noise of N(1.5 y, (0.3 + 0.5 y)^2) in every dimension."""

    def forward(self, x_t, t, y):
        alpha, sigma = (v[:, None] for v in fs.VP().alpha_sigma(t))
        mean, std = 1.5 * y[:, None], 0.3 + 0.5 * y[:, None]
        return sigma * (x_t - alpha * mean) / (alpha**2 * std**2 + sigma**2)


def test_a_comparison_after_a_fit_under_one_of_its_conditions():
    """Nodes follow the integrand that they were fitted to, and the difference is large where these are few."""
    generator = torch.Generator().manual_seed(6)
    made, data = fs.ScoreDensity(OfClasses(), fs.VP(), "eps"), 0.3 * torch.randn(664, 8, generator=generator)
    made.fit(data[64:], evaluations=60_000, progress=False, y=torch.zeros(600))
    one, other = (torch.distributions.Normal(1.5 * y, 0.3 + 0.5 * y).log_prob(data[:64]).sum(1) for y in (0, 1))
    found = [made.compare(data[:64], {"y": torch.zeros(64)}, {"y": torch.ones(64)}, nfe=16, seed=s) for s in range(24)]
    error = torch.stack([each.difference for each in found]) - (one - other)
    stderr = torch.stack([each.stderr for each in found])
    # With the nodes of the fit alone 8.0 nats, and four of five intervals.
    assert float(error.mean(1).square().mean().sqrt()) < 4.5
    assert float((error.abs() < 1.96 * stderr).double().mean()) > 0.9
