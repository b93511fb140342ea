"""Data with a mask whose conditional densities are known, and networks that know their best predictions."""

import math

import torch
from mixtures import Mixture
from torch import nn

import fastscore as fs

SCHEDULE = fs.LogSNR(-12, 12)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class MarginalEps(nn.Module):
    """The exact network of a mixture's marginal on the entries of a mask; elsewhere it answers with `outside`."""

    def __init__(self, mixture, schedule=SCHEDULE, outside=7.0):
        super().__init__()
        self.mixture, self.schedule, self.outside = mixture, schedule, outside

    def forward(self, x, t, mask, shift=None):
        shape, x, mask = x.shape, x.flatten(1).double(), mask.flatten(1)
        alpha, sigma = (v[:, None, None] for v in self.schedule.alpha_sigma(t))
        target = self.mixture
        d = x.shape[1]
        mean, std = target.mean[:, :d], target.std[:, :d]
        mean = mean if shift is None else mean + shift.double()[:, None, None]
        variance = alpha**2 * std**2 + sigma**2
        gap = x[:, None] - alpha * mean
        logits = target.weight.log() - 0.5 * ((gap.square() / variance + variance.log()) * mask[:, None]).sum(2)
        eps = sigma[:, 0] * (logits.softmax(1)[..., None] * gap / variance).sum(1)
        return torch.where(mask, eps, self.outside).reshape(shape).to(t.dtype)


class ConditionalEps(nn.Module):
    """The exact network of N(0, C) that imputes: it sees the entries outside of the mask as they are."""

    def __init__(self, cov):
        super().__init__()
        self.cov = cov

    def forward(self, x, t, given):
        eps = torch.zeros_like(x)
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        for i, known in enumerate(given):
            mean, cov = conditional(self.cov, x[i], known)
            total = alpha[i] ** 2 * cov + sigma[i] ** 2 * torch.eye(len(cov))
            eps[i, ~known] = sigma[i] * torch.linalg.solve(total, x[i, ~known] - alpha[i] * mean)
        return eps


class Plain(nn.Module):
    """A network that is a row program."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, 6))

    def forward(self, x, t):
        return self.net(x)


def conditional(cov, x, known):
    gain = torch.linalg.solve(cov[known][:, known], cov[known][:, ~known]).T
    return gain @ x[known], cov[~known][:, ~known] - gain @ cov[known][:, ~known]


MIXTURE = Mixture(1.5 * draw(3, 6, seed=1), 0.3 + 0.5 * draw(3, 6, seed=2).abs(), torch.tensor([0.5, 0.3, 0.2]))
X = MIXTURE.sample(40, torch.Generator().manual_seed(3)).double()
MASK = torch.rand(40, 6, generator=torch.Generator().manual_seed(4)) < 0.6
MASK[:, 2] |= ~MASK.any(1)
DIAGONAL = fs.Reference(torch.tensor([0.4, 0.6]), draw(2, 6, seed=5), 0.5 + draw(2, 6, seed=6).square())
REFERENCES = {
    "isotropic": fs.Reference.isotropic(1.3),
    "diagonal": DIAGONAL.gaussian(),
    "mixture": DIAGONAL,
}


def marginal(mixture, x, mask):
    rows = []
    for point, kept in zip(x, mask):
        part = Mixture(mixture.mean[:, kept], mixture.std[:, kept], mixture.weight)
        rows.append(part.log_prob(point[kept][None]))
    return torch.cat(rows)


def density(reference="isotropic", **options):
    options = {"program": False, "noise": "independent"} | options
    return fs.ScoreDensity(MarginalEps(MIXTURE), SCHEDULE, "eps", reference=REFERENCES[reference], **options)


def seen(mask):
    return {"mask": mask}


def assert_covers(found, truth, stderr):
    """Independent normal errors: their squares add up to chi2, here within 5 of its own standard deviations."""
    z = ((found - truth) / stderr).square()
    assert abs(float(z.sum()) - len(z)) < 5 * math.sqrt(2 * len(z)) + 2
