"""The diffusion classifier against exact posteriors, its error bars and eliminations at their levels, real digits."""

import math
from types import SimpleNamespace

import class_digits
import pytest
import torch
from analytic import ExactNet, Target
from scipy.stats import t as student
from torch import nn

import fastscore as fs
from fastscore.estimator.rules import uniform_in_time
from fastscore.estimator.statistics import student_quantile

SCHEDULE = fs.LogSNR(-10, 12)
OUTSIDE = 2e-3  # nats that lie outside this range for classes as far apart as these


class ClassNet(nn.Module):
    """The exact network of one target a class."""

    def __init__(self, targets, schedule=SCHEDULE):
        super().__init__()
        self.nets = [ExactNet(target, schedule) for target in targets]

    def forward(self, x_t, t, y, shift=None):
        out = torch.empty_like(x_t)
        for c in y.unique().tolist():
            mine = y == c
            out[mine] = self.nets[c](x_t[mine], t[mine], None if shift is None else shift[mine])
        return out


def overlapping(classes=4, d=3, spread=0.7, seed=0):
    """Mixtures of two Gaussians a class, so near each other that many points have two likely classes."""
    generator = torch.Generator().manual_seed(seed)
    cov = 0.25 * torch.eye(d).expand(2, d, d)
    return [
        Target(torch.tensor([0.4, 0.6]), spread * torch.randn(2, d, generator=generator), cov) for _ in range(classes)
    ]


TARGETS = overlapping()
PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1])


def classifier(targets=TARGETS, prior=None, schedule=SCHEDULE, **options):
    density = fs.ScoreDensity(ClassNet(targets, schedule), schedule, **{"predicts": "eps"} | options)
    return fs.DiffusionClassifier(density, {"y": torch.arange(len(targets))}, prior)


def points(count, targets=TARGETS, seed=0):
    """Return as many points of every class, float64."""
    return torch.cat([target.sample(count, seed=seed + c) for c, target in enumerate(targets)])


def exact(x, targets=TARGETS, prior=None):
    log_likelihood = torch.stack([target.log_prob(x) for target in targets], 1)
    log_prior = math.log(1 / len(targets)) if prior is None else prior.double().log()
    return log_likelihood, (log_likelihood + log_prior).log_softmax(1)


def within(found, expected, stderr, count=4):
    """Whether nearly all errors are within `count` standard errors, and what 95 % intervals cover."""
    error = (found - expected).abs()
    assert float((error < count * stderr + OUTSIDE).double().mean()) > 0.99  # Student's t has heavy tails
    return float((error < 1.96 * stderr + OUTSIDE).double().mean())


@pytest.fixture(scope="module")
def fitted():
    return classifier(prior=PRIOR).fit(points(10, seed=50), progress=False)


@pytest.mark.parametrize("error", [None, 0.05])
@pytest.mark.parametrize("fit", [False, True])
def test_posterior_is_bayes_rule(fitted, fit, error):
    x = points(60)
    found = (fitted if fit else classifier(prior=PRIOR)).classify(x, nfe=256, error=error, seed=1)
    log_likelihood, log_posterior = exact(x, prior=PRIOR)
    # 960 intervals of 95 %, whose share has an error of 1.4 % if a point's four classes count as one.
    assert within(found.log_likelihood, log_likelihood, found.stderr) > 0.91
    assert within(found.log_posterior, log_posterior, found.log_posterior_stderr) > 0.91
    assert torch.allclose(found.log_posterior.exp().sum(1), torch.ones(len(x), dtype=torch.float64), atol=1e-12)
    assert torch.equal(found.prediction, found.log_posterior.argmax(1))
    unlike = found.prediction != log_posterior.argmax(1)
    top2 = log_posterior.topk(2, dim=1).values
    assert float((top2[:, 0] - top2[:, 1])[unlike].max() if bool(unlike.any()) else 0) < 0.5  # only near ties differ


def test_error_bars_are_not_far_too_wide(fitted):
    x = points(40)
    seeds = [fitted.classify(x, nfe=128, error=None, seed=seed) for seed in range(8)]
    spread = torch.stack([found.log_posterior for found in seeds]).std(0)
    stated = torch.stack([found.log_posterior_stderr for found in seeds]).mean(0)
    ratio = float((stated.square().mean() / spread.square().mean()).sqrt())
    # Their own error is 2 % (160 x 3 x 7 degrees of freedom); above 1 is what Student's t and the nodes' steps add.
    assert 0.9 < ratio < 1.4


def test_common_noise_and_pairs_make_differences_accurate():
    pair, x = classifier(TARGETS[:2]), points(50, TARGETS[:2])
    label = {c: {"y": torch.full((100,), c)} for c in range(2)}
    found = pair.classify(x, nfe=64, error=None)
    # log p(0 | x) and log p(1 | x) move against each other: the error of their difference is the sum of theirs.
    of_difference = float(found.log_posterior_stderr.sum(1).median())
    assert of_difference < 0.7 * 2**0.5 * float(found.stderr.median())
    # `compare` has the same noise for both, but no pairs, which take out what is odd in the noise.
    compared = pair.density.compare(x, label[0], label[1], nfe=64)
    assert of_difference < 0.7 * float(compared.stderr.median())


def test_fitted_nodes_lower_the_error(fitted):
    x = points(40)
    before, after = (c.classify(x, nfe=64, error=None) for c in (classifier(prior=PRIOR), fitted))
    assert float(after.log_posterior_stderr.square().mean()) < 0.7 * float(before.log_posterior_stderr.square().mean())


@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("error", [0.05, 0.3])
def test_the_best_class_is_dropped_no_more_often_than_stated(error, fit):
    """The hardest case: a second class as likely as the first but for 0.02 nats, in many repetitions of the noise."""
    x, repetitions = points(40), 1000
    log_likelihood, _ = exact(x)
    near = log_likelihood.topk(2, dim=1).values.diff(dim=1)[:, 0].argsort(descending=True)[::27]
    one = classifier()
    if fit:
        one.fit(points(10, seed=50), progress=False)
    wrong, left = [], []
    for at, each in zip(x[near], log_likelihood[near]):
        first, second = each.topk(2).indices
        prior = torch.ones(4, dtype=torch.float64)
        prior[second] = torch.exp(each[first] - each[second] - 0.02)
        one.log_prior.copy_((prior / prior.sum()).log())
        found = one.classify(at.expand(repetitions, -1), nfe=64, error=error)
        wrong.append(float((~found.active[:, first]).double().mean()))
        left.append(float(found.active.double().sum(1).mean()))
    assert len(wrong) == 6
    assert max(wrong) < error + 3 * (error * (1 - error) / repetitions) ** 0.5
    assert min(left) < 3  # nor is the level held by dropping nothing: of four classes two are far less likely


def test_elimination_saves_evaluations():
    targets = overlapping(classes=10, d=8, spread=2.0)
    many = classifier(targets)
    x = points(10, targets)
    full, early = (many.classify(x, nfe=256, error=error) for error in (None, 0.05))
    assert full.nfe.tolist() == [2560] * 100
    assert not bool(full.decided.any())
    assert torch.equal(early.prediction, full.prediction)
    assert float(early.decided.double().mean()) > 0.95
    # 32 evaluations per class are spent before anything can be dropped: a factor of 8 is the limit.
    assert float(full.nfe.sum() / early.nfe.sum()) > 2.5
    log_posterior = exact(x, targets)[1]
    # A dropped class keeps its paired difference to the best.
    within(early.log_posterior, log_posterior, early.log_posterior_stderr)


def test_evaluations_are_counted(fitted):
    rows = SimpleNamespace(count=0)
    hook = fitted.density.model.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(rows, "count", rows.count + len(args[0])), with_kwargs=True
    )
    x = points(5)
    fitted.classify(x, nfe=64)  # measures how much memory a row takes
    rows.count = 0
    found = fitted.classify(x, nfe=64)
    hook.remove()
    assert rows.count == int(found.nfe.sum())
    assert int(found.nfe.max()) <= 4 * 64


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_same_answer_however_the_work_is_cut(dtype, tolerance):
    one, x = classifier(), points(10).to(dtype)
    whole = one.classify(x, nfe=64, seed=2)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = [one.classify(x[i], nfe=64, seed=2, sample_index=i) for i in order.split(7)]
    small = one.classify(x, nfe=64, seed=2, memory="200KB")
    for name in ("log_likelihood", "log_posterior", "stderr", "log_posterior_stderr"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name)[order], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(getattr(small, name), getattr(whole, name), rtol=tolerance, atol=tolerance)
        assert getattr(whole, name).dtype == dtype
    assert torch.equal(torch.cat([part.active for part in parts]), whole.active[order])
    assert not torch.equal(one.classify(x, nfe=64, seed=3).log_posterior, whole.log_posterior)


def test_memory_does_not_grow_with_the_samples():
    from fastscore.support.memory import peak_bytes

    one, x = classifier(), points(64)
    one.classify(x[:1], nfe=512)
    # The budget, and the results; the terms alone of all samples would take more than twice as much.
    assert peak_bytes(lambda: one.classify(x, nfe=512, error=None, memory="3MB")) < 3 * 2**20 + 20 * x.nbytes


@pytest.mark.parametrize("schedule", [fs.VP(), fs.DDPM.linear(1000), fs.FlowMatching(1)], ids=str)
def test_uniform_weighting_is_the_mean_error_over_time(schedule):
    # One Gaussian a class: the mean error is known in closed form, here on a rule of its own.
    cov = 0.25 * torch.eye(2)[None]
    targets = [Target(torch.ones(1), torch.tensor([[m, 0.5 * m]]), cov) for m in (-1.0, 0.5)]
    x = points(20, targets)
    clean, noisy = schedule.time_range
    if schedule.discrete:
        time = torch.arange(1000)
    else:
        time = clean + (noisy - clean) * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    snr = schedule.log_snr(time).exp()
    weight = torch.full_like(snr, -1 / len(snr))
    expected = torch.stack(
        [
            fs.Reference(torch.ones(1), t.mean, torch.full((1, 2), 0.25)).expected_residual(x, snr, weight)
            for t in targets
        ],
        1,
    )
    found = classifier(targets, schedule=schedule).classify(x, nfe=512, error=None, weighting="uniform")
    error = (found.log_likelihood - expected).abs()
    # At the clean end of a table the mean square error jumps between entries: 2 % of what is compared.
    assert bool((error < 4 * found.stderr + 0.02).all())
    torch.testing.assert_close(found.log_posterior, found.log_likelihood.log_softmax(1))
    by_density = classifier(targets, schedule=schedule).classify(x, nfe=512, error=None)
    assert float((by_density.log_posterior - found.log_posterior).abs().max()) > 0.5  # another weighting


def test_uniform_time_visits_every_entry_of_a_table_once():
    table = fs.DDPM.linear(50)
    rule = uniform_in_time(100, table).rule
    assert rule.time.tolist() == list(range(49, -1, -1))
    assert uniform_in_time(20, table).rule.time.tolist() == [47, 42, 37, 32, 27, 22, 17, 12, 7, 2]
    assert torch.allclose(rule.weight, torch.tensor(2 / 50).double())
    assert not rule.ends.any()  # nothing moves these draws, so a jump between the first and the last is no error
    with pytest.raises(ValueError, match="nfe=7 leaves fewer than 4 draws"):
        uniform_in_time(7, table)


def test_classes_are_rows_of_any_conditions():
    generator = torch.Generator().manual_seed(0)
    text, scale = torch.randn(3, 2, 5, generator=generator), torch.tensor([0.5, 1.0, 2.0])

    class TextNet(nn.Module):
        def forward(self, x, t, text, scale, shift, shared):
            assert text.shape[1:] == (2, 5)
            return torch.tanh(x + text.sum((1, 2))[:, None] + shift) * scale[:, None] + shared.sum()

    density = fs.ScoreDensity(TextNet(), SCHEDULE, "eps")
    one = fs.DiffusionClassifier(density, {"text": text, "scale": scale})
    x, shift, shared = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator), torch.ones(12)
    found = one.classify(x, nfe=32, error=None, seed=4, shift=shift, shared=shared)
    # The same noise, nodes and weights by hand, one class after the other.
    density.nodes.paired.fill_(True)
    for c in range(3):
        own = {"text": text[c].expand(4, 2, 5), "scale": scale[c].expand(4)}
        alone = density.estimate(x, nfe=32, seed=4, shift=shift, shared=shared, **own)
        torch.testing.assert_close(found.log_likelihood[:, c], alone.log_prob, rtol=1e-4, atol=1e-3)
        # Both widen the variance of the same terms for few draws, a single density also for their skewness.
        assert bool((found.stderr[:, c] > alone.variance.sqrt()).all())
        assert bool((found.stderr[:, c] < alone.stderr).all())
    # Three samples are enough for the evaluations, with their own shifts: further ones change nothing.
    each = 32 * 3 + 6 * 24 * 8
    nodes = one.fit(x, evaluations=3 * each, progress=False, shift=shift, shared=shared).nodes.share
    again = one.fit(x[:3], progress=False, shift=shift[:3], shared=shared).nodes.share
    torch.testing.assert_close(nodes, again, rtol=1e-4, atol=1e-6)


def test_top_classes_and_printing(fitted):
    found = fitted.classify(points(5), nfe=32)
    posterior, classes = found.topk(2)
    assert torch.equal(classes[:, 0], found.prediction)
    torch.testing.assert_close(posterior, found.log_posterior.gather(1, classes).exp())
    assert bool((posterior[:, 0] >= posterior[:, 1]).all())
    assert str(found).startswith("Classification(20 samples, 4 classes, ")
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"topk takes 1 to 4 of 4 classes, got {k}"):
            found.topk(k)


def test_state_is_stored(fitted):
    other = classifier()
    other.load_state_dict(fitted.state_dict())
    x = points(3)
    assert torch.equal(other.classify(x, nfe=32).log_posterior, fitted.classify(x, nfe=32).log_posterior)


def test_quantiles_of_student():
    nu = torch.tensor([3.0, 5.0, 10.0, 100.0], dtype=torch.float64)
    for tail in (0.05, 0.01, 0.001):
        expected = torch.from_numpy(student.isf(tail, nu.numpy()))
        torch.testing.assert_close(student_quantile(tail, nu), expected, rtol=0.03, atol=0)


@pytest.mark.parametrize(("entries", "nfe", "most"), [(100, 256, 0.27), (1000, 1024, 0.03)])
def test_draws_of_a_table_are_as_noisy_as_they_say(entries, nfe, most):
    # Classes of one covariance differ by what antithetic pairs know without noise: the shift of the nodes is what is
    # left of the error, 0.146 and 0.018 nats. Entries drawn once or twice in turns looked like 0.55 and 0.060 of it.
    targets = [Target(torch.ones(1), torch.full((1, 4), float(c)), 0.25 * torch.eye(4)[None]) for c in range(3)]
    beta = torch.linspace(0.1, 20, entries, dtype=torch.float64) / entries
    density, x = classifier(targets, schedule=fs.DDPM((1 - beta).cumprod(0))), points(20, targets)
    found = [density.classify(x, nfe=nfe, error=None, seed=seed) for seed in range(8)]
    stderr = torch.stack([each.log_posterior_stderr for each in found])
    error = torch.stack([each.log_posterior - exact(x, targets)[1] for each in found])
    assert float((error.abs() < 1.96 * stderr).double().mean()) > 0.93
    assert float(stderr.square().mean().sqrt()) < most


DENSITY = fs.ScoreDensity(ClassNet(TARGETS), SCHEDULE, "eps")
CLASSES = {"y": torch.arange(4)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fs.DiffusionClassifier(DENSITY, {}), r"classes must name keyword arguments .* at least two.*got \{\}"),
        (lambda: fs.DiffusionClassifier(DENSITY, {"y": torch.arange(1)}), r"got \{'y': \(1,\)\}"),
        (lambda: fs.DiffusionClassifier(DENSITY, {"y": torch.arange(3), "z": torch.arange(4)}), r"'z': \(4,\)"),
        (lambda: fs.DiffusionClassifier(DENSITY, 10), "got 10"),
        (lambda: fs.DiffusionClassifier(DENSITY, CLASSES, torch.ones(4)), "prior must be 4 positive .* sum 4"),
        (lambda: fs.DiffusionClassifier(DENSITY, CLASSES, torch.tensor([0.5, 0.5, 0, 0])), "leave classes out that"),
        (lambda: classifier().classify(points(1), error=1.5), "error must lie between 0 and 1.*got 1.5"),
        (lambda: classifier().classify(points(1), weighting="sum"), "weighting must be one of density, uniform"),
        (lambda: classifier().classify(points(1), y=torch.zeros(4)), "y names the class and is set by the classifier"),
        (lambda: classifier().classify(points(1), nfe=4), "nfe=4 leaves fewer than 4 draws"),
        (lambda: classifier().classify(points(1) / 0), "x has NaN or inf"),
        (lambda: classifier().classify([1.0]), "x must be a tensor"),
        (lambda: classifier().fit(points(1), evaluations=10), "fit needs 1280 evaluations per sample"),
    ],
)
def test_errors_name_the_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_density_is_checked():
    with pytest.raises(TypeError, match=r"density must be a ScoreDensity, .*, got Linear"):
        fs.DiffusionClassifier(nn.Linear(2, 2), CLASSES)


def test_real_digits():
    """600 steps on 1,200 digits; `make bench` trains longer and compares with other classifiers."""
    (levels, labels), (held, truth) = class_digits.split()
    density = class_digits.train(levels, labels, steps=600, batch=128)
    by_density = fs.DiffusionClassifier(density, {"y": torch.arange(10)})
    by_density.fit(class_digits.LEVELS.dequantize(levels, seed=1), progress=False)
    x = class_digits.LEVELS.dequantize(held, seed=2)
    found, full = (by_density.classify(x, nfe=128, error=error) for error in (0.05, None))
    right = found.prediction == truth
    # 95.1 % when this was written, with a standard error of 0.9 % from 597 digits.
    assert float(right.double().mean()) > 0.92
    assert float(full.nfe.sum() / found.nfe.sum()) > 2
    # Both decide alike but for near ties, where one more digit in a hundred may differ.
    assert float((found.prediction == full.prediction).double().mean()) > 0.98
