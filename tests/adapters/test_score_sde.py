"""score_sde's conventions. It is on no package index, so VPSDE, subVPSDE and VESDE here are our own, with the names
of its sde_lib; `score_fn` below states what its networks return."""

import math

import pytest
import torch
from adapters.exact import assert_exact, column, exact, noised, relative
from torch import nn

from fastscore.adapters import from_score_sde
from fastscore.process.predictions import eps_from


class VPSDE:
    def __init__(self, beta_min=0.1, beta_max=20, N=1000):
        self.beta_0, self.beta_1, self.N, self.T = beta_min, beta_max, N, 1
        bar = torch.cumprod(1 - torch.linspace(beta_min / N, beta_max / N, N), 0)
        self.sqrt_alphas_cumprod, self.sqrt_1m_alphas_cumprod = bar.sqrt(), (1 - bar).sqrt()

    def coefficient(self, t):
        return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0

    def marginal(self, t):
        return torch.exp(self.coefficient(t)), torch.sqrt(1 - torch.exp(2 * self.coefficient(t)))


class subVPSDE(VPSDE):
    def marginal(self, t):
        return torch.exp(self.coefficient(t)), 1 - torch.exp(2 * self.coefficient(t))


class VESDE:
    def __init__(self, sigma_min=0.01, sigma_max=50, N=1000):
        self.sigma_min, self.sigma_max, self.N, self.T = sigma_min, sigma_max, N, 1
        self.discrete_sigmas = torch.exp(torch.linspace(math.log(sigma_min), math.log(sigma_max), N))

    def marginal(self, t):
        return torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t


def score_fn(sde, model, x, t, continuous):
    """What score_sde's get_score_fn makes of a network."""
    if isinstance(sde, VESDE):
        labels = sde.marginal(t)[1] if continuous else torch.round((sde.T - t) * (sde.N - 1)).long()
        return model(x, labels)
    if continuous or isinstance(sde, subVPSDE):
        return -model(x, t * 999) / column(sde.marginal(t)[1], x)
    labels = t * (sde.N - 1)
    return -model(x, labels) / column(sde.sqrt_1m_alphas_cumprod[labels.round().long()], x)


class Net(nn.Module):
    """A small network of x and its labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, labels):
        return self.conv(x) * (labels.to(x.dtype) / 100).reshape(-1, 1, 1, 1).cos()


class Exact(nn.Module):
    """The target's exact network: alpha and sigma from labels, eps (VP) or score (VE) out."""

    def __init__(self, marginal, score):
        super().__init__()
        self.marginal, self.score = marginal, score

    def forward(self, x, labels):
        alpha, sigma = self.marginal(labels)
        eps, _ = exact(x, alpha, sigma)
        return -eps / column(sigma, x) if self.score else eps


CASES = {
    "VP": (VPSDE, True),
    "subVP": (subVPSDE, True),
    "VE": (VESDE, True),
    "VP, table": (VPSDE, False),
    "VE, table": (VESDE, False),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_score_fn(name):
    sde, continuous = CASES[name][0](), CASES[name][1]
    model = Net().double()
    density = from_score_sde(model, sde, continuous)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64) * (1 - 1e-3) + (1e-3 if continuous else 0)
    if not continuous:
        t = (t * (sde.N - 1)).round() / (sde.N - 1)
    time = t if continuous else (t * (sde.N - 1)).round().long()
    x, _, x_t = noised(density.schedule, time)
    alpha, sigma = density.schedule.alpha_sigma(time)
    with torch.no_grad():
        output = density.model(x_t, time)
        c_f, c_x = (column(c, x) for c in eps_from(density.predicts, density.schedule, time))
        eps_hat = c_f * output + c_x * x_t
        # A table of x + sigma eps comes variance-preserving to the adapter: the same noise in x_t / alpha.
        own_x = x_t / column(alpha, x) if name == "VE, table" else x_t
        own_sigma = sigma / alpha if name == "VE, table" else sigma
        score = score_fn(sde, model, own_x, t, continuous)
    assert relative(eps_hat, -column(own_sigma, x) * score) < 1e-6
    if continuous:
        for found, own in zip((alpha, sigma), sde.marginal(t)):
            assert relative(found, own) < 1e-12
    elif name == "VE, table":
        assert relative(own_sigma, sde.discrete_sigmas.double()[time]) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_log_prob_of_an_exact_network(name):
    sde, continuous = CASES[name][0](), CASES[name][1]
    marginals = {
        "VP": lambda labels: sde.marginal(labels / 999),
        "subVP": lambda labels: sde.marginal(labels / 999),
        "VE": lambda labels: (torch.ones_like(labels), labels),
        "VP, table": lambda labels: (sde.sqrt_alphas_cumprod[labels], sde.sqrt_1m_alphas_cumprod[labels]),
        "VE, table": lambda labels: (torch.ones(1), sde.discrete_sigmas.flip(0).double()[labels]),
    }
    density = from_score_sde(Exact(marginals[name], score=name.startswith("VE")), sde, continuous, program=False)
    assert_exact(density, rounding=1e-5)


def test_bad_input_is_explained():
    with pytest.raises(TypeError, match="model must be a torch module, got function"):
        from_score_sde(lambda x, t: x, VPSDE())
    with pytest.raises(
        TypeError, match="sde must be a VPSDE, subVPSDE or VESDE of score_sde, got object without beta_0"
    ):
        from_score_sde(Net(), object())
