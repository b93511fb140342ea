"""Which samples a pilot looks at: rare kinds among them, counted as often as they are."""

import pytest
import torch
from mixtures import ExactEps, Mixture

import fastscore as fs
from fastscore.estimator.pilot import strata
from fastscore.estimator.samples import Samples


def test_a_rare_kind_of_sample_is_looked_at_and_counts_as_often_as_it_is():
    """2 % of the data lie apart, in a narrow cluster: 64 random samples of 600 would miss it in one fit of four."""
    target = Mixture(torch.tensor([[0.0] * 4, [4.0] * 4]), torch.tensor([[1.0], [0.05]]), torch.tensor([0.98, 0.02]))
    density, generator = (
        fs.ScoreDensity(ExactEps(target, fs.VP()), fs.VP(), "eps", program=False),
        torch.Generator().manual_seed(2),
    )
    rare = 4 + 0.05 * torch.randn(16, 4, generator=generator)
    truth = target.log_prob(rare)
    for fit in range(6):
        density.fit(target.sample(3000, generator), seed=fit, evaluations=60_000, progress=False)
        error = torch.stack([density.estimate(rare, nfe=64, seed=s).log_prob.double() - truth for s in range(4)])
        # 1.2 to 1.5 nats where the cluster was seen, 32 to 43 where not.
        assert float(error.square().mean().sqrt()) < 4


def test_weights_of_a_pilot_make_its_means_those_of_all_held_out_samples():
    x = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    samples = Samples(x, torch.arange(600), (3,), ())
    means = []
    for shift in range(200):
        turned = samples.select(torch.arange(600).roll(3 * shift))
        chosen, weight = strata(turned, fs.Reference.isotropic(), 64)
        assert len(chosen) == 64
        assert float(weight.sum()) == pytest.approx(1)
        means.append(float(weight @ chosen.x.double().square().sum(1)))
    norm = x.double().square().sum(1)
    # 200 choices of 64, which overlap, of norms with a deviation of 2.4.
    assert sum(means) / 200 == pytest.approx(float(norm.mean()), abs=0.06)
    few, weight = strata(samples.select(slice(0, 70)), fs.Reference.isotropic(), 64)
    assert weight.unique().tolist() == [1 / 64]
    assert torch.equal(few.x, x[:64])
