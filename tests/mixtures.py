"""Diagonal Gaussian mixtures of many shapes, their exact networks, and points that are not like their samples."""

import math

import torch
from torch import Tensor, nn

from fastscore.process.schedules import Schedule


class Mixture:
    """Gaussians with means (K, d), standard deviations (K, d) and weights (K,)."""

    def __init__(self, mean: Tensor, std: Tensor, weight: Tensor | None = None):
        self.mean = mean.double()
        self.std = std.double().expand_as(self.mean)
        weight = torch.ones(len(mean)) if weight is None else weight
        self.weight = weight.double() / weight.double().sum()

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(self.weight, count, True, generator=generator)
        noise = torch.randn(count, self.mean.shape[1], generator=generator, dtype=torch.float64)
        return (self.mean[k] + self.std[k] * noise).float()

    def log_prob(self, x: Tensor) -> Tensor:
        z = (x.double()[:, None] - self.mean) / self.std
        norm = self.std.log().sum(1) + 0.5 * x.shape[1] * math.log(2 * math.pi)
        return torch.logsumexp(self.weight.log() - norm - 0.5 * z.square().sum(2), 1)

    def between(self, count: int, generator: torch.Generator) -> Tensor:
        """Points near the middle of two components."""
        first, second = (torch.randint(len(self.mean), (count,), generator=generator) for _ in range(2))
        share = 0.4 + 0.2 * torch.rand(count, 1, generator=generator)
        return (self.mean[first] * share + self.mean[second] * (1 - share)).float()

    def beyond(self, count: int, least: float, most: float, generator: torch.Generator) -> Tensor:
        """Points `least` to `most` further than sqrt(d) standard deviations from a component."""
        d = self.mean.shape[1]
        k = torch.randint(len(self.mean), (count,), generator=generator)
        way = torch.randn(count, d, generator=generator, dtype=torch.float64)
        radius = d**0.5 + least + (most - least) * torch.rand(count, 1, generator=generator)
        return (self.mean[k] + self.std[k] * radius * way / way.norm(dim=1, keepdim=True)).float()


class ExactEps(nn.Module):
    """The exact noise prediction of a mixture."""

    def __init__(self, mixture: Mixture, schedule: Schedule):
        super().__init__()
        self.mixture, self.schedule = mixture, schedule

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        mean, std, weight = self.mixture.mean, self.mixture.std, self.mixture.weight
        alpha, sigma = self.schedule.alpha_sigma(t)
        if bool((std == std[:, :1]).all()):
            return self._of_isotropic(x.double(), alpha[:, None], sigma[:, None]).to(x.dtype)
        alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        variance = alpha**2 * std**2 + sigma**2  # (rows, K, d)
        gap = x.double()[:, None] - alpha * mean
        logits = weight.log() - 0.5 * (gap.square() / variance + variance.log()).sum(2)
        return (sigma[:, 0] * (logits.softmax(1)[..., None] * gap / variance).sum(1)).to(x.dtype)

    def _of_isotropic(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The same of Gaussians with one standard deviation each, without anything of size rows x K x d."""
        mean, std, weight = self.mixture.mean, self.mixture.std[:, 0], self.mixture.weight
        std = std[:1] if bool((std == std[0]).all()) else std
        variance = alpha**2 * std**2 + sigma**2  # (rows, K), or (rows, 1) where all components have one
        square = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ mean.T) + alpha**2 * mean.square().sum(1)
        logits = weight.log() - 0.5 * (square / variance + x.shape[1] * variance.log())
        share = logits.softmax(1) / variance
        return sigma * (x * share.sum(1, keepdim=True) - alpha * (share @ mean))


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _spirals() -> Mixture:
    t = torch.linspace(0.5, 3, 40, dtype=torch.float64)
    arm = torch.stack([t * torch.cos(3 * t), t * torch.sin(3 * t)], 1)
    return Mixture(torch.cat([arm, -arm]), torch.tensor(0.08))


def _ring() -> Mixture:
    at = torch.arange(24, dtype=torch.float64) * 2 * math.pi / 24
    mean = torch.cat([2 * torch.cos(at)[:, None], 2 * torch.sin(at)[:, None], torch.zeros(24, 6)], 1)
    return Mixture(mean, torch.tensor(0.3))


MIXTURES = {
    "isotropic, d = 16": Mixture(_normal(5, 16), torch.tensor(0.3)),
    "unequal, d = 8": Mixture(
        2 * _normal(4, 8), torch.tensor([0.2, 0.4, 0.6, 0.8])[:, None], torch.tensor([0.4, 0.3, 0.2, 0.1])
    ),
    "spirals, d = 2": _spirals(),
    "ring, d = 8": _ring(),
    "heavy tails, d = 4": Mixture(torch.zeros(4, 4), torch.tensor([0.25, 0.5, 1.0, 2.0])[:, None]),
    "badly scaled, d = 4": Mixture(
        _normal(3, 4) * torch.tensor([0.02, 0.2, 1.0, 5.0]), torch.tensor([0.02, 0.1, 0.5, 2.0])
    ),
}
