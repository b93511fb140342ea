"""Timestep weights against their definitions, and the tables of docs/weights.md against the script that writes them."""

import math
import re

import pytest
import torch
import weights as page
from analytic import ExactNet, mixture
from torch.distributions import Normal, kl_divergence

import fastscore as fs

TABLES = {"linear": fs.DDPM.linear(1000), "cosine": fs.DDPM.cosine(1000), "linear(20)": fs.DDPM.linear(20)}
NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?")


@pytest.mark.parametrize("name", TABLES)
def test_weights_are_the_coefficients_of_the_two_papers(name):
    schedule = TABLES[name]
    bar = torch.sigmoid(schedule.table)
    alpha = bar / torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    following = torch.cat([alpha[1:], torch.zeros(1, dtype=torch.float64)])
    t = torch.arange(len(bar))
    # float64, with 1 - bar of 1e-4 and better in between.
    paper = (1 - following) / (2 * (1 - bar))
    assert torch.allclose(fs.density_weights(schedule, t, "eps"), paper, rtol=1e-10)
    ddpm = (1 - alpha[1:]) / (2 * (alpha[1:] - bar[1:]))
    assert torch.allclose(fs.elbo_weights(schedule, t, "eps")[1:], ddpm, rtol=1e-10)
    assert float(fs.elbo_weights(schedule, torch.tensor(0), "eps")) == pytest.approx(1 / (2 * float(alpha[0])))


@pytest.mark.parametrize("step", [1, 10, 19])
def test_the_elbo_weight_is_a_kullback_leibler_divergence(step):
    """Of the posterior at x_t from the model's step, for any prediction of any error."""
    schedule = TABLES["linear(20)"]
    bar = torch.sigmoid(schedule.table)
    now, before = bar[step], bar[step - 1]
    x, eps, eps_hat = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    x_t = now.sqrt() * x + (1 - now).sqrt() * eps
    x_hat = (x_t - (1 - now).sqrt() * eps_hat) / now.sqrt()
    beta = 1 - now / before
    scale = ((1 - before) / (1 - now) * beta).sqrt()

    def step_from(data):
        return Normal((before.sqrt() * beta * data + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - now), scale)

    kl = float(kl_divergence(step_from(x), step_from(x_hat)).sum())
    alpha, sigma = now.sqrt(), (1 - now).sqrt()
    targets = {  # of the noise and of its estimate
        "eps": (eps, eps_hat),
        "x0": (x, x_hat),
        "v": (alpha * eps - sigma * x, alpha * eps_hat - sigma * x_hat),
        "score": (-eps / sigma, -eps_hat / sigma),
    }
    for predicts, (target, prediction) in targets.items():
        weight = float(fs.elbo_weights(schedule, torch.tensor(step), predicts))
        assert weight * float((target - prediction).square().sum()) == pytest.approx(kl, rel=1e-9)


def test_the_trapezoid_rule_weighs_an_integral_over_log_snr():
    schedule = TABLES["cosine"]
    weight = fs.density_weights(schedule, torch.arange(1000), "eps", rule="density")
    f = torch.sigmoid(schedule.table)
    assert float(weight @ f) == pytest.approx(-float(torch.trapezoid(f, schedule.table)) / 2, rel=1e-12)


def test_shapes_and_refusals():
    schedule = TABLES["linear"]
    t = torch.tensor([[0, 5], [999, 7]])
    assert torch.equal(fs.density_weights(schedule, t, "eps")[1], fs.density_weights(schedule, t[1], "eps"))
    with pytest.raises(ValueError, match=r"need a table of timesteps such as DDPM.linear\(1000\), got VP"):
        fs.elbo_weights(fs.VP(), t, "eps")
    with pytest.raises(ValueError, match="knows timesteps 0 to 999, got 1000 to 1000"):
        fs.density_weights(schedule, torch.tensor([1000]), "eps")
    with pytest.raises(ValueError, match="no time derivative"):
        fs.elbo_weights(schedule, t, "flow")
    with pytest.raises(ValueError, match="rule must be 'discrete'"):
        fs.density_weights(schedule, t, "eps", rule="elbo")


def test_the_tables_of_the_page_are_what_the_script_writes():
    text = page.PAGE.read_text()
    again = page.regenerate(text)
    assert NUMBER.sub("#", again) == NUMBER.sub("#", text)
    old, new = (torch.tensor([float(n) for n in NUMBER.findall(t)], dtype=torch.float64) for t in (text, again))
    # Three digits are written; the last may round the other way on another machine.
    assert torch.allclose(old, new, rtol=0.011)


def test_the_line_has_the_residual_and_the_entropy_of_its_density():
    target = page.TARGETS["three peaks of 0.1"]
    # In one dimension the formula itself holds to quadrature: the integral over log-SNR gives the negative entropy.
    log_snr = torch.linspace(-22, 22, 4401, dtype=torch.float64)
    integral = torch.trapezoid(target.residual(log_snr) - torch.sigmoid(log_snr), log_snr)
    formula = -0.5 * math.log(2 * math.pi * math.e) - 0.5 * float(integral)
    # What lies beyond +-22 is e^-22 (1/std^2 + E x^2).
    assert formula == pytest.approx(target.negative_entropy(), abs=1e-7)


def test_both_sums_err_alike_on_standard_normal_data():
    target = page.TARGETS["N(0, 1)"]
    for length in (1000, 50):
        schedule = page.schedules(length)["cosine"]
        found, exact = page.mean_log_prob(schedule, target), target.negative_entropy()
        u = torch.sigmoid(-schedule.table)
        ratio = torch.cat([u[1:], torch.ones(1, dtype=torch.float64)]) / u
        lost = 0.5 * float((ratio - 1 - ratio.log()).sum())
        for method in ("paper", "DDPM"):
            assert found[method] - exact == pytest.approx(-lost, abs=1e-8)
        assert found["trapezoid"] == pytest.approx(exact, abs=1e-12)


def test_the_sums_are_what_an_estimate_computes():
    two = mixture(1, components=3, std=0.2)
    target = page.Line(two.weight, two.mean[:, 0], 0.2)
    schedule, x = fs.DDPM.linear(100), two.sample(4000, seed=1)
    density = fs.ScoreDensity(ExactNet(two, schedule), schedule, "eps")
    expected = page.mean_log_prob(schedule, target)
    for method, name in (("discrete", "paper"), ("elbo", "DDPM"), ("density", "trapezoid")):
        mean, error = density.estimate(x, nfe=100, method=method).mean()
        assert abs(mean - expected[name]) < 4 * error
