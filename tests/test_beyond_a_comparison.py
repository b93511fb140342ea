"""What a comparison says of the log-SNRs beyond its ranges, where its bars alone miss the truth."""

import warnings

import pytest
import torch
from analytic import ExactNet, Target, mixture
from torch import nn

import fastscore as fs

pytestmark = pytest.mark.usefixtures("one_thread")
D = 4
MEAN = torch.randn(3, D, generator=torch.Generator().manual_seed(0)).double()
SHORT = {"clean end": (-9.0, 4.0), "noisy end": (-1.0, 14.0), "both ends": (-1.0, 4.0)}


def pair(at):
    """Return two mixtures: of clusters narrower than the least noise, or wider than the largest; or of both."""
    far, further = (6.0, 1.1) if at == "noisy end" else (4.0, 1.02) if at == "both ends" else (1.0, 1.0)
    width, wider = (0.5, 1.1) if at == "noisy end" else (0.05, 1.2)
    weight, cov = torch.ones(3).double() / 3, width**2 * torch.eye(D).double().expand(3, D, D)
    return Target(weight, far * MEAN, cov), Target(weight, further * far * MEAN + 0.02, wider**2 * cov)


class Either(nn.Module):
    """Two exact networks under the conditions y = 0 and y = 1."""

    def __init__(self, *nets):
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, x_t, t, y):
        answers = [net(x_t, t) for net in self.nets]
        return torch.where((y == 0).view(-1, *[1] * (x_t.dim() - 1)), *answers)


class Both:
    """A density under two conditions, and the two densities that these are.

    Arguments:
        targets: what is exact under either.
        ends: the range of log-SNR.
        options: of the density under two conditions.
    """

    def __init__(self, targets, ends, dtype=torch.float64, **options):
        schedule = fs.LogSNR(*ends)
        nets = [ExactNet(target, schedule, "eps") for target in targets]
        self.single = [fs.ScoreDensity(net, schedule, "eps", program=False) for net in nets]
        self.either = fs.ScoreDensity(Either(*nets), schedule, "eps", program=False, **options)
        self.x = targets[0].sample(60, seed=3)
        self.truth = targets[0].log_prob(self.x) - targets[1].log_prob(self.x)
        self.x = self.x.to(dtype)

    def by(self, call, nfe, chosen=slice(None)):
        x, options = self.x[chosen], {"nfe": nfe, "sample_index": torch.arange(60)[chosen]}
        if call == "compare":
            zeros = torch.zeros(len(x))
            return self.either.compare(x, {"y": zeros}, {"y": zeros + 1}, **options)
        return fs.compare_densities(*self.single, x, **options)


@pytest.mark.parametrize("nfe", [8, 64, 256])
@pytest.mark.parametrize("at", SHORT)
@pytest.mark.parametrize("call", ["compare", "compare_densities"])
def test_bars_and_truncation_cover_where_a_range_is_short(call, at, nfe):
    both = Both(pair(at), SHORT[at])
    whole, bars, covered, told = both.by(call, nfe), [], [], []
    for i in range(60):
        one = both.by(call, nfe, slice(i, i + 1))
        error = float((one.difference - both.truth[i : i + 1]).abs() - 1.96 * one.stderr)
        bars.append(error <= 0)
        covered.append(error <= one.truncation)
        told.append(one.truncation)
    if nfe == 256:
        assert sum(bars) < 0.9 * 60  # bars alone miss it
    assert sum(covered) >= 0.9 * 60
    error = (whole.difference - both.truth).abs() - 1.96 * whole.stderr
    assert float((error <= whole.truncation_per_sample).double().mean()) >= 0.9
    # Nodes and noise are others than those of two estimates, which is a factor of two at most in the mean.
    apart = sum(each.estimate(both.x, nfe=nfe).truncation_per_sample for each in both.single)
    assert float(whole.truncation_per_sample.mean()) <= 2 * float(apart.mean())


def test_ends_are_those_of_both_integrands():
    both = Both(pair("both ends"), SHORT["both ends"])
    found = [both.by(call, 64) for call in ("compare", "compare_densities")]
    for each in found:
        assert each.ends.shape == (60, 4, 7)
    # Nodes are as even without a fit, and the noise is of the same keys.
    same = fs.compare_densities(both.single[0], both.single[0], both.x, nfe=64)
    torch.testing.assert_close(same.ends[:, :2], same.ends[:, 2:], rtol=0, atol=0)
    torch.testing.assert_close(same.ends[:, :2], found[1].ends[:, :2], rtol=1e-9, atol=1e-9)
    assert not torch.equal(found[0].ends[:, :2], found[0].ends[:, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_conditions_differ_by_nothing_and_small_differences_keep_their_digits(dtype):
    first, _ = pair("clean end")
    near = Target(first.weight, first.mean, first.cov * (1 + 1e-4))
    far = {"reference": fs.Reference(torch.ones(1), torch.full((1, D), 100.0), torch.ones(1, D))}
    found = Both((first, first), (-9.0, 4.0), dtype, **far).by("compare", 64)
    assert torch.equal(found.difference, torch.zeros(60, dtype=dtype))
    assert torch.equal(found.stderr, torch.zeros(60, dtype=dtype))
    # A reference at 100 standard deviations has residuals of 1e4: two numbers of that size in float32 would not do.
    exact = Both((first, near), (-9.0, 4.0)).by("compare", 64)
    error = Both((first, near), (-9.0, 4.0), dtype, **far).by("compare", 64).difference - exact.difference
    assert float(error.square().mean().sqrt()) < 0.05 * float(exact.difference.square().mean().sqrt())


def test_memory_and_chunks_do_not_change_what_is_told():
    both = Both(pair("clean end"), (-9.0, 4.0))
    whole = both.by("compare", 64)
    y = torch.zeros(60)
    few = both.either.compare(both.x, {"y": y}, {"y": y + 1}, nfe=64, memory="100KB")
    torch.testing.assert_close(few.difference, whole.difference, rtol=0, atol=1e-8)
    torch.testing.assert_close(few.truncation_per_sample, whole.truncation_per_sample, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("of_b", [(-1.0, 1.0), (3.0, 6.0)])
def test_a_range_with_too_few_draws_is_told_with_the_evaluations_that_it_takes(of_b):
    target = mixture(D)
    x = target.sample(32, seed=1)
    schedules = fs.LogSNR(-9, 2), fs.LogSNR(*of_b)
    a, b = (fs.ScoreDensity(ExactNet(target, s, "eps"), s, "eps", program=False) for s in schedules)
    message = r"with nfe=8 fewer than 4 draws of some samples lie in .* of b, .* is infinite; use nfe >= \d+$"
    with pytest.warns(UserWarning, match=message) as told:
        found = fs.compare_densities(a, b, x, nfe=8)
    assert len(told) == 1
    assert found.truncation == torch.inf
    assert repr(found).endswith("truncation unknown with so few draws in the range)")
    assert not bool(found.truncation_per_sample.isnan().any())
    enough = int(str(told[0].message).rsplit(" ", 1)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for seed in range(20):  # whatever the common shift of the nodes
            assert fs.compare_densities(a, b, x, nfe=enough, seed=seed).truncation < torch.inf
    # Where some samples' nodes leave enough draws in the range, theirs is finite.
    index = 1000 * torch.arange(32)  # of several groups, each with a shift of its own
    with pytest.warns(UserWarning, match=f"use nfe >= {enough}"):
        mixed = fs.compare_densities(a, b, x, nfe=enough - 4, sample_index=index)
    unknown = mixed.truncation_per_sample.isinf()
    assert 0 < int(unknown.sum()) < 32
    # The course of a's integrand is that of other samples on average: the rates are not quite the same.
    some = fs.compare_densities(a, b, x[~unknown], nfe=enough - 4, sample_index=index[~unknown])
    torch.testing.assert_close(some.truncation_per_sample, mixed.truncation_per_sample[~unknown], rtol=0.5, atol=0)


def test_nan_under_one_condition_is_refused():
    both = Both(pair("clean end"), (-9.0, 4.0))

    class Broken(nn.Module):
        def forward(self, x_t, t, y):
            return torch.where(y.view(-1, 1) == 1, torch.nan, x_t)

    broken = fs.ScoreDensity(Broken(), fs.LogSNR(-9, 4), "eps", program=False)
    y = torch.zeros(60)
    with pytest.raises(ValueError, match="the network returned NaN or inf for sample 0 at log-SNR"):
        broken.compare(both.x, {"y": y}, {"y": y + 1}, nfe=16)
