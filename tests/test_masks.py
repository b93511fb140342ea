"""Masks: the density of some entries given the others, each sample with entries of its own."""

import math
import re
from pathlib import Path

import pytest
import torch
from mixtures import MIXTURES, Mixture
from torch import nn

import fastscore as fs
from fastscore.process.masks import broadcast_mask
from fastscore.runs.data_mask import DataMask

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = fs.LogSNR(-12, 12)
PAGE = Path(__file__).parent.parent / "docs" / "masks.md"


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class MarginalEps(nn.Module):
    """The exact network of a mixture's marginal on the entries of a mask; elsewhere it answers with `outside`."""

    def __init__(self, mixture, schedule=SCHEDULE, outside=7.0):
        super().__init__()
        self.mixture, self.schedule, self.outside = mixture, schedule, outside

    def forward(self, x, t, mask, shift=None):
        shape, x, mask = x.shape, x.flatten(1).double(), mask.flatten(1)
        alpha, sigma = (v[:, None, None] for v in self.schedule.alpha_sigma(t))
        target = self.mixture
        d = x.shape[1]
        mean, std = target.mean[:, :d], target.std[:, :d]
        mean = mean if shift is None else mean + shift.double()[:, None, None]
        variance = alpha**2 * std**2 + sigma**2
        gap = x[:, None] - alpha * mean
        logits = target.weight.log() - 0.5 * ((gap.square() / variance + variance.log()) * mask[:, None]).sum(2)
        eps = sigma[:, 0] * (logits.softmax(1)[..., None] * gap / variance).sum(1)
        return torch.where(mask, eps, self.outside).reshape(shape).to(t.dtype)


class ConditionalEps(nn.Module):
    """The exact network of N(0, C) that imputes: it sees the entries outside of the mask as they are."""

    def __init__(self, cov):
        super().__init__()
        self.cov = cov

    def forward(self, x, t, given):
        eps = torch.zeros_like(x)
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        for i, known in enumerate(given):
            mean, cov = conditional(self.cov, x[i], known)
            total = alpha[i] ** 2 * cov + sigma[i] ** 2 * torch.eye(len(cov))
            eps[i, ~known] = sigma[i] * torch.linalg.solve(total, x[i, ~known] - alpha[i] * mean)
        return eps


class Plain(nn.Module):
    """A network that is a row program."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, 6))

    def forward(self, x, t):
        return self.net(x)


def conditional(cov, x, known):
    gain = torch.linalg.solve(cov[known][:, known], cov[known][:, ~known]).T
    return gain @ x[known], cov[~known][:, ~known] - gain @ cov[known][:, ~known]


MIXTURE = Mixture(1.5 * _draw(3, 6, seed=1), 0.3 + 0.5 * _draw(3, 6, seed=2).abs(), torch.tensor([0.5, 0.3, 0.2]))
X = MIXTURE.sample(40, torch.Generator().manual_seed(3)).double()
MASK = torch.rand(40, 6, generator=torch.Generator().manual_seed(4)) < 0.6
MASK[:, 2] |= ~MASK.any(1)
DIAGONAL = fs.Reference(torch.tensor([0.4, 0.6]), _draw(2, 6, seed=5), 0.5 + _draw(2, 6, seed=6).square())
REFERENCES = {
    "isotropic": fs.Reference.isotropic(1.3),
    "diagonal": DIAGONAL.gaussian(),
    "mixture": DIAGONAL,
}


def marginal(mixture, x, mask):
    rows = []
    for point, kept in zip(x, mask):
        part = Mixture(mixture.mean[:, kept], mixture.std[:, kept], mixture.weight)
        rows.append(part.log_prob(point[kept][None]))
    return torch.cat(rows)


def density(reference="isotropic", **options):
    options = {"program": False, "noise": "independent"} | options
    return fs.ScoreDensity(MarginalEps(MIXTURE), SCHEDULE, reference=REFERENCES[reference], **options)


def seen(mask):
    return {"mask": mask}


def assert_covers(found, truth, stderr):
    """Independent normal errors: their squares add up to chi2, here within 5 of its own standard deviations."""
    z = ((found - truth) / stderr).square()
    assert abs(float(z.sum()) - len(z)) < 5 * math.sqrt(2 * len(z)) + 2


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
    half = _draw(5, 5, seed=8)
    cov = half @ half.T + 0.2 * torch.eye(5, dtype=torch.float64)
    x = _draw(12, 5, seed=9) @ torch.linalg.cholesky(cov).T
    given = torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    given[:, 0], given[:, 1] = True, False
    exact = fs.ScoreDensity(ConditionalEps(cov), SCHEDULE, program=False)
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

    x = (std * _draw(6, 3, 6, seed=60)).float()
    observed = (torch.rand(6, 3, 6, generator=torch.Generator().manual_seed(61)) < 0.5).float()
    cond = {"observed": observed, "values": x * observed}
    found = fs.ScoreDensity(Imputer(), schedule).estimate(x, mask=1 - observed, nfe=512, cond=cond)
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
        fs.ScoreDensity(net, SCHEDULE, backend=backend, **options).estimate(x, mask=MASK[:3], nfe=8).log_prob
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
    target = Mixture(_draw(2, 10, seed=11), torch.tensor(0.6))
    x = _draw(4, 5, 2, seed=12)
    there = (torch.arange(5) < lengths[:, None])[..., None]
    exact = fs.ScoreDensity(MarginalEps(target), SCHEDULE, program=False)
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
    plain = fs.ScoreDensity(MarginalEps(MIXTURE), SCHEDULE, reference=shorter, program=False)
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


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_reference_knows_its_marginals(reference):
    """A mask against the same reference in fewer dimensions."""
    q, kept = REFERENCES[reference], torch.tensor([True, False, True, True, False, False])
    small = q if q.mean.shape[1] == 1 else fs.Reference(q.weight, q.mean[:, kept], q.variance[:, kept])
    mask = kept.expand(5, 6)
    x, eps = X[:5], torch.where(kept, _draw(5, 3, 6, seed=20), 0)
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
    fitted = fs.ScoreDensity(MarginalEps(target), SCHEDULE, program=False).fit(
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


def test_the_loss_is_the_density_on_average():
    exact, repeats = density("mixture"), 200
    for antithetic in (False, True):
        options = {"reduction": "none", "antithetic": antithetic, "draws": 2}
        losses = torch.stack(
            [fs.density_loss(exact, X, mask=MASK, seed=s, cond=seen(MASK), **options) for s in range(repeats)]
        )
        error = losses.std(0) / repeats**0.5
        assert_covers(losses.mean(0), -marginal(MIXTURE, X, MASK), error)


def test_the_loss_shows_the_others_as_they_are():
    class Recording(nn.Module):
        def forward(self, x, t, there):
            self.others = x[~there]
            return torch.zeros_like(x)

    net, x = Recording(), torch.where(MASK, X, 5.0)
    fs.density_loss(fs.ScoreDensity(net, SCHEDULE), x, mask=MASK, seed=0, draws=3, antithetic=True, there=MASK)
    assert len(net.others) == 6 * int((~MASK).sum())
    assert bool((net.others == 5).all())


def test_a_difference_of_conditions():
    a, b = (masked_and(shift) for shift in (0.0, 0.4))
    found = density().compare(X, a, b, mask=MASK, nfe=512)
    moved = Mixture(MIXTURE.mean + 0.4, MIXTURE.std, MIXTURE.weight)
    truth = marginal(MIXTURE, X, MASK) - marginal(moved, X, MASK)
    assert_covers(found.difference, truth, found.stderr)


def masked_and(shift):
    return {"mask": MASK, "shift": torch.full((40,), shift)}


def test_a_classifier_sees_the_same_entries():
    classes = {"shift": torch.tensor([0.0, 1.0])}
    found = fs.DiffusionClassifier(density(), classes).classify(X, mask=MASK, nfe=256, error=None, cond=seen(MASK))
    logs = [marginal(Mixture(MIXTURE.mean + s, MIXTURE.std, MIXTURE.weight), X, MASK) for s in (0.0, 1.0)]
    truth = torch.stack(logs, 1).log_softmax(1)
    assert float((found.log_posterior.exp() - truth.exp()).abs().max()) < 0.25
    assert float((found.log_posterior.exp() - truth.exp()).abs().mean()) < 0.05


def test_captured_is_the_estimate():
    options = {"mask": MASK, "nfe": 32, "cond": seen(MASK)}
    exact = density("mixture")
    log_prob, stderr = fs.CapturedDensity(exact, X, **options)(X)
    found = exact.estimate(X, **options)
    assert torch.allclose(log_prob, found.log_prob, rtol=1e-12)
    assert torch.allclose(stderr, found.stderr, rtol=1e-10)


def test_an_elementwise_transform_counts_its_own_determinant():
    mean, std = _draw(6, seed=40), 0.5 + _draw(6, seed=41).abs()
    user = mean + std * X
    found = fs.Transformed(density(), fs.transforms.zscore(mean, std)).estimate(
        user, mask=MASK, nfe=64, cond=seen(MASK)
    )
    inner = density().estimate((user - mean) / std, mask=MASK, nfe=64, cond=seen(MASK))
    assert torch.allclose(found.log_prob, inner.log_prob - (MASK * std.log()).sum(1), rtol=1e-10)
    white = fs.Transformed(density(), fs.transforms.whiten(X))
    with pytest.raises(ValueError, match="a mask needs a transform that acts on every entry by itself"):
        white.log_prob(X, mask=MASK, cond=seen(MASK))


def test_levels_outside_of_the_mask_have_no_probability():
    """The bound for four levels in all, against that of data which have only these; the same noise."""
    k = torch.randint(0, 8, (10, 6), generator=torch.Generator().manual_seed(50))
    levels, kept = fs.Levels(8, -1, 1), (torch.arange(6) < 4)
    full = seen(torch.ones(10, 4) > 0)
    found = fs.discrete_log_prob(density(), k, levels, mask=kept, nfe=32, cond=seen(kept.expand(10, 6)))
    alone = fs.discrete_log_prob(density(), k[:, :4], levels, nfe=32, cond=full)
    assert torch.allclose(found.log_prob, alone.log_prob, rtol=1e-4)  # float32 data
    assert torch.allclose(found.bits_per_dim(), alone.bits_per_dim(), rtol=1e-4)


def test_metrics_divide_by_the_sample_s_own_dimensions():
    metrics = pytest.importorskip("fastscore.metrics", exc_type=ImportError)
    found = density().estimate(X, mask=MASK, nfe=32, cond=seen(MASK))
    for metric, want in (
        (metrics.NegativeLogLikelihood(density(), nfe=32), -found.log_prob),
        (metrics.BitsPerDim(density(), 256, -2, 2, nfe=32), found.bits_per_dim(256, -2, 2)),
    ):
        for part in (slice(0, 25), slice(25, 40)):
            metric.update(X[part], mask=MASK[part], cond=seen(MASK[part]))
        assert float(metric.compute()[metric.name]) == pytest.approx(float(want.mean()), rel=1e-9)
    least, most = int(MASK.sum(1).min()), int(MASK.sum(1).max())
    assert f"{least} to {most} dims" in repr(found)


def test_a_row_program_runs_with_a_mask():
    net = Plain(8).double()
    both = [
        fs.ScoreDensity(net, SCHEDULE, program=program).estimate(X, mask=MASK, nfe=32).log_prob
        for program in (False, True)
    ]
    assert torch.allclose(*both, rtol=1e-10)


FULL = fs.Reference(torch.ones(1), torch.zeros(1, 6), torch.ones(1, 6), torch.eye(6)[None])


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


def test_full_covariances_are_refused_unless_everything_counts():
    full = fs.ScoreDensity(MarginalEps(MIXTURE), SCHEDULE, reference=FULL, program=False)
    with pytest.raises(ValueError, match=r"a mask needs a reference without full covariances.*reference='diagonal'"):
        full.estimate(X, mask=MASK, cond=seen(MASK))
    every = torch.ones(40, 6) > 0
    found, plain = (full.estimate(X, nfe=32, cond=seen(every), **kw) for kw in ({"mask": every}, {}))
    assert torch.allclose(found.log_prob, plain.log_prob, rtol=1e-10)
    full.fit(X, mask=MASK, evaluations=1000, cond=seen(MASK))  # an earlier reference is no reason against a new one
    assert not full.reference.full
    with pytest.raises(ValueError, match="with a mask reference must be 'auto', 'isotropic' or 'diagonal'"):
        full.fit(X, mask=MASK, reference="full", cond=seen(MASK))


def test_the_page_s_blocks_run():
    class Padded(nn.Module):
        def forward(self, x, t, lengths=None, mask=None, node_mask=None):
            assert lengths is None or len(lengths) == len(x)
            return x

    atoms = torch.arange(4) < torch.tensor([[3], [4]])
    positions = torch.randn(2, 4, 3) * atoms[..., None]
    positions -= positions.sum(1, keepdim=True) / atoms.sum(1)[:, None, None] * atoms[..., None]
    names = {"imputer": Padded(), "sequences": Padded(), "egnn": Padded(), "step": 1, "atoms": atoms}
    names |= {"x": torch.randn(3, 4), "missing": torch.eye(3, 4) > 0, "padded": torch.randn(3, 5, 2)}
    names |= {"positions": positions}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    assert names["result"].dims.tolist() == [10, 4, 8]
    assert names["found"].dims.tolist() == [6, 9]
    assert bool(torch.isfinite(names["loss"]))


def imputation(count=4):
    """The exact network of a Gaussian that imputes, data, and which entries are given."""
    half = _draw(5, 5, seed=8)
    cov = half @ half.T + 0.2 * torch.eye(5, dtype=torch.float64)
    x = _draw(count, 5, seed=9) @ torch.linalg.cholesky(cov).T
    given = torch.rand(count, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    given[:, 0], given[:, 1] = True, False
    reference = fs.Reference(torch.ones(1), torch.zeros(1, 5), cov.diagonal()[None])
    return cov, x, given, fs.ScoreDensity(ConditionalEps(cov), SCHEDULE, reference=reference, program=False)


def conditional_log_prob(cov, x, given):
    """With the noise that is left where the ODE starts."""
    rows = []
    for point, known in zip(x, given):
        mean, own = conditional(cov, point, known)
        own = own + math.exp(-SCHEDULE.log_snr_range[1]) * torch.eye(len(own), dtype=torch.float64)
        rows.append(torch.distributions.MultivariateNormal(mean, own).log_prob(point[~known]))
    return torch.stack(rows)


@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_the_ode_moves_the_entries_that_count_and_gives_their_conditional_density(trace):
    cov, x, given, exact = imputation()
    options = {"method": "midpoint", "steps": 256, "trace": trace, "probes": 64}
    found = fs.probability_flow_log_prob(exact, x, mask=~given, given=given, **options)
    truth = conditional_log_prob(cov, x, given)
    # 256 steps of a second-order rule over a smooth path; the prior's mean is off by e^-6 of the conditional's.
    assert bool(((found.log_prob - truth).abs() < 0.01 + 4 * found.stderr).all())
    assert float(found.stderr.max()) < 0.5
    assert bool((found.truncation < 0.05).all())


def test_the_ode_of_masked_data_has_gradients_in_what_counts_and_in_what_is_given():
    cov, x, given, exact = imputation(2)
    leaf, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = fs.probability_flow_log_prob(exact, leaf, mask=~given, given=given, method="midpoint", steps=256).log_prob
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    (expected,) = torch.autograd.grad(conditional_log_prob(cov, plain, given).sum(), plain)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0.01)
    assert float(expected[given].abs().max()) > 0.1


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_ode_of_some_entries_is_that_of_shorter_data(reference):
    """Whatever stands outside, and whatever the network answers there; "auto" stops at the same steps."""
    kept, q = torch.arange(6) < 4, REFERENCES[reference]
    shorter = q if q.mean.shape[1] == 1 else fs.Reference(q.weight, q.mean[:, :4], q.variance[:, :4])
    plain = fs.ScoreDensity(MarginalEps(MIXTURE), SCHEDULE, reference=shorter, program=False)
    # The grid follows the reference's widest and narrowest dimension, so those have to be the same.
    masked = density(reference)
    smallest, largest = shorter.scales()
    if (smallest, largest) != q.scales():
        masked = fs.ScoreDensity(masked.model, SCHEDULE, reference=_padded(shorter), program=False)
    x = torch.where(kept, X[:3], 50.0)
    found = fs.probability_flow_log_prob(masked, x, mask=kept, cond=seen(kept.expand(3, 6)), error=0.05)
    alone = fs.probability_flow_log_prob(plain, X[:3, :4], cond=seen(torch.ones(3, 4) > 0), error=0.05)
    for name in ("log_prob", "discretization", "truncation"):
        torch.testing.assert_close(getattr(found, name), getattr(alone, name), rtol=1e-8, atol=1e-8)
    assert torch.equal(found.nfe, alone.nfe)


def _padded(reference):
    """The same mixture with two more dimensions that repeat its first."""
    mean, variance = (torch.cat([v, v[:, :2]], 1) for v in (reference.mean, reference.variance))
    return fs.Reference(reference.weight, mean, variance)
