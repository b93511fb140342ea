"""References of masked data: their marginals, and what `fit` learns of the entries that are there."""

import pytest
import torch
from masked_data import (
    MASK,
    MIXTURE,
    REFERENCES,
    SCHEDULE,
    MarginalEps,
    X,
    assert_covers,
    density,
    draw,
    marginal,
    seen,
)
from mixtures import MIXTURES

import fastscore as fs

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = fs.Reference(torch.ones(1), torch.zeros(1, 6), torch.ones(1, 6), torch.eye(6)[None])


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_reference_knows_its_marginals(reference):
    """A mask against the same reference in fewer dimensions."""
    q, kept = REFERENCES[reference], torch.tensor([True, False, True, True, False, False])
    small = q if q.mean.shape[1] == 1 else fs.Reference(q.weight, q.mean[:, kept], q.variance[:, kept])
    mask = kept.expand(5, 6)
    x, eps = X[:5], torch.where(kept, draw(5, 3, 6, seed=20), 0)
    log_snr = torch.tensor([-3.0, 0.0, 5.0], dtype=torch.float64)
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    x_t = alpha[:, None] * x[:, None] + sigma[:, None] * eps
    rows = (alpha, sigma)
    assert torch.allclose(q.log_prob(x, mask), small.log_prob(x[:, kept]), rtol=1e-12)
    found = q.residual(x, x_t, eps, *rows, mask)
    assert torch.allclose(found, small.residual(x[:, kept], x_t[..., kept], eps[..., kept], *rows), rtol=1e-10)
    eps_q = q.eps(x_t, *rows, mask[:, None])
    assert torch.allclose(eps_q[..., kept], small.eps(x_t[..., kept], *rows), rtol=1e-10)
    assert bool((eps_q[..., ~kept] == 0).all())
    one, alone = q.gaussian(), small.gaussian()
    weight = torch.rand(3, dtype=torch.float64)
    expected = one.expected_residual(x, log_snr.exp(), weight, mask)
    assert torch.allclose(expected, alone.expected_residual(x[:, kept], log_snr.exp(), weight), rtol=1e-10)
    assert torch.allclose(one.expected_integral(x, -5, 5, mask), alone.expected_integral(x[:, kept], -5, 5))


def test_fit_learns_from_the_entries_that_are_there():
    """Moments of every column from its own entries; estimates are right afterwards, and nearer."""
    data = MIXTURE.sample(3000, torch.Generator().manual_seed(30))
    there = torch.rand(3000, 6, generator=torch.Generator().manual_seed(31)) < 0.7
    there[:, 5] = False  # never seen
    there[:, 0] = True
    spoiled = torch.where(there, data, 1e3)
    fitted = density().fit(spoiled, mask=there, reference="diagonal", evaluations=60_000, cond=seen(there))
    q = fitted.reference
    assert q.mean.shape == (1, 6)
    truth = MIXTURE.weight @ MIXTURE.mean
    spread = (MIXTURE.weight @ (MIXTURE.std.square() + (MIXTURE.mean - truth).square())).sqrt()
    # About 1,700 entries a column: four standard errors of a mean, and of a standard deviation.
    assert bool(((q.mean[0] - truth)[:5].abs() < 4 * spread[:5] / 40).all())
    assert bool(((q.variance[0].sqrt() / spread)[:5] - 1).abs().max() < 0.1)
    # Never seen, so like all entries together, up to what the held-out fifth does to their moments.
    pooled = data[there].double()
    assert float(q.mean[0, 5]) == pytest.approx(float(pooled.mean()), abs=0.05)
    assert float(q.variance[0, 5]) == pytest.approx(float(pooled.var()), rel=0.05)
    mask = MASK.clone()
    mask[:, 5], mask[:, 0] = False, True
    found = fitted.estimate(X, mask=mask, nfe=128, cond=seen(mask))
    plain = density().estimate(X, mask=mask, nfe=128, cond=seen(mask))
    assert_covers(found.log_prob, marginal(MIXTURE, X, mask), found.stderr)
    assert float(found.stderr.mean()) < float(plain.stderr.mean())


@pytest.mark.parametrize("masked_fit", [False, True])
def test_error_bars_cover_whatever_the_reference_was_fitted_to(masked_fit):
    """Low-discrepancy bars calibrated on whole samples cover 87 % here, so masked ones get independent noise."""
    target = MIXTURES["unequal, d = 8"]
    generator = torch.Generator().manual_seed(7)
    data, x = (target.sample(count, generator) for count in (1000, 200))
    mask = torch.rand(1000, 8, generator=generator) < 0.6
    mask[:, 0] |= ~mask.any(1)
    given = mask if masked_fit else torch.ones_like(mask)
    fitted = fs.ScoreDensity(MarginalEps(target), SCHEDULE, "eps", program=False).fit(
        data, mask=mask if masked_fit else None, reference="diagonal", evaluations=120_000, cond=seen(given)
    )
    assert bool(fitted.nodes.calibration.numel()) != masked_fit
    mask = mask[:200]
    truth, inside = marginal(target, x, mask), []
    for seed in range(3):
        found = fitted.estimate(x, mask=mask, nfe=256, seed=seed, cond=seen(mask))
        inside.append((found.log_prob - truth).abs() < 1.96 * found.stderr)
    assert found.noise == "independent"
    # Four binomial errors of 600 estimates.
    assert abs(float(torch.cat(inside).double().mean()) - 0.95) < 4 * (0.95 * 0.05 / 600) ** 0.5


def test_a_fit_says_nothing_where_no_entry_counts_in_every_sample(recwarn):
    data, mask = MIXTURE.sample(200, torch.Generator().manual_seed(30)), torch.zeros(200, 6, dtype=torch.bool)
    mask[:100, :3] = mask[100:, 3:] = True
    density().fit(data, mask=mask, evaluations=4000, cond=seen(mask))
    assert [str(warning.message) for warning in recwarn] == []


def test_full_covariances_are_refused_unless_everything_counts():
    full = fs.ScoreDensity(MarginalEps(MIXTURE), SCHEDULE, "eps", reference=FULL, program=False)
    with pytest.raises(ValueError, match=r"a reference that is diagonal in the entries.*reference='diagonal'"):
        full.estimate(X, mask=MASK, cond=seen(MASK))
    every = torch.ones(40, 6) > 0
    found, plain = (full.estimate(X, nfe=32, cond=seen(every), **kw) for kw in ({"mask": every}, {}))
    assert torch.allclose(found.log_prob, plain.log_prob, rtol=1e-10)
    full.fit(X, mask=MASK, evaluations=1000, cond=seen(MASK))  # an earlier reference is no reason against a new one
    assert not full.reference.full
    with pytest.raises(ValueError, match="with a mask reference must be 'auto', 'isotropic' or 'diagonal'"):
        full.fit(X, mask=MASK, reference="full", cond=seen(MASK))
