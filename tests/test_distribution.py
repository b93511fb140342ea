"""A density as a torch distribution: what torch's own classes and Monte Carlo code make of it."""

import math

import pytest
import torch
from analytic import ExactNet, mixture
from torch.distributions import (
    AffineTransform,
    Independent,
    SigmoidTransform,
    TransformedDistribution,
    constraints,
)
from transformed_densities import SHAPE, TARGET, TRANSFORMS, D, Z, core, forward, through

import fastscore as fs

pytestmark = pytest.mark.usefixtures("one_thread")
X = Z.flatten(1)
SHIFTS = 0.2 * torch.arange(3.0).double()[:, None].expand(3, D)


def density(**options):
    return fs.ScoreDensity(ExactNet(TARGET, fs.LogSNR(-8, 6)), fs.LogSNR(-8, 6), "eps", program=False, **options)


def made(**options):
    # Said, since torch.compile turns it off for all distributions of a process, as another test may.
    return fs.as_distribution(density(), (D,), **{"nfe": 64, "validate_args": True} | options)


def test_log_prob_is_the_densitys_for_any_leading_shape():
    own, found = density(), made(seed=5)
    expected = own.log_prob(X[:4], nfe=64, seed=5)
    for lead in ((4,), (2, 2), (1, 4), (2, 1, 2)):
        assert torch.equal(found.log_prob(X[:4].reshape(*lead, D)), expected.reshape(lead))
    single = found.log_prob(X[0])
    assert single.shape == ()
    torch.testing.assert_close(single, expected[0], rtol=1e-12, atol=0)  # sums of another length
    assert found.log_prob(X[:0]).shape == (0,)
    assert (found.batch_shape, found.event_shape, found.has_rsample) == ((), (D,), False)


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_every_kind_of_density(kind):
    own, x = through(core(), TRANSFORMS[kind]), forward(Z, TRANSFORMS[kind])
    found = fs.as_distribution(own, x.shape[1:], nfe=16)
    assert torch.equal(found.log_prob(x), own.log_prob(x, nfe=16))
    assert bool(found.support.check(x).all())
    assert found.support.event_dim == x.ndim - 1


def test_the_support_of_a_squashed_density_is_its_range():
    found = fs.as_distribution(through(core(), TRANSFORMS["logit"]), SHAPE, nfe=16, validate_args=True)
    with pytest.raises(ValueError, match="within the support"):
        found.log_prob(torch.full((1, *SHAPE), 256.0).double())
    assert made().support.base_constraint is constraints.real
    with pytest.raises(ValueError, match="within the support"):
        made().log_prob(torch.full((1, D), math.nan))


def test_centred_positions():
    class Net(torch.nn.Module):
        def forward(self, x_t, t):
            return torch.tanh(x_t - x_t.mean(1, keepdim=True))

    own = fs.ZeroMeanDensity(Net(), fs.VP(), "eps", program=False)
    x = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(1, keepdim=True)
    found = fs.as_distribution(own, (4, 2), nfe=16, validate_args=True)
    assert torch.equal(found.log_prob(x[:, None]), own.log_prob(x, nfe=16)[:, None])
    with pytest.raises(ValueError, match="within the support"):
        found.log_prob(x + 1)


def test_gradients_reach_values_and_parameters():
    own = fs.ScoreDensity(ExactNet(TARGET, fs.LogSNR(-8, 6), gain=0.9), fs.LogSNR(-8, 6), "eps", program=False)
    x = X.clone().requires_grad_()
    fs.as_distribution(own, (D,), nfe=16).log_prob(x[:, None]).sum().backward()
    other, gain = X.clone().requires_grad_(), own.model.gain.grad.clone()
    own.model.gain.grad = None
    own.log_prob(other, nfe=16).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(gain, own.model.gain.grad, rtol=1e-12, atol=0)
    assert float(gain.abs()) > 0


def test_torch_func_takes_its_derivative():
    found, x = made(nfe=16), X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(found.log_prob(x[0]), x)
    torch.testing.assert_close(torch.func.grad(found.log_prob)(X[0]), expected[0], rtol=1e-12, atol=0)


def test_the_same_seed_gives_the_same_answer_and_none_another_one_in_every_call():
    fixed, fresh = made(), made(seed=None)
    assert torch.equal(fixed.log_prob(X), fixed.log_prob(X))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = fresh.log_prob(X), fresh.log_prob(X)
        torch.manual_seed(3)
        assert torch.equal(fresh.log_prob(X), first)
    assert float((first - second).abs().min()) > 0
    before = torch.get_rng_state()
    fixed.log_prob(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_conditions_marked_per_sample_make_the_batch():
    own, found = density(), made(shift=fs.per_sample(SHIFTS))
    assert found.batch_shape == (3,)
    value = found.log_prob(X[:4, None])  # (4, 1, D) against a batch of three
    assert value.shape == (4, 3)
    flat = X[:4].repeat_interleave(3, 0)
    assert torch.equal(value.flatten(), own.log_prob(flat, nfe=64, shift=fs.per_sample(SHIFTS.repeat(4, 1))))
    assert torch.equal(found.log_prob(X[0]), own.log_prob(X[:1].expand(3, D), nfe=64, shift=SHIFTS))
    truth = torch.stack([TARGET.log_prob(X[:4])] * 3, 1)[:, 0]
    error = own.estimate(X[:4], nfe=64).stderr
    assert bool(((made().log_prob(X[:4]) - truth).abs() < 4 * error).all())


def test_expand_and_independent():
    found = made(shift=fs.per_sample(SHIFTS))
    wide = found.expand((2, 3))
    assert (wide.batch_shape, wide.event_shape) == ((2, 3), (D,))
    expected = density().log_prob(X[:1].expand(6, D), nfe=64, shift=fs.per_sample(SHIFTS.repeat(2, 1)))
    assert torch.equal(wide.log_prob(X[0]).flatten(), expected)
    joint = Independent(wide, 1)
    assert (joint.batch_shape, joint.event_shape) == ((2,), (3, D))
    torch.testing.assert_close(joint.log_prob(X[0].expand(3, D)), expected.reshape(2, 3).sum(1))
    assert Independent(made().expand((4,)), 1).log_prob(X[:4]).shape == ()
    with pytest.raises(RuntimeError, match="expand"):
        found.expand((4,))


def test_validation_is_kept_by_expand():
    for choice in (True, False):
        assert made(validate_args=choice).expand((2,))._validate_args is choice
    with pytest.raises(ValueError, match="right-most size of value must match event_shape"):
        made(validate_args=True).log_prob(torch.zeros(5, D + 1))
    with pytest.raises(ValueError, match="x has NaN"):  # the density looks for itself
        made(validate_args=False).log_prob(torch.full((1, D), math.nan))


def test_transformed_distribution_is_transformed():
    steps = [AffineTransform(0.5, 2.0), SigmoidTransform()]
    torchs = TransformedDistribution(made(), steps)
    y = torch.sigmoid(0.5 + 2 * X)
    own = fs.Transformed(fs.Transformed(density(), steps[0]), steps[1]).log_prob(y, nfe=64)
    torch.testing.assert_close(torchs.log_prob(y), own, rtol=0, atol=1e-9)  # rounding of a sigmoid and its inverse
    with pytest.raises(NotImplementedError, match="has log_prob and no samples"):
        torchs.sample()


def test_a_monte_carlo_divergence_is_that_of_the_targets():
    """KL(p, q) of two mixtures, 4 nats and more, by samples of p: four errors of the spread, 2 % of it."""
    other = mixture(D, seed=1)
    x = TARGET.sample(400, seed=4)

    def of(target):
        return fs.as_distribution(
            fs.ScoreDensity(ExactNet(target, fs.LogSNR()), fs.LogSNR(), "eps", program=False), (D,), nfe=256
        )

    found, truth = of(TARGET).log_prob(x) - of(other).log_prob(x), TARGET.log_prob(x) - other.log_prob(x)
    error = found - truth
    assert abs(float(error.mean())) < 4 * float(error.std()) / 20
    assert float(error.std()) / 20 < 0.02 * float(truth.mean())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fs.as_distribution(torch.nn.Linear(2, 2), (2,)), TypeError, "density must be a ScoreDensity"),
        (lambda: made().log_prob([[0.0] * D]), TypeError, r"value must be a tensor, got list; torch.as_tensor"),
        (lambda: fs.as_distribution(density(), ()), ValueError, r"event_shape must be .*got \(\); .*shape \(1,\)"),
        (lambda: fs.as_distribution(density(), 4), ValueError, "event_shape must be .*got 4; "),
        (lambda: made(seed=0.5), ValueError, "seed must be an integer, got 0.5"),
        (lambda: made(nfe=1.5), ValueError, "nfe must be an integer, got 1.5"),
        (lambda: made(mask=torch.ones(D)), ValueError, "mask is no option of as_distribution"),
        (lambda: made(shift=SHIFTS), ValueError, r"condition 'shift' of shape \(3, 4\) could be one .*fs.shared"),
        (lambda: made(a=fs.per_sample(SHIFTS), b=fs.per_sample(X)), ValueError, "same first size, got 'a' 3, 'b' 5"),
        (lambda: made().sample((2,)), NotImplementedError, r"no samples, got sample_shape \(2,\); draw with the"),
        (lambda: made().rsample(), NotImplementedError, "no samples"),
    ],
)
def test_what_cannot_be_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_shared_conditions_and_those_of_first_size_one_are_passed_on():
    a, b = made(shift=SHIFTS[1:2]), made(shift=fs.per_sample(SHIFTS[1:2]))
    assert (a.batch_shape, b.batch_shape) == ((), (1,))
    expected = density().log_prob(X, nfe=64, shift=SHIFTS[1].expand(len(X), D))
    assert torch.equal(b.log_prob(X[:, None])[:, 0], expected)
    assert "event_shape: torch.Size([4]), batch_shape: torch.Size([1]), seed: 0" in repr(b)
