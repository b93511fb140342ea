"""Densities in the user's space against exact ones, for every transform, with gradients in float64."""

import math

import pytest
import torch
from analytic import ExactNet, Target, mixture
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    Independent,
    Normal,
    SigmoidTransform,
    TanhTransform,
    TransformedDistribution,
)
from torch.distributions.transforms import AbsTransform, ReshapeTransform, StickBreakingTransform

import fastscore as fs
from fastscore.densities.transformed import Transformed
from fastscore.transforms import Logit, Whitening, whiten, zscore

D = 4
TARGET = mixture(D)
MEAN, STD = torch.tensor([1.0, -20.0, 0.0, 3.0]), torch.tensor([0.1, 5.0, 1.0, 30.0])


def density(shape=(D,)):
    """An exact network with the reference of its own target: what an estimate then misses is rounding alone."""
    found = fs.ScoreDensity(ExactNet(TARGET, fs.LiYan()), fs.LiYan(), predicts="eps", program=False)
    found.reference = fs.Reference(TARGET.weight, TARGET.mean, torch.full((5, D), 0.09))
    return found


def whitening():
    generator = torch.Generator().manual_seed(0)
    data = (
        torch.randn(400, D, generator=generator, dtype=torch.float64) @ torch.randn(D, D, generator=generator).double()
    )
    return whiten(data + 3)


TRANSFORMS = {
    "zscore": lambda: zscore(MEAN, STD),
    "zscore of one number": lambda: zscore(0.5, 0.5),
    "logit": lambda: Logit(-1.0, 3.0),
    "whiten": whitening,
    "exp": ExpTransform,
    "sigmoid": SigmoidTransform,
    "tanh, then affine": lambda: ComposeTransform([TanhTransform(), AffineTransform(2.0, 3.0)]),
    "affine event": lambda: AffineTransform(MEAN, STD, event_dim=1),
    "negative scale": lambda: AffineTransform(MEAN, -STD),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_log_prob_is_that_of_torchs_own_transformed_distribution(name):
    transform = TRANSFORMS[name]()
    z = TARGET.sample(50, seed=1)
    x = transform(z)
    own = TransformedDistribution(TARGET.distribution, [transform]).log_prob(x)
    found = Transformed(density(), transform).estimate(x, nfe=16)
    # The reference is the target: what is left is rounding, also that of the inverse at the far ends of tanh and logit.
    assert torch.allclose(found.log_prob, own, rtol=1e-9, atol=1e-7)
    assert torch.allclose(Transformed(density(), transform).log_prob(x, nfe=16), own, rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_log_determinant_is_that_of_the_jacobian(name):
    transform = TRANSFORMS[name]()
    z = TARGET.sample(3, seed=4)
    x = transform(z)
    back, log_det = Transformed(density(), transform).to_network(x)
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda row: transform(row[None])[0], row) for row in z])
    assert torch.allclose(back, z, atol=1e-9)
    # torch takes the logarithm of a float32 scale in float32.
    atol = 1e-6 if "affine event" in name or "negative" in name else 1e-9
    assert torch.allclose(log_det, torch.linalg.slogdet(jacobian)[1], atol=atol)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients_in_x_are_those_of_the_exact_density(name):
    transform = TRANSFORMS[name]()
    x = transform(TARGET.sample(5, seed=2)).detach().requires_grad_()
    model = Transformed(density(), transform)
    (found,) = torch.autograd.grad(model.log_prob(x, nfe=16).sum(), x)
    own = TransformedDistribution(TARGET.distribution, [transform])
    (exact,) = torch.autograd.grad(own.log_prob(x).sum(), x)
    assert torch.allclose(found, exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_gradient_is_that_of_the_value_for_a_wrong_network():
    """Central differences in float64, where the network is not exact and the integral counts."""
    inner = fs.ScoreDensity(ExactNet(TARGET, fs.LiYan(), gain=0.9), fs.LiYan(), predicts="eps", program=False)
    model = Transformed(inner, Logit(0.0, 2.0))
    x = Logit(0.0, 2.0)(TARGET.sample(2, seed=3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model.log_prob(x, nfe=16, seed=5), (x,), eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("event", [0, 1, 2, 3])
def test_images_sum_the_determinant_over_the_event(event):
    shape = (1, 2, 2)
    scale = torch.tensor([[[0.5, 2.0], [3.0, 7.0]]])
    x = 1 + scale * TARGET.sample(6, seed=1).reshape(-1, *shape)
    found = Transformed(density(shape), AffineTransform(1.0, scale, event_dim=event)).estimate(x, nfe=16)
    exact = TARGET.log_prob(((x - 1) / scale).flatten(1)) - math.log(0.5 * 2 * 3 * 7)
    assert torch.allclose(found.log_prob, exact, atol=1e-7)


def test_whitened_images_and_a_reshape():
    shape = (1, 2, 2)
    transform = whitening()
    image = Whitening(transform.mean.reshape(shape), transform.basis, transform.std)
    z = TARGET.sample(6, seed=1)
    exact = TARGET.log_prob(z) - float(transform.std.log().sum())
    assert torch.allclose(
        Transformed(density(shape), image).estimate(image(z.reshape(-1, *shape)), nfe=16).log_prob, exact
    )
    both = ComposeTransform([ReshapeTransform(shape, (D,)), transform])
    assert torch.allclose(Transformed(density(shape), both).estimate(transform(z), nfe=16).log_prob, exact)


def test_whitened_data_have_the_identity_as_covariance():
    data = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(-3, 3, 6)) + 5
    z = whiten(data.reshape(300, 2, 3)).inv(data.double().reshape(300, 2, 3)).flatten(1)
    assert torch.allclose(torch.cov(z.T), torch.eye(6).double(), atol=1e-6)
    assert float(z.mean(0).abs().max()) < 1e-6


def test_standard_errors_and_bits_are_consistent():
    inner = fs.ScoreDensity(ExactNet(TARGET, fs.LiYan()), fs.LiYan(), predicts="eps", program=False)
    low, high = 10.0, 14.0  # the user's levels; the network sees (x - 12) / 2
    z = TARGET.sample(20, seed=1).float()
    found = Transformed(inner, zscore(12.0, 2.0)).estimate(12 + 2 * z, nfe=64, seed=3)
    plain = inner.estimate(z, nfe=64, seed=3)
    # x and z are float32: the noised rows differ by their rounding, 1e-6 of 12, times the integrand's slope.
    assert torch.allclose(found.stderr, plain.stderr, rtol=1e-3)
    assert torch.allclose(found.log_prob, plain.log_prob - D * math.log(2), atol=1e-2)
    ours = found.bits_per_dim(bins=256, low=low, high=high)
    assert torch.allclose(ours, plain.bits_per_dim(bins=256, low=(low - 12) / 2, high=(high - 12) / 2), atol=1e-2)
    assert torch.equal(found.nfe, plain.nfe)
    assert found.log_prob.dtype == torch.float32


def test_compare_has_no_determinant():
    inner = fs.ScoreDensity(ExactNet(TARGET, fs.LiYan()), fs.LiYan(), predicts="eps", program=False)
    z = TARGET.sample(6, seed=1)
    a, b = {"shift": torch.zeros(6, D)}, {"shift": 0.1 * torch.ones(6, D)}
    found = Transformed(inner, Logit(0, 4)).compare(Logit(0, 4)(z), a, b, nfe=32)
    plain = inner.compare(z, a, b, nfe=32)
    assert torch.allclose(found.difference, plain.difference, atol=1e-9)
    assert torch.allclose(found.stderr, plain.stderr, atol=1e-9)


def test_fit_takes_data_in_the_users_space():
    data = MEAN + STD * TARGET.sample(200, seed=3)
    inner = fs.ScoreDensity(ExactNet(TARGET, fs.LiYan()), fs.LiYan(), predicts="eps", program=False)
    model = Transformed(inner, zscore(MEAN, STD))
    assert model.fit(data, reference="diagonal", evaluations=0, progress=False) is model
    assert torch.allclose(inner.reference.mean[0], TARGET.sample(200, seed=3).mean(0), atol=0.2)


def test_a_gaussian_of_the_users_data_end_to_end():
    """The network of N(0, 1), data with means and scales of their own, the plain Gaussian density as truth."""
    one = Target(torch.ones(1), torch.zeros(1, D), torch.eye(D)[None])
    inner = fs.ScoreDensity(ExactNet(one, fs.VP()), fs.VP(), predicts="eps", program=False)
    truth = Independent(Normal(MEAN.double(), STD.double()), 1)
    x = MEAN + STD * torch.randn(64, D, generator=torch.Generator().manual_seed(0)).double()
    found = Transformed(inner, zscore(MEAN, STD)).estimate(x, nfe=16)
    assert torch.allclose(found.log_prob, truth.log_prob(x), atol=1e-6)


def test_tensors_of_the_transform_move_with_the_module():
    model = Transformed(density(), ComposeTransform([zscore(MEAN, STD), whitening()]))
    model.to("meta")
    first, second = model.transform.parts
    assert {t.device.type for t in (first.loc, first.scale, second.mean, second.basis, second.std)} == {"meta"}


def test_half_precision_networks_leave_the_transform_alone():
    model = Transformed(density(), zscore(MEAN, STD)).half()
    assert model.transform.scale.dtype == torch.float64


@pytest.mark.parametrize(
    ("transform", "x", "message"),
    [
        (
            Logit(0, 1),
            torch.tensor([[0.5] * D, [0.5, 0.2, 1.0, 0.1]]),
            "1 of 2 samples outside or on its edge, first sample 1",
        ),
        (Logit(0, 1), torch.full((1, D), 1.5), "1 of 1 samples outside"),
        (
            SigmoidTransform(),
            torch.tensor([[0.5] * D, [0.5, 0.2, 1.0, 0.1]]),
            "SigmoidTransform.*first sample 1",
        ),
        (
            ComposeTransform([SigmoidTransform(), AffineTransform(-1.0, 2.0)]),
            torch.tensor([[-1.0] + [0.5] * (D - 1)]),
            "outside or on its edge, first sample 0",
        ),
        (ExpTransform(), torch.tensor([[1.0, -1.0, 1.0, 1.0]]), "outside or on its edge, first sample 0"),
        (zscore(0.0, 1.0), torch.zeros(2, D, dtype=torch.int64), "floating point, got torch.int64"),
        (zscore(0.0, 1.0), torch.zeros(D), r"got \(4,\); a single sample is x\[None\]"),
        (zscore(0.0, 1.0), torch.full((1, D), math.nan), "NaN or inf in 1 of 1 samples"),
        (StickBreakingTransform(), torch.full((2, D), 0.25), "must keep the number of dimensions"),
        (AffineTransform(0.0, 1.0, event_dim=2), torch.zeros(3, D), "2 dimensions and a batch before them"),
    ],
)
def test_bad_data_is_explained(transform, x, message):
    with pytest.raises(ValueError, match=message):
        Transformed(density(), transform).estimate(x, nfe=16)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Transformed(density().model, zscore(0.0, 1.0)),
            TypeError,
            "a Transformed one or a ZeroMeanDensity, got ExactNet; wrap the network in a ScoreDensity",
        ),
        (lambda: Transformed(density(), torch.exp), TypeError, "must be a torch.distributions Transform"),
        (lambda: Transformed(density(), AbsTransform()), ValueError, "must be bijective"),
        (lambda: zscore(0.0, torch.tensor([1.0, 0.0])), ValueError, "std > 0"),
        (lambda: Logit(1, 1), ValueError, "high > low"),
        (lambda: whiten(torch.ones(5, 2)), ValueError, "lie in a subspace"),
        (lambda: Whitening(torch.zeros(2), 2 * torch.eye(2), torch.ones(2)), ValueError, "orthogonal basis"),
        (lambda: Whitening(torch.zeros(3), torch.eye(3)[:, :2], torch.ones(2)), ValueError, "keep all components"),
    ],
)
def test_bad_transforms_are_explained(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_samples_of_another_shape_than_the_transforms_own_are_refused():
    density = fs.ScoreDensity(ExactNet(mixture(2), fs.VP()), fs.VP(), "eps")
    own = Transformed(density, zscore(torch.zeros(2), torch.ones(2)))
    with pytest.raises(ValueError, match=r"x has shape \(3,\) a sample, and .* of another shape: The size of tensor"):
        own.estimate(torch.randn(4, 3), nfe=16)
