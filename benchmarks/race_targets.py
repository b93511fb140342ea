"""What the race runs on: densities known exactly, their exact networks with passes counted, and a learned network.

A target is a mixture of isotropic Gaussians of one width, whose best noise prediction needs two matrix products and no
difference of nearly equal numbers, so that float32 is exact to rounding at every log-SNR.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

import fastscore as fs
from fastscore.demo.problems import digits
from fastscore.demo.training import train


class Mixture:
    r"""A mixture of N(m_k, std^2 I), its samples, and its posterior means given x_t = alpha x + sigma eps.

    With r = (x_t - alpha sum_k pi_k m_k) / (alpha^2 std^2 + sigma^2), E[eps | x_t] = sigma r and
    E[x | x_t] = sum_k pi_k m_k + alpha std^2 r, where pi is the posterior of the components.
    """

    def __init__(self, weight: Tensor, mean: Tensor, std: float):
        self.weight, self.mean, self.std = weight.double() / weight.double().sum(), mean.double(), std
        self._mean, self._log_weight = mean.float(), weight.log().float()
        self._half_norm = self._mean.square().sum(1) / 2

    @property
    def d(self) -> int:
        return self.mean.shape[1]

    def sample(self, count: int, seed: int) -> Tensor:
        """Return samples, float32, shape (count, d)."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weight, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.d, generator=generator, dtype=torch.float64)
        return (self.mean[k] + self.std * noise).float()

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log-density, nats, float64, shape (B,)."""
        norm = 0.5 * self.d * math.log(2 * math.pi * self.std**2)
        squares = torch.cdist(x.double(), self.mean, compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.logsumexp(self.weight.log() - squares / (2 * self.std**2), 1) - norm

    def denoised(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return (E[eps | x_t], E[x | x_t]) for rows x_t (N, d), alpha and sigma (N, 1)."""
        total = alpha**2 * self.std**2 + sigma**2
        logits = (x_t @ self._mean.T - alpha * self._half_norm) * (alpha / total) + self._log_weight
        centre = logits.softmax(1) @ self._mean
        residual = (x_t - alpha * centre) / total
        return sigma * residual, centre + alpha * self.std**2 * residual


def five(d: int, std: float = 0.3, seed: int = 0) -> Mixture:
    """The mixture of docs/mathematics.md: five standard normal means, softmax weights."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(5, d, generator=generator)
    return Mixture(torch.randn(5, generator=generator).softmax(0), mean, std)


def spirals(arms: int = 2, along: int = 40, std: float = 0.04) -> Mixture:
    """Two spirals of 80 narrow Gaussians: far more parts than a reference of 5 to 40 Gaussians has."""
    angle = torch.linspace(0.5, 3.0, along) * math.pi
    radius = angle / (3 * math.pi) * 1.5
    mean = [torch.stack([radius * (angle + turn).cos(), radius * (angle + turn).sin()], 1) for turn in (0.0, math.pi)]
    return Mixture(torch.full((arms * along,), 1 / (arms * along)), torch.cat(mean[:arms]), std)


@dataclass
class Passes:
    """Rows that went through a network forward, and backward."""

    forward: int = 0
    backward: int = 0


class Exact(nn.Module):
    """The exact network of a mixture on a schedule, called as fastscore and most peers call one."""

    def __init__(self, target: Mixture, schedule: fs.schedules.Schedule, predicts: str):
        super().__init__()
        self.target, self.schedule, self.predicts, self.passes = target, schedule, predicts, Passes()

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v.float()[:, None] for v in self.schedule.alpha_sigma(t.detach().double()))
        eps, x0 = self.denoised(x_t, alpha, sigma)
        if self.predicts == "eps":
            return eps
        if self.predicts == "score":
            return -eps / sigma
        d_alpha, d_sigma = (v.float()[:, None] for v in self.schedule.derivatives(t.detach().double()))
        return d_alpha * x0 + d_sigma * eps

    def denoised(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the target's answer and count the rows; a backward pass counts those that it visits."""
        self.passes.forward += len(x_t)
        eps, x0 = self.target.denoised(x_t, alpha, sigma)
        if eps.requires_grad:
            eps.register_hook(self._count)
        return eps, x0

    def _count(self, grad: Tensor) -> None:
        self.passes.backward += len(grad)


@dataclass
class Problem:
    """Points with their true log-densities, data to fit to, and where a network for a method comes from.

    Attributes:
        name: of the target.
        x: points, float32, shape (B, d).
        truth: their log-densities, nats, float64, shape (B,).
        data: to fit to, shape (N, d).
        thresholds: root-mean-square errors to reach, nats, descending.
        target: the mixture; None for a learned network, which is `density`'s then.
        density: of the learned network.
        fit_evaluations: what `ScoreDensity.fit` may spend.
        cap: seconds that a method's next effort may be expected to take.
    """

    name: str
    x: Tensor
    truth: Tensor
    data: Tensor
    thresholds: tuple[float, ...]
    target: Mixture | None = None
    density: fs.ScoreDensity | None = None
    fit_evaluations: int = 400_000
    cap: float = 1.2

    @property
    def d(self) -> int:
        return self.x.shape[1]

    @cached_property
    def fitted(self) -> tuple[fs.ScoreDensity, float]:
        """A density of the network, fitted to the data, and the seconds that it took."""
        density, start = self.new_density(), time.process_time()
        density.fit(self.data, evaluations=self.fit_evaluations, progress=False)
        return density, time.process_time() - start

    def new_density(self) -> fs.ScoreDensity:
        """Return an unfitted density of the network."""
        if self.density is not None:
            return fs.ScoreDensity(self.density.model, self.density.schedule, self.density.predicts)
        schedule = fs.LogSNR()
        return fs.ScoreDensity(Exact(self.target, schedule, "eps"), schedule, "eps")


def exact_problem(
    name: str, target: Mixture, points: int, thresholds: tuple[float, ...], data: int = 4000, **options
) -> Problem:
    """Return a problem whose truth is exact, with `data` samples to fit to."""
    x = target.sample(points, seed=17)
    return Problem(name, x, target.log_prob(x), target.sample(data, seed=5), thresholds, target=target, **options)


def digits_problem(points: int, truth_nfe: int) -> Problem:
    """The demo's digits and a network trained on them; the truth is the formula itself with many evaluations."""
    problem = digits(0)
    torch.manual_seed(0)
    density = fs.ScoreDensity(problem.network(), problem.schedule, problem.predicts)
    train(density, problem.batches(0), problem.steps)
    density.fit(problem.train(0), progress=False)
    x = problem.test[:points]
    truth = density.estimate(x, nfe=truth_nfe, seed=99)
    print(f"digits: the truth has a standard error of {float(truth.stderr.mean()):.3f} nats")
    threshold = 0.01 * problem.dims * math.log(2)  # 0.01 bits a dimension
    return Problem(
        "digits, learned, d = 64", x, truth.log_prob.double(), problem.train(0), (threshold,), density=density
    )
