"""Targets with exact densities and exact score networks, written apart from fastscore's own reference densities."""

import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import fastscore as fs

SCHEDULES = {
    "ddpm-linear": fs.DDPM.linear(1000),
    "ddpm-scaled-linear": fs.DDPM.scaled_linear(1000),
    "ddpm-cosine": fs.DDPM.cosine(1000),
    "vp": fs.VP(),
    "cosine": fs.Cosine(),
    "ve": fs.VE(),
    "edm": fs.EDM(),
    "flow-1": fs.FlowMatching(1),
    "flow-0": fs.FlowMatching(0),
    "li-yan": fs.LiYan(),
    "log-snr": fs.LogSNR(),
}
PREDICTIONS = ("eps", "x0", "denoiser", "v", "score", "flow")


class Target:
    """A Gaussian mixture with full covariances: exact log_prob, samples and posterior mean of the data given x_t."""

    def __init__(self, weight, mean, cov):
        self.weight, self.mean, self.cov = weight.double(), mean.double(), cov.double()
        parts = MultivariateNormal(self.mean, self.cov)
        self.distribution = MixtureSameFamily(Categorical(self.weight), parts)
        self.eigenvalue, self.basis = torch.linalg.eigh(self.cov)
        self.variance = self.cov[:, 0, 0]
        eye = torch.eye(self.mean.shape[1], dtype=torch.float64)
        self.isotropic = torch.equal(self.cov, self.variance[:, None, None] * eye)

    def sample(self, count, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.distribution.sample((count,))

    def log_prob(self, x):
        return self.distribution.log_prob(x.double())

    def denoised(self, x_t, alpha, sigma):
        """E[x | x_t] for x_t (N, d), alpha and sigma (N,)."""
        if self.isotropic:
            return self._denoised_by_isotropic(x_t, alpha[:, None], sigma[:, None])
        means, logs = [], []
        for k in range(len(self.weight)):
            total = alpha[:, None] ** 2 * self.eigenvalue[k] + sigma[:, None] ** 2
            z = (x_t - alpha[:, None] * self.mean[k]) @ self.basis[k]
            logs.append(self.weight[k].log() - 0.5 * (total.log() + z**2 / total).sum(1))
            means.append(self.mean[k] + (alpha[:, None] * self.eigenvalue[k] * z / total) @ self.basis[k].T)
        posterior = torch.stack(logs).softmax(0)
        return (posterior[..., None] * torch.stack(means)).sum(0)

    def _denoised_by_isotropic(self, x_t, alpha, sigma):
        """The same where every covariance is a multiple of the identity: two products, and no turns into a basis."""
        total = alpha**2 * self.variance + sigma**2  # (N, K)
        square = (
            x_t.square().sum(1, keepdim=True) - 2 * alpha * (x_t @ self.mean.T) + alpha**2 * self.mean.square().sum(1)
        )
        posterior = (self.weight.log() - 0.5 * (x_t.shape[1] * total.log() + square / total)).softmax(1)
        gain = posterior * alpha * self.variance / total
        return posterior @ self.mean + gain.sum(1, keepdim=True) * x_t - alpha * (gain @ self.mean)


class ExactNet(nn.Module):
    """The exact network of a target under a schedule and a parametrization; `gain` makes it wrong and trainable."""

    def __init__(self, target, schedule, predicts="eps", gain=None):
        super().__init__()
        self.target, self.schedule, self.predicts = target, schedule, predicts
        self.gain = None if gain is None else nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x_t, t, shift=None):
        shape = x_t.shape
        alpha, sigma = self.schedule.alpha_sigma(t.detach())
        flat = x_t.reshape(len(x_t), -1).double()
        x = self.target.denoised(flat, alpha, sigma)
        if shift is not None:
            x = x + shift.double().reshape(len(shift), -1)
        if self.gain is not None:
            x = x * self.gain
        column = alpha[:, None], sigma[:, None]
        eps = (flat - column[0] * x) / column[1]
        if self.predicts == "eps":
            out = eps
        elif self.predicts in ("x0", "denoiser"):
            out = x
        elif self.predicts == "v":
            out = column[0] * eps - column[1] * x
        elif self.predicts == "score":
            out = -eps / column[1]
        else:
            d_alpha, d_sigma = self.schedule.derivatives(t.detach())
            out = d_alpha[:, None] * x + d_sigma[:, None] * eps
        return out.to(x_t.dtype).reshape(shape)


def mixture(d, components=5, std=0.3, seed=0):
    """The mixture of docs/mathematics.md: standard normal means, softmax weights, isotropic components."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(components, d, generator=generator)
    weight = torch.randn(components, generator=generator).softmax(0)
    return Target(weight, mean, std**2 * torch.eye(d).expand(components, d, d))


def ill_conditioned(d=8, lowest=1e-3, highest=10.0, seed=0):
    """One Gaussian whose covariance has a condition number of highest / lowest, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    value = torch.logspace(torch.log10(torch.tensor(lowest)), torch.log10(torch.tensor(highest)), d).double()
    cov = (basis * value) @ basis.T
    return Target(torch.ones(1), torch.randn(1, d, generator=generator), ((cov + cov.T) / 2)[None])
