"""Masks: the density of some entries given the others, each sample with entries of its own."""

import math

import pytest
import torch
from masked_data import (
    MASK,
    MIXTURE,
    REFERENCES,
    SCHEDULE,
    ConditionalEps,
    MarginalEps,
    Plain,
    X,
    assert_covers,
    conditional,
    density,
    draw,
    marginal,
    seen,
)
from mixtures import Mixture
from torch import nn

import fastscore as fs
from fastscore.process.masks import broadcast_mask
from fastscore.runs.data_mask import DataMask

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_density_is_that_of_the_entries_that_count(reference):
    """Against the marginal's own log-density; the network answers 7 outside, which must not matter."""
    found = density(reference).estimate(X, mask=MASK, nfe=256, cond=seen(MASK))
    truth = marginal(MIXTURE, X, MASK)
    assert_covers(found.log_prob, truth, found.stderr)
    assert float(found.stderr.mean()) < 1  # a number that says something, of log-densities that spread by 2
    assert torch.equal(found.dims, MASK.sum(1))
    differentiable = density(reference).log_prob(X, mask=MASK, nfe=256, cond=seen(MASK))
    assert torch.allclose(differentiable, found.log_prob, rtol=1e-12)


def test_the_network_sees_the_others_as_they_are():
    """Imputation: log p of the targets given the observed entries, by a network that reads them from x_t."""
    half = draw(5, 5, seed=8)
    cov = half @ half.T + 0.2 * torch.eye(5, dtype=torch.float64)
    x = draw(12, 5, seed=9) @ torch.linalg.cholesky(cov).T
    given = torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    given[:, 0], given[:, 1] = True, False
    exact = fs.ScoreDensity(ConditionalEps(cov), SCHEDULE, "eps", program=False)
    found = exact.estimate(x, mask=~given, nfe=128, given=given)
    truth = torch.stack(
        [torch.distributions.MultivariateNormal(*conditional(cov, p, k)).log_prob(p[~k]) for p, k in zip(x, given)]
    )
    assert_covers(found.log_prob, truth, found.stderr)
    losses = torch.stack(
        [fs.density_loss(exact, x, mask=~given, seed=s, reduction="none", given=given) for s in range(100)]
    )
    assert_covers(losses.mean(0), -truth, losses.std(0) / 10)
    # A generator's loss is the same number.
    y = x.clone().requires_grad_()
    term = fs.score_regularization(exact, y, mask=~given, seed=3, antithetic=False, given=given)
    assert float(term.detach()) == float(losses[3].mean())


def test_imputation_on_a_table_of_timesteps():
    """Independent N(0, 0.8^2) in 3 channels of 6 steps; masks of 1 and 0, as imputation's networks get them."""
    schedule, std = fs.DDPM.linear(1000), 0.8

    class Imputer(nn.Module):
        def forward(self, x, t, observed, values):
            alpha, sigma = (v[:, None, None] for v in schedule.alpha_sigma(t))
            return (sigma * x.double() / (alpha**2 * std**2 + sigma**2) * (1 - observed)).to(x.dtype)

    x = (std * draw(6, 3, 6, seed=60)).float()
    observed = (torch.rand(6, 3, 6, generator=torch.Generator().manual_seed(61)) < 0.5).float()
    cond = {"observed": observed, "values": x * observed}
    found = fs.ScoreDensity(Imputer(), schedule, "eps").estimate(x, mask=1 - observed, nfe=512, cond=cond)
    truth = ((1 - observed) * torch.distributions.Normal(0.0, std).log_prob(x)).sum((1, 2))
    assert bool(((found.log_prob - truth).abs() < 4 * found.stderr + found.truncation_per_sample).all())
    assert float(found.stderr.max()) < 0.2


@pytest.mark.parametrize("program", [False, True])
def test_a_backend_with_kernels_gives_the_same_numbers(program):
    """Triton's noise and plain residuals, in the interpreter; to float32's rounding of sums of about 50."""
    torch.manual_seed(0)
    net, x = Plain(64), X[:3].float()
    options = {"program": program, "reference": REFERENCES["mixture"]}
    both = [
        fs.ScoreDensity(net, SCHEDULE, "eps", backend=backend, **options).estimate(x, mask=MASK[:3], nfe=8).log_prob
        for backend in ("torch", "triton")
    ]
    assert torch.allclose(*both, rtol=1e-5, atol=1e-3)


def test_a_mask_that_takes_nothing_out_changes_nothing():
    every = torch.ones(1, 6)
    for method in ("density", "discrete", "elbo"):
        options = {"method": method, "nfe": 32, "cond": seen(torch.ones(40, 6) > 0)}
        masked, plain = (density("mixture").estimate(X, **options, **kw) for kw in ({"mask": every}, {}))
        assert torch.allclose(masked.log_prob, plain.log_prob, rtol=1e-11)
        assert torch.allclose(masked.stderr, plain.stderr, rtol=1e-11)


def test_padded_sequences_are_what_each_is_by_itself():
    """Sequences of 2 to 5 steps in two channels: the same numbers as without padding, whatever stands in it."""
    lengths = torch.tensor([5, 2, 3, 4])
    target = Mixture(draw(2, 10, seed=11), torch.tensor(0.6))
    x = draw(4, 5, 2, seed=12)
    there = (torch.arange(5) < lengths[:, None])[..., None]
    exact = fs.ScoreDensity(MarginalEps(target), SCHEDULE, "eps", program=False)
    cond = seen(there.expand(4, 5, 2))
    found = exact.estimate(x, mask=there, nfe=64, cond=cond)
    filled = exact.estimate(torch.where(there, x, -99.0), mask=there.float(), nfe=64, cond=cond)
    assert torch.equal(found.dims, 2 * lengths)
    for i, n in enumerate(lengths.tolist()):
        own = x[i : i + 1, :n]
        alone = exact.estimate(own, nfe=64, sample_index=torch.tensor([i]), cond=seen(torch.ones_like(own) > 0))
        assert alone.dims == 2 * n
        for other in (found, filled):  # sums of float64 in another order
            assert float(alone.log_prob) == pytest.approx(float(other.log_prob[i]), rel=1e-10)
            assert float(alone.stderr) == pytest.approx(float(other.stderr[i]), rel=1e-8)
            bits = float(alone.bits_per_dim(256)), float(other.bits_per_dim(256)[i])
            assert bits[0] == pytest.approx(bits[1], rel=1e-10)


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("method", ["density", "discrete", "elbo"])
def test_every_method_counts_the_same_entries(method, reference):
    """A mask of the first entries is the density of shorter data: with the same noise, so to rounding."""
    kept = torch.arange(6) < 4
    q = REFERENCES[reference]
    shorter = q if q.mean.shape[1] == 1 else fs.Reference(q.weight, q.mean[:, :4], q.variance[:, :4])
    plain = fs.ScoreDensity(MarginalEps(MIXTURE), SCHEDULE, "eps", reference=shorter, program=False)
    found = density(reference).estimate(X, mask=kept, method=method, nfe=32, cond=seen(kept.expand(40, 6)))
    alone = plain.estimate(X[:, :4], method=method, nfe=32, cond=seen(torch.ones(40, 4) > 0))
    # The last column of the ends is the reference's own slowest decay, which all of its dimensions decide.
    pairs = [(v.log_prob, v.stderr, v.ends[..., :6], v.bits_per_dim(), v.bits_per_dim_stderr()) for v in (found, alone)]
    for ours, theirs in zip(*pairs):
        assert torch.allclose(ours, theirs, rtol=1e-11, atol=1e-11)


def test_chunks_batches_and_company_change_nothing(in_chunks):
    whole = density("mixture").estimate(X, mask=MASK, nfe=32, seed=2, cond=seen(MASK))
    for i in (0, 17):
        one = slice(i, i + 1)
        index = torch.tensor([i])
        alone = density("mixture").estimate(
            X[one], mask=MASK[one], nfe=32, seed=2, sample_index=index, cond=seen(MASK[one])
        )
        assert float(alone.log_prob) == pytest.approx(float(whole.log_prob[i]), rel=1e-10)
    for rows in (7, 32, 150):
        in_chunks(rows)
        cut = density("mixture").estimate(X, mask=MASK, nfe=32, seed=2, cond=seen(MASK))
        assert torch.allclose(cut.log_prob, whole.log_prob, rtol=1e-10)
        assert torch.allclose(cut.stderr, whole.stderr, rtol=1e-8)


def test_gradients_are_those_of_the_number():
    """Central differences of the same noise: error of the order of the step squared."""
    x, mask = X[:2].clone().requires_grad_(), MASK[:2]
    exact = density("mixture")
    exact.log_prob(x, mask=mask, nfe=16, cond=seen(mask)).sum().backward()
    step = 1e-5
    for i in range(2):
        for j in range(6):
            moved = [X[:2].clone() for _ in range(2)]
            moved[0][i, j] -= step
            moved[1][i, j] += step
            low, high = (float(exact.log_prob(y, mask=mask, nfe=16, cond=seen(mask)).sum()) for y in moved)
            assert float(x.grad[i, j]) == pytest.approx((high - low) / (2 * step), rel=1e-5, abs=1e-6)
    assert bool((x.grad[~mask] == 0).all())  # this network does not look there


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        ([True] * 6, "mask must be a tensor of True and False"),
        (0.5 * torch.ones(40, 6), "got other numbers"),
        (torch.ones(40, 5), r"mask must broadcast to x \(40, 6\), got \(40, 5\)"),
        (torch.ones(40, 6, 1), "mask must broadcast"),
        (torch.zeros(40, 1), "mask must be True for at least one entry of every sample, got none in 40 of 40"),
    ],
)
def test_masks_that_say_nothing_clear_are_refused(mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        density().estimate(X, mask=mask, cond=seen(MASK))


# Shapes of masks, of x, and of the same mask with all dimensions; without one the mask is refused.
SHAPES = [
    ((5, 4), (5, 4, 3), (5, 4, 1)),  # places of each sample
    ((5, 4), (5, 4, 3, 2), (5, 4, 1, 1)),
    ((4, 3), (5, 4, 3), (1, 4, 3)),  # entries, shared
    ((3,), (5, 4, 3), (1, 1, 3)),
    ((4,), (4, 4), (1, 4)),  # not of samples, which a mask never leaves out as a whole
    ((4, 1), (4, 4, 3), (1, 4, 1)),
    ((1, 4), (5, 4, 3), (1, 4, 1)),
    ((5, 4, 1), (5, 4, 3), (5, 4, 1)),
    ((3, 3), (3, 3, 3), None),
    ((1, 3), (5, 3, 3), None),
    ((3, 3), (3, 3, 3, 3), None),
]


@pytest.mark.parametrize(("own", "shape", "full"), SHAPES, ids=str)
def test_a_mask_is_of_the_first_dimensions_or_of_the_last(own, shape, full):
    x, mask = torch.randn(shape), torch.arange(math.prod(own)).reshape(own) % 3 < 2
    if full is None:
        for refuse in (lambda: broadcast_mask(mask, x), lambda: DataMask.of("mask", mask, shape)):
            with pytest.raises(ValueError, match=r"mask \(.*\) fits .* in two ways; give it as many dimensions: \("):
                refuse()
        return
    assert torch.equal(broadcast_mask(mask, x), mask.reshape(full).expand(shape))
    assert torch.equal(DataMask.of("mask", mask.numpy(), shape).at(slice(None), x.device), mask.reshape(full))
