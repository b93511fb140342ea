"""Reference densities against torch.distributions, autograd scores and Monte Carlo."""

import math

import pytest
import torch
from analytic import Target

from fastscore import Reference
from fastscore.reference.fitting import fit_mixture
from fastscore.reference.levels import Level

D = 5


def make(kind, components):
    generator = torch.Generator().manual_seed(components)
    weight = torch.rand(components, generator=generator).double() + 0.5
    mean = torch.randn(components, D, generator=generator).double()
    variance = 0.05 + torch.rand(components, D, generator=generator).double()
    if kind == "full":
        basis, _ = torch.linalg.qr(torch.randn(components, D, D, generator=generator).double())
        return Reference(weight / weight.sum(), mean, variance, basis)
    if kind == "turned":
        empty = torch.empty(0)
        return Reference(weight / weight.sum(), mean, variance, factors=[_orthonormal(D, generator), empty, empty])
    return Reference(weight / weight.sum(), mean, variance)


def _orthonormal(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]


def as_target(q):
    turned = q.channels if q.turned else torch.eye(D).double()
    basis = q.basis if q.full else turned.expand(q.components, D, D)
    cov = (basis * q.variance.expand(q.components, D)[:, None, :]) @ basis.mT
    return Target(q.weight, q.mean.expand(q.components, D) @ turned.mT, (cov + cov.mT) / 2)


CASES = [("diagonal", 1), ("diagonal", 3), ("full", 1), ("full", 3), ("isotropic", 1), ("turned", 1), ("turned", 3)]


def reference(kind, components):
    return Reference.isotropic(1.7) if kind == "isotropic" else make(kind, components)


@pytest.mark.parametrize(("kind", "components"), CASES)
def test_log_prob_is_that_of_torch_distributions(kind, components):
    q = reference(kind, components)
    x = torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(q.log_prob(x), as_target(q).log_prob(x), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "components"), CASES)
def test_residual_is_that_of_the_exact_score(kind, components, dtype):
    q = reference(kind, components)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, D, dtype=torch.float64, generator=generator)
    eps = torch.randn(6, 4, D, dtype=torch.float64, generator=generator)
    log_snr = torch.tensor([-6.0, -1.0, 3.0, 9.0], dtype=torch.float64)
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    x_t = alpha[:, None] * x[:, None] + sigma[:, None] * eps
    target, expected = as_target(q), torch.empty(6, 4, dtype=torch.float64)
    for r in range(4):
        x_hat = target.denoised(x_t[:, r], alpha[r].expand(6), sigma[r].expand(6))
        expected[:, r] = (eps[:, r] - (x_t[:, r] - alpha[r] * x_hat) / sigma[r]).square().sum(1)
    found = q.residual(x.to(dtype), x_t.to(dtype), eps.to(dtype), alpha, sigma)
    # float32: a few dozen roundings of terms up to |x|^2 / variance = 100 times the result.
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    assert torch.allclose(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "components"), CASES)
def test_divergence_is_that_of_autograd(kind, components):
    q = reference(kind, components)
    x_t = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for log_snr in (-6.0, 0.0, 5.0):
        snr = torch.tensor([log_snr], dtype=torch.float64)
        alpha, sigma = torch.sigmoid(snr).sqrt(), torch.sigmoid(-snr).sqrt()
        eps, divergence = q.eps_and_divergence(x_t, float(alpha), float(sigma))
        # The gain of a variance of 0.01 at log-SNR 5 is 100: some hundred roundings.
        torch.testing.assert_close(eps, q.eps(x_t[:, None], alpha, sigma)[:, 0], rtol=1e-12, atol=1e-12)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda one: q.eps(one[None, None], alpha, sigma)[0, 0]))(x_t)  # noqa: B023
        expected = torch.einsum("bii->b", jacobian)
        torch.testing.assert_close(divergence, expected, rtol=1e-11, atol=1e-11)
        level = Level.of(q.tensors(), float(alpha), float(sigma), D, x_t.dtype, None)
        for found, wanted in zip(level.eps_and_jacobian(x_t), (eps, jacobian)):
            torch.testing.assert_close(found.expand_as(wanted), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("kind", "components"), [("diagonal", 1), ("diagonal", 3), ("isotropic", 1)])
def test_jacobians_under_a_mask_at_many_levels_are_those_of_autograd(kind, components):
    q, mask = reference(kind, components), torch.arange(7 * D).reshape(7, D) % 3 > 0
    x_t = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alpha, sigma = torch.tensor([0.1, 0.9]).double(), torch.tensor([0.95, 0.2]).double()
    levels = Level.each(q.tensors(), alpha, sigma, sigma.tolist(), D, x_t.dtype, mask)
    for i, level in enumerate(levels):
        y = x_t.clone().requires_grad_()
        eps = q.eps(y[:, None], alpha[i : i + 1], sigma[i : i + 1], mask[:, None])[:, 0]
        rows = [torch.autograd.grad(eps[:, j].sum(), y, retain_graph=True)[0] for j in range(D)]
        jacobian = torch.where(mask[:, None], torch.stack(rows, 1), 0)
        found, its_jacobian = level.eps_and_jacobian(x_t, mask)
        # Some hundred roundings of sums of five terms.
        torch.testing.assert_close(found, eps.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(its_jacobian, jacobian, rtol=1e-11, atol=1e-11)
        trace = level.eps_and_divergence(x_t, mask)[1]
        torch.testing.assert_close(trace, torch.einsum("bii->b", jacobian), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", ["diagonal", "full", "isotropic", "turned"])
def test_expected_residual_is_the_mean_of_residuals(kind):
    q = reference(kind, 1)
    x = torch.randn(1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    snr, weight = torch.tensor([0.1, 2.0, 50.0], dtype=torch.float64), torch.tensor([0.5, 1.0, 2.0]).double()
    alpha, sigma = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
    eps = torch.randn(40000, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    draws = q.residual(x.expand(40000, D), alpha[:, None] * x + sigma[:, None] * eps, eps, alpha, sigma) @ weight
    error = 4 * float(draws.std()) / 200
    assert float(q.expected_residual(x, snr, weight)) == pytest.approx(float(draws.mean()), abs=error)


@pytest.mark.parametrize("kind", ["diagonal", "full", "isotropic", "turned"])
def test_the_density_formula_holds_for_the_reference_itself(kind):
    q = reference(kind, 1)
    x = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    lo, hi = -36.0, 36.0
    # The integral of sigmoid is softplus; beyond +-36 nothing is left in float64.
    linear = math.log1p(math.exp(hi)) - math.log1p(math.exp(lo))
    formula = -D / 2 * math.log(2 * math.pi * math.e) - 0.5 * (q.expected_integral(x, lo, hi) - D * linear)
    assert torch.allclose(formula, q.log_prob(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("kind", "components"), CASES)
def test_gaussian_keeps_mean_and_covariance(kind, components):
    q = reference(kind, components)
    g, target = q.gaussian(), as_target(q)
    mean = (target.weight[:, None] * target.mean).sum(0)
    second = (target.weight[:, None, None] * (target.cov + target.mean[:, :, None] * target.mean[:, None])).sum(0)
    cov = second - mean[:, None] * mean
    merged = as_target(g)
    assert torch.allclose(merged.mean[0], mean, atol=1e-12)
    turned = q.channels if q.turned else torch.eye(D).double()
    expected = cov if q.full else turned @ torch.diag((turned.mT @ cov @ turned).diagonal()) @ turned.mT
    assert torch.allclose(merged.cov[0], expected, atol=1e-10)


@pytest.mark.parametrize("kind", ["full", "turned"])
def test_state_survives_other_kinds_and_stays_float64(kind):
    stored, fresh = make(kind, 3), Reference.isotropic()
    fresh.load_state_dict(stored.state_dict())
    x = torch.randn(4, D, dtype=torch.float64)
    # The same numbers in another memory layout: matrix products may round differently.
    assert torch.allclose(fresh.log_prob(x), stored.log_prob(x), rtol=1e-13)
    assert fresh.half().mean.dtype == torch.float64
    assert torch.allclose(fresh.log_prob(x), stored.log_prob(x), rtol=1e-13)


def test_state_of_a_version_without_factors_is_loaded():
    stored, fresh = make("full", 3), make("turned", 1)
    fresh.load_state_dict({k: v for k, v in stored.state_dict().items() if k not in ("channels", "rows", "columns")})
    x = torch.randn(4, D, dtype=torch.float64)
    assert torch.allclose(fresh.log_prob(x), stored.log_prob(x), rtol=1e-13)


@pytest.mark.parametrize("full", [False, True])
def test_mixture_fit_finds_a_mixture(full):
    generator = torch.Generator().manual_seed(0)
    mean = 4 * torch.eye(3)
    x = mean[torch.randint(3, (3000,), generator=generator)] + 0.3 * torch.randn(3000, 3, generator=generator)
    q = fit_mixture(x[:2000], 3, full)
    truth = Target(torch.full((3,), 1 / 3), mean, 0.09 * torch.eye(3).expand(3, 3, 3))
    gap = float((truth.log_prob(x[2000:]) - q.log_prob(x[2000:])).mean())
    # A fit with p parameters on n samples loses about p / 2n: 29 / 4000 nats, with shrinkage three times that.
    assert abs(gap) < 0.022


def test_single_gaussian_fit_is_the_samples_moments():
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1)).double() @ torch.diag(
        torch.tensor([1.0, 2.0, 0.1]).double()
    )
    q = fit_mixture(x, 1, full=False)
    assert torch.allclose(q.mean[0], x.mean(0), atol=1e-10)
    assert torch.allclose(q.variance[0], x.var(0, correction=0), rtol=1e-6)


def test_too_few_samples_for_a_mixture():
    with pytest.raises(ValueError, match="mixture of 4 needs at least 8 samples, got 7"):
        fit_mixture(torch.randn(7, 2), 4)
    with pytest.raises(ValueError, match="closed-form residuals need one Gaussian, got 3"):
        make("full", 3).expected_integral(torch.randn(2, D), -1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([0.25, 0.25]), torch.zeros(2, 3), torch.ones(2, 3)), r"sum to 1, got 0\.5; divide"),
        ((torch.ones(1), torch.zeros(1, 3), torch.zeros(1, 3)), "variances must be positive"),
        ((torch.ones(1), torch.full((1, 3), torch.inf), torch.ones(1, 3)), "means finite"),
        ((torch.ones(1), torch.zeros(1, 3), torch.ones(1, 2)), r"got \(1,\), \(1, 3\) and \(1, 2\)"),
        *(
            (
                (torch.ones(1), torch.zeros(1, 6), torch.ones(1, 6), None, factors),
                "factors must be three orthonormal matrices",
            )
            for factors in (
                [2 * torch.eye(2), torch.eye(3), torch.empty(0)],
                [torch.eye(2), torch.eye(3)[:, :2], torch.empty(0)],
                [torch.eye(2), torch.empty(0), torch.empty(0)],
                [None, torch.eye(2), torch.eye(3)],
                [torch.eye(6)],
            )
        ),
        (
            (torch.ones(1), torch.zeros(1, 6), torch.ones(1, 6), None, [torch.eye(4), *[torch.empty(0)] * 2]),
            r"factors must be .*, for samples of 6 numbers.*got \[\(4, 4\), \(0,\), \(0,\)\]",
        ),
    ],
)
def test_what_is_no_mixture_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Reference(*arguments)


def test_a_negative_deviation_is_refused():
    with pytest.raises(ValueError, match=r"std must be positive \(in units of the data\), got -1"):
        Reference.isotropic(-1)
