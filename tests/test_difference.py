"""Two densities on the same data: the difference against exact ones, and how much smaller a paired error is."""

import math

import pytest
import torch
from analytic import ExactNet, Target, mixture
from torch import nn

import fastscore as fs
from fastscore.densities.difference import AT_ONCE
from fastscore.transforms import zscore

pytestmark = pytest.mark.usefixtures("one_thread")
D = 16
TARGET = mixture(D)
OTHER = Target(TARGET.weight, TARGET.mean + 0.1, 1.1 * TARGET.cov)
X = TARGET.sample(128, seed=3)
TRUTH = TARGET.log_prob(X) - OTHER.log_prob(X)


def of(target, schedule=None, predicts="eps", **options):
    schedule = schedule or fs.VP()
    return fs.ScoreDensity(ExactNet(target, schedule, predicts), schedule, predicts, program=False, **options)


class Nearly(nn.Module):
    """An exact network with a small mistake, as a checkpoint of a few steps later has."""

    def __init__(self, net, size=0.01):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.more = nn.Sequential(nn.Linear(D, 32), nn.Tanh(), nn.Linear(32, D)).double()
        self.net, self.size = net, size

    def forward(self, x_t, t, **cond):
        return self.net(x_t, t, **cond) + self.size * self.more(x_t.double()).to(x_t)


def checkpoints():
    first = of(TARGET)
    return first, fs.ScoreDensity(Nearly(first.model), fs.VP(), "eps", program=False)


def assert_covers(found, truth=TRUTH, least=0.88, outside=0.0):
    """128 intervals of 95 % cover no fewer than 88 % (3.6 standard errors of the share); their mean to 4 of its own."""
    error = found.difference.double() - truth
    assert float(((error.abs() - outside) < 1.96 * found.stderr).double().mean()) >= least
    own = float(found.stderr.square().mean().sqrt()) / len(error) ** 0.5
    common = float(found.jump.mean().abs()) / 12**0.5  # the shift of the nodes, which all have in common
    assert abs(float(error.mean())) < 4 * (own + common) + outside
    return own


@pytest.mark.parametrize("fitted", [False, True], ids=["plain", "fitted"])
def test_the_truth_of_two_mixtures_is_covered(fitted):
    a, b = of(TARGET), of(OTHER)
    if fitted:
        a.fit(TARGET.sample(400, seed=1), evaluations=20_000, progress=False)
        b.fit(OTHER.sample(400, seed=2), evaluations=20_000, progress=False)
    found = fs.compare_densities(a, b, X, nfe=128, seed=4)
    assert_covers(found)
    # Without a fit an estimate is off by 2 nats, and a difference by 0.1: only the mixtures' own noise is left.
    if not fitted:
        assert float(found.stderr.mean()) < 0.1 * float(a.estimate(X, nfe=128).stderr.mean())


def test_the_paired_error_of_two_nearly_equal_networks_is_many_times_smaller():
    a, b = checkpoints()
    found = fs.compare_densities(a, b, X, nfe=64, seed=1)
    long = fs.compare_densities(a, b, X, nfe=2048, seed=2)
    error = (found.difference - long.difference).abs()
    assert float((error < 1.96 * (found.stderr**2 + long.stderr**2).sqrt()).double().mean()) >= 0.88
    single = [each.estimate(X, nfe=64, seed=1) for each in (a, b)]
    apart = (single[0].stderr ** 2 + single[1].stderr ** 2).sqrt()
    assert float(found.stderr.mean()) < 0.01 * float(apart.mean())
    # Two runs with the same noise, subtracted, have no pairs: several times the error.
    same = (single[0].log_prob - single[1].log_prob - long.difference).square().mean().sqrt()
    assert float(error.square().mean().sqrt()) < 0.3 * float(same)
    mean, stderr = found.mean()
    assert abs(mean - long.mean()[0]) < 4 * stderr
    assert stderr < 0.05 * math.hypot(single[0].mean()[1], single[1].mean()[1])


def test_the_error_of_the_mean_is_that_of_many_seeds():
    a, b = checkpoints()
    found = [fs.compare_densities(a, b, X[:16], nfe=16, seed=seed) for seed in range(40)]
    means = torch.tensor([each.mean()[0] for each in found])
    own = float(torch.stack([each.stderr for each in found]).square().mean().sqrt()) / 4
    assert float(means.std()) < 1.5 * own  # 40 seeds know a deviation to 11 %
    assert float(torch.tensor([each.mean()[1] for each in found]).mean()) > 0.9 * float(means.std())


def test_it_is_the_difference_of_two_estimates_to_the_bit_where_nodes_are_the_same():
    a, b = checkpoints()
    assert torch.equal(fs.compare_densities(a, a, X, nfe=16).difference, torch.zeros(len(X), dtype=torch.float64))
    one, other = (fs.compare_densities(*pair, X, nfe=16, seed=3) for pair in ((a, b), (b, a)))
    torch.testing.assert_close(one.difference, -other.difference, rtol=0, atol=1e-9)  # float64, sums of 100 nats
    torch.testing.assert_close(one.stderr, other.stderr, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("schedule", "predicts"),
    [(fs.EDM(0.002, 80, sigma_data=1.0), "denoiser"), (fs.FlowMatching(), "flow"), (fs.VE(0.02, 30), "score"),
     (fs.LogSNR(-6, 5), "v")],
    ids=["EDM", "flow", "VE", "short"],
)  # fmt: skip
def test_other_schedules_ranges_and_predictions(schedule, predicts):
    """Outside of a range the reference stands in, as in that density's own estimate, whose range is told by both."""
    target = fs.Reference(TARGET.weight, TARGET.mean, TARGET.eigenvalue)  # so that nothing is left outside
    a, b = of(TARGET, reference=target), of(OTHER, schedule, predicts)
    own = b.estimate(X, nfe=4096, seed=9) if predicts == "v" else None
    found = fs.compare_densities(a, b, X, nfe=256, seed=5)
    if own is None:
        assert_covers(found, outside=0.01)  # what a range of its own leaves out
        return
    # Its own reference would stand in for b; here it is that of a, with which b is asked for the truth.
    with_a = b.with_reference(target).estimate(X, nfe=4096, seed=9)
    truth = TARGET.log_prob(X) - with_a.log_prob
    assert_covers(found, truth, outside=float(with_a.stderr.max()))
    assert float((own.log_prob - with_a.log_prob).abs().max()) > 0.5  # the range is short enough to tell


@pytest.mark.parametrize("ranges", [((-5, 3), (-5, 3)), ((-5, 3), (-9, 14)), ((-9, 3), (-4, 14))])
def test_what_lies_beyond_short_ranges_is_told(ranges):
    """Detail finer than the least noise is the reference's: a difference says how much, whatever range it is of."""
    a, b = (of(target, fs.LogSNR(*ends), "v") for target, ends in zip((TARGET, OTHER), ranges))
    found = fs.compare_densities(a, b, X, nfe=512, seed=8)
    error = (found.difference.double() - TRUTH).abs()
    beyond = found.truncation_per_sample
    assert float((error < 1.96 * found.stderr).double().mean()) < 0.7  # bars alone miss it
    assert float((error < 1.96 * found.stderr + beyond).double().mean()) >= 0.88
    # No more than twice what two separate estimates state together, which is an upper bound of what can be left.
    apart = sum(each.estimate(X, nfe=512, seed=8).truncation_per_sample for each in (a, b))
    assert float(beyond.mean()) < 2 * float(apart.mean())


def test_the_fitted_reference_serves_both_whichever_comes_first():
    """Data a thousand units wide, of which the reference before `fit` knows nothing, where ranges differ."""
    wide = Target(TARGET.weight, 1000 * TARGET.mean, 1e6 * TARGET.cov)
    a, b = of(wide, fs.LogSNR(-30, 3)), of(wide, fs.LogSNR(-29, 3))
    b.fit(wide.sample(400, seed=2), evaluations=9000, progress=False)
    for pair in ((a, b), (b, a)):
        found = fs.compare_densities(*pair, 1000 * X, nfe=64)
        assert float(found.stderr.max()) < 3  # 1.5 either way, and 10 with the reference of before


def test_two_networks_of_one_mixture_on_two_schedules_do_not_differ():
    a, b = of(TARGET), of(TARGET, fs.LogSNR(*of(TARGET).log_snr_range), "v")
    found = fs.compare_densities(a, b, X, nfe=64)
    assert float(found.difference.abs().max()) < 1e-8  # two parametrizations of the same answer, in float64


def test_tables_of_timesteps():
    table = fs.DDPM.linear(200)
    a, b = of(TARGET, table), of(OTHER, fs.DDPM.linear(200))
    found = fs.compare_densities(a, b, X, nfe=128, seed=2)
    truth = a.estimate(X, nfe=8192, seed=7).log_prob - b.estimate(X, nfe=8192, seed=7).log_prob
    assert_covers(found, truth, outside=0.05)  # the two long runs' own errors
    for other in (fs.DDPM.linear(100), fs.VP()):
        with pytest.raises(ValueError, match="a table of timesteps shares its nodes with no other schedule, got DDPM"):
            fs.compare_densities(a, of(OTHER, other), X, nfe=16)


def test_densities_of_transformed_data():
    """One network saw standardized data, the other did not, and a third by another mean and deviation."""
    mean, std = TARGET.mean.mean(0), torch.full((D,), 0.5).double()
    inner = Target(OTHER.weight, (OTHER.mean - mean) / std, OTHER.cov / std[:, None] / std)
    seen = fs.Transformed(of(inner), zscore(mean, std)).fit(OTHER.sample(400, seed=1), evaluations=9000, progress=False)
    plain = of(TARGET).fit(TARGET.sample(400, seed=2), evaluations=9000, progress=False)
    assert_covers(fs.compare_densities(plain, seen, X, nfe=256, seed=3))
    twice = fs.compare_densities(seen, fs.Transformed(of(inner), zscore(mean, std)), X, nfe=32)
    assert float(twice.difference.abs().max()) < 1e-8


def test_conditions_masks_and_batches_are_those_of_an_estimate():
    a, b = checkpoints()
    shift, mask = 0.1 * torch.randn(len(X), D, dtype=torch.float64), torch.arange(D) < 9
    whole = fs.compare_densities(a, b, X, nfe=16, shift=shift, mask=mask)
    parts = [
        fs.compare_densities(a, b, X[i : i + 64], nfe=16, cond={"shift": shift[i : i + 64]}, mask=mask,
                             sample_index=torch.arange(i, i + 64))
        for i in (0, 64)
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat([p.difference for p in parts]), whole.difference, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat([p.stderr for p in parts]), whole.stderr, rtol=1e-6, atol=0)
    plain = fs.compare_densities(a, b, X, nfe=16)
    assert float((plain.difference - whole.difference).abs().min()) > 0


def test_comparisons_of_batches_are_joined_to_that_of_all_samples():
    a, b = checkpoints()
    whole = fs.compare_densities(a, b, X, nfe=64)
    batches = list(zip(X.split(50), torch.arange(len(X)).split(50)))
    joined = fs.Comparison.cat([fs.compare_densities(a, b, x, nfe=64, sample_index=index) for x, index in batches])
    for found, expected in zip((*joined, joined.truncation_per_sample), (*whole, whole.truncation_per_sample)):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # of float32
    assert joined.mean() == pytest.approx(whole.mean(), rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match=r"50 of 100 samples have the .*sample_index of another one"):
        fs.Comparison.cat([fs.compare_densities(a, b, x, nfe=16) for x, _ in batches[:2]])
    with pytest.raises(TypeError, match=r"Comparison.cat takes a list of comparisons, got a single Comparison"):
        fs.Comparison.cat(whole)
    with pytest.raises(ValueError, match="there are no comparisons to join"):
        fs.Comparison.cat([])


def test_arrays_of_a_comparison_are_copies():
    a, b = checkpoints()
    found = fs.compare_densities(a, b, X[:5], nfe=16, sample_index=torch.arange(3, 8))
    arrays, kept = found.numpy(), found.difference.clone()
    assert {name: array.shape for name, array in arrays.items()} == dict.fromkeys(
        ("difference", "stderr", "sample_index", "truncation"), (5,)
    )
    assert arrays["sample_index"].tolist() == [3, 4, 5, 6, 7]
    arrays["difference"][:] = 0
    assert torch.equal(found.difference, kept)


def test_many_samples_go_in_slices_and_little_memory():
    a, b = (fs.ScoreDensity(Nearly(nn.Identity(), size), fs.VP(), "eps", program=False) for size in (0.1, 0.2))

    class Still(nn.Module):
        def forward(self, x_t, t):
            return 0.5 * x_t

    a.model.net = b.model.net = Still()
    x = torch.randn(AT_ONCE + 70, D, generator=torch.Generator().manual_seed(0)).double()
    whole = fs.compare_densities(a, b, x, nfe=8)
    assert len(whole.difference) == len(x)
    index = torch.arange(AT_ONCE - 3, AT_ONCE + 3)
    some = fs.compare_densities(a, b, x[index], nfe=8, sample_index=index, memory="300KB")
    torch.testing.assert_close(some.difference, whole.difference[index], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a: fs.compare_densities(a, nn.Linear(2, 2), X), TypeError, "must be a ScoreDensity.*got Linear"),
        (lambda a: fs.compare_densities(a, a, X, nfe=6), ValueError, "nfe=6 leaves fewer than 4 draws.*use nfe >= 8"),
        (lambda a: fs.compare_densities(a, a, X, nfee=6), ValueError, "nfee is no option of compare_densities"),
        (lambda a: fs.compare_densities(a, a, X, seed=0.5), ValueError, "seed must be an integer, got 0.5"),
        (
            lambda a: fs.compare_densities(a, fs.ZeroMeanDensity(a.model, fs.VP(), "eps"), centred()),
            ValueError,
            "a and b must be densities in spaces of the same dimension, got 16 and 12 dimensions; give two of",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(of(TARGET))


def centred():
    x = X[:, :16].reshape(-1, 4, 4)
    return x - x.mean(1, keepdim=True)
