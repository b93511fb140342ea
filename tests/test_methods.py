"""The methods "density", "discrete" and "elbo" against their definitions, summed over every timestep in the open."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from analytic import ExactNet, Target, ill_conditioned, mixture
from torch.distributions import Normal, kl_divergence

import fastscore as fs
from fastscore.estimator.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")

NFE = 4000
TARGET, X = mixture(2), mixture(2).sample(6, seed=4)
BETAS = torch.linspace(0.02, 0.6, 20, dtype=torch.float64)
TABLES = {
    "20 steps": BETAS,
    "linear(50)": torch.linspace(1e-4, 0.02, 50, dtype=torch.float64),
}


def quadrature(points):
    """Nodes (points^2, 2) and weights of the expectation over two standard normals."""
    node, weight = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(points))
    return torch.cartesian_prod(node, node), torch.outer(weight, weight).flatten() / (2 * math.pi)


# The integrands are smooth: 60 x 60 points give what 40 x 40 points give, to 1e-4 nats.
EPS, WEIGHT = quadrature(40)


def noised(x, step, alpha_bar, net):
    """Return eps, eps_hat and x_t of one timestep, each (len(EPS), len(x), 2)."""
    eps = EPS[:, None].expand(-1, len(x), -1)
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps
    time = torch.full((len(EPS) * len(x),), step)
    return eps, net(x_t.flatten(0, 1), time).reshape(eps.shape), x_t


def discrete_sum(betas, x, net):
    """Li and Yan's sum with t = 1 - alpha_bar."""
    t = 1 - torch.cumprod(1 - betas, 0)
    following = torch.cat([t[1:], torch.ones(1, dtype=torch.float64)])
    total = torch.full((len(x),), -(1 + math.log(2 * math.pi * float(t[0]))), dtype=torch.float64)  # d/2 = 1
    for i in range(len(t)):
        eps, eps_hat, _ = noised(x, i, 1 - t[i], net)
        weight = (following[i] - t[i]) / (t[i] * (1 - t[i]))
        total -= weight * (WEIGHT @ (eps - eps_hat).square().sum(-1)) / 2
    return total


def ddpm_bound(betas, x, net):
    """DDPM's variational bound: prior, Kullback-Leibler terms of all steps, and the first step's decoder."""
    bar = torch.cumprod(1 - betas, 0)
    total = -kl_divergence(Normal(bar[-1].sqrt() * x, (1 - bar[-1]).sqrt()), Normal(0.0, 1.0)).sum(-1)
    for i in range(len(bar)):
        _, eps_hat, x_t = noised(x, i, bar[i], net)
        x_hat = (x_t - (1 - bar[i]).sqrt() * eps_hat) / bar[i].sqrt()
        if i == 0:
            term = Normal(x_hat, betas[0].sqrt()).log_prob(x)
        else:
            from_x = bar[i - 1].sqrt() * betas[i] / (1 - bar[i])
            from_x_t = (1 - betas[i]).sqrt() * (1 - bar[i - 1]) / (1 - bar[i])
            scale = ((1 - bar[i - 1]) / (1 - bar[i]) * betas[i]).sqrt()
            posterior = Normal(from_x * x + from_x_t * x_t, scale)
            term = -kl_divergence(posterior, Normal(from_x * x_hat + from_x_t * x_t, scale))
        total += WEIGHT @ term.sum(-1)
    return total


def trapezoid(betas, x, net):
    """log q + the trapezoid rule in log-SNR for the difference to q = N(0, 1), whose eps_q is sigma x_t."""
    bar = torch.cumprod(1 - betas, 0)
    total, values = Normal(0.0, 1.0).log_prob(x).sum(-1), []
    for i in range(len(bar)):
        eps, eps_hat, x_t = noised(x, i, bar[i], net)
        eps_q = (1 - bar[i]).sqrt() * x_t
        values.append(WEIGHT @ ((eps - eps_hat).square() - (eps - eps_q).square()).sum(-1))
    return total + torch.trapezoid(torch.stack(values), torch.logit(bar), dim=0) / 2  # log-SNR falls along the table


BRUTE = {"density": trapezoid, "discrete": discrete_sum, "elbo": ddpm_bound}


def check(found, expected):
    """Every point within 4 of its standard errors, and so their mean; returns the mean's standard error."""
    error = (found.stderr**2 + 1e-4**2).sqrt()
    assert bool(((found.log_prob - expected).abs() < 4 * error).all())
    of_mean = float(error.square().mean().sqrt()) / len(error) ** 0.5
    assert float((found.log_prob - expected).mean().abs()) < 4 * of_mean
    return of_mean


@pytest.mark.parametrize("table", TABLES)
def test_every_method_is_the_sum_that_defines_it(table):
    schedule = fs.DDPM.from_betas(TABLES[table])
    net = ExactNet(TARGET, schedule, gain=1.1).requires_grad_(False)  # a wrong network: the sums hold for any
    density = fs.ScoreDensity(net, schedule, "eps")
    expected = {method: brute(TABLES[table], X, net) for method, brute in BRUTE.items()}
    errors = [check(density.estimate(X, nfe=NFE, method=method), expected[method]) for method in BRUTE]
    # The noise is far below what tells the methods apart, so that one cannot pass for another.
    means = torch.stack(list(expected.values())).mean(1)
    assert float(torch.pdist(means[:, None]).min()) > 8 * max(errors)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("method", BRUTE)
def test_a_gaussian_that_is_its_own_reference_has_the_sum_without_noise(method, table):
    schedule, target = fs.DDPM.from_betas(TABLES[table]), ill_conditioned(d=2, lowest=0.1, highest=2.0)
    exact, net = fs.Reference(torch.ones(1), target.mean, target.eigenvalue, target.basis), ExactNet(target, schedule)
    found = fs.ScoreDensity(net, schedule, "eps", reference=exact).estimate(X, nfe=16, method=method)
    if method == "density":  # the integral without its discretization
        assert torch.allclose(found.log_prob, target.log_prob(X), rtol=1e-9)
    else:  # residuals are quadratic in the noise, which the quadrature integrates exactly
        assert torch.allclose(found.log_prob, BRUTE[method](TABLES[table], X, net), rtol=1e-9)


@pytest.mark.parametrize("method", ["discrete", "elbo"])
def test_a_mixture_reference_changes_no_method(method):
    schedule, net = fs.DDPM.from_betas(BETAS), ExactNet(TARGET, fs.DDPM.from_betas(BETAS))
    reference = fs.Reference(TARGET.weight, TARGET.mean, torch.full((5, 2), 0.2))
    density = fs.ScoreDensity(net, schedule, "eps", reference=reference)
    check(density.estimate(X, nfe=NFE, method=method), BRUTE[method](BETAS, X, net))


@pytest.mark.parametrize("method", ["discrete", "elbo"])
def test_discretization_is_the_difference_to_the_integral_on_the_same_draws(in_chunks, method):
    schedule = fs.DDPM.from_betas(BETAS)
    density = fs.ScoreDensity(ExactNet(TARGET, schedule), schedule, "eps")
    exact = float((BRUTE[method](BETAS, X, density.model) - BRUTE["density"](BETAS, X, density.model)).mean())
    assert abs(exact) > 0.1
    found = density.estimate(X, nfe=NFE, seed=3, method=method)
    # Both sums of the same draws: their difference has the noise of the few entries where the weights differ.
    assert found.discretization == pytest.approx(exact, abs=0.5 * float(found.stderr.mean()))
    in_chunks(65)  # one sample at once
    cut, few = (density.estimate(X[:8], nfe=64, seed=3, method=method) for _ in range(2))
    assert cut.discretization == pytest.approx(few.discretization, abs=1e-10)


@pytest.mark.parametrize("method", ["discrete", "elbo"])
def test_a_continuous_schedule_is_cut_into_a_thousand_steps(method):
    schedule = fs.VP()
    t = 1e-5 + (1 - 1e-5) / 1000 * torch.arange(1, 1001, dtype=torch.float64)
    bar = torch.exp(-0.5 * 19.9 * t**2 - 0.1 * t)
    table = fs.DDPM(bar)
    density = fs.ScoreDensity(ExactNet(TARGET, schedule), schedule, "eps")
    same = fs.ScoreDensity(ExactNet(TARGET, table), table, "eps")
    for x in (X, 3 * X):
        # The closed-form part, to rounding of the time.
        assert torch.allclose(
            *(METHODS[method].base(fs.Reference.isotropic(), x, s) for s in (schedule, table)), rtol=1e-9
        )
    found, expected = (q.estimate(X, nfe=4000, method=method) for q in (density, same))
    # The nodes of the schedule reach further than the table's, so the draws differ: 4 standard errors of independence.
    error = (found.stderr**2 + expected.stderr**2).sqrt()
    assert bool(((found.log_prob - expected.log_prob).abs() < 4 * error).all())


@pytest.mark.parametrize("method", ["discrete", "elbo"])
def test_finer_tables_come_to_the_density(method):
    target = ill_conditioned(d=3, lowest=0.1, highest=2.0)
    x = target.sample(5)
    exact = fs.Reference(torch.ones(1), target.mean, target.eigenvalue, target.basis)
    errors = []
    for steps in (400, 800, 1600, 3200):
        schedule = fs.DDPM(torch.sigmoid(torch.linspace(14, -14, steps, dtype=torch.float64)))
        density = fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps", reference=exact)
        # The reference is the target: no noise, and what is left is the method's own error.
        found = density.estimate(x, nfe=16, method=method)
        assert torch.allclose(found.log_prob, METHODS[method].base(exact, x, schedule), atol=1e-6)
        errors.append(float((found.log_prob - target.log_prob(x)).mean().abs()))
    # Both are first-order rules: an error a half as large with twice the steps, but for terms of the next order.
    for coarse, fine in pairwise(errors):
        assert fine == pytest.approx(coarse / 2, rel=0.1)
    assert errors[-1] < 0.1


def test_density_starts_from_the_reference_itself():
    reference = fs.Reference(TARGET.weight, TARGET.mean, torch.full((5, 2), 0.09))
    # The target's float32 weights sum to one within 1e-7.
    assert torch.allclose(METHODS["density"].base(reference, X, fs.VP()), TARGET.log_prob(X), atol=1e-6)


@pytest.mark.parametrize("steps", [50, 1000])
def test_bars_of_a_sum_that_one_step_outweighs_cover(steps):
    """The last beta of a cosine table is 0.999: of DDPM's bound it has a weight of 1,000, where f is about zero."""
    schedule, mean = fs.DDPM.cosine(steps), torch.full((1, 1), 0.4)
    target = Target(torch.ones(1), mean, torch.full((1, 1, 1), 0.36))
    density, x = (
        fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps", program=False),
        target.sample(16, seed=6).float(),
    )
    truth = torch.stack([density.estimate(x, nfe=8192, seed=100 + s, method="elbo").log_prob for s in range(4)]).mean(0)
    for nfe in (16, 64):
        found = [density.estimate(x, nfe=nfe, seed=seed, method="elbo") for seed in range(24)]
        inside = torch.stack([(each.log_prob - truth).abs() < 1.96 * each.stderr for each in found])
        # 384 intervals of 16 samples; it was a quarter of them.
        assert float(inside.double().mean()) > 0.88, nfe
