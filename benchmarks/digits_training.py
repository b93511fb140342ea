r"""The demo's digits network trained with two losses, everything else the same: DDPM's plain loss and `density_loss`.

The plain loss is the mean of |eps - eps_hat|^2 over uniform times of a clock, without any weight,

.. math:: E_{t \sim U}\, \|\epsilon - \hat\epsilon(x_t)\|^2 / d

with the times of the cosine schedule or DDPM's table of 1,000. The network is told the log-SNR and covers the demo's
range; times beyond it count as its ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import fastscore as fs
from fastscore.demo.problems import Problem, digits
from fastscore.demo.training import LEARNING_RATE
from fastscore.process.predictions import coefficients

Loss = Callable[[fs.ScoreDensity, Tensor, int], Tensor]

CLOCKS = {"cosine": fs.Cosine(), "linear": fs.DDPM.linear(1000)}


def eps_loss(clock: str) -> Loss:
    """Return the plain loss with the times of a clock."""
    schedule = CLOCKS[clock]

    def loss(density: fs.ScoreDensity, x: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        u = torch.rand(len(x), generator=generator, dtype=torch.float64)
        clean, noisy = schedule.time_range
        t = (u * 1000).long() if schedule.discrete else clean + (noisy - clean) * u
        log_snr = schedule.log_snr(t).clamp(*density.schedule.log_snr_range)
        alpha, sigma = (v.to(x)[:, None] for v in density.schedule.alpha_sigma(log_snr))
        a, b, c = (v.to(x)[:, None] for v in coefficients(density.predicts, density.schedule, log_snr))
        eps = torch.randn(x.shape, generator=generator)
        prediction = density.model(alpha * x + sigma * eps, log_snr.to(x))
        return (c * (a * eps + b * x - prediction)).square().mean()

    return loss


def formula_loss(density: fs.ScoreDensity) -> Loss:
    """Return `density_loss` as it stands, one evaluation a sample."""
    return lambda _, x, step: fs.density_loss(density, x, seed=step)


def paired_loss(density: fs.ScoreDensity) -> Loss:
    """Return `density_loss` with antithetic pairs and adaptive nodes, on half of the batch: the same evaluations."""
    nodes = fs.AdaptiveNodes(density.schedule)
    return lambda _, x, step: fs.density_loss(density, x[::2], seed=step, antithetic=True, nodes=nodes)


LOSSES = {
    "eps-loss, cosine times": lambda density: eps_loss("cosine"),
    "eps-loss, DDPM's linear times": lambda density: eps_loss("linear"),
    "density_loss": formula_loss,
    "density_loss, antithetic, adaptive nodes": paired_loss,
}


def train(loss: str, predicts: str, seed: int, steps: int) -> tuple[fs.ScoreDensity, Problem]:
    """Train the digits network from the weights of a seed: the demo's optimizer, batches and learning rates."""
    problem = dataclasses.replace(digits(0), steps=steps)
    torch.manual_seed(seed)
    density = fs.ScoreDensity(problem.network(), problem.schedule, predicts)
    compute = LOSSES[loss](density)
    optimizer = torch.optim.AdamW(density.model.parameters(), LEARNING_RATE, weight_decay=0.0)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    density.model.train()
    for step, x in enumerate(problem.batches(seed)):
        optimizer.zero_grad()
        compute(density, x, seed * steps + step).backward()
        optimizer.step()
        cycle.step()
    density.model.eval()
    return density, problem


def held_out(density: fs.ScoreDensity, problem: Problem, nfe: int = 256) -> Tensor:
    """Return bits per dimension of every held-out digit."""
    density.fit(problem.train(0), evaluations=20_000, progress=False)
    levels = problem.levels
    return density.estimate(problem.test, nfe=nfe, seed=1).bits_per_dim(levels.bins, levels.low, levels.high)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    stacked = torch.tensor(values, dtype=torch.float64)
    return float(stacked.mean()), float(stacked.std()) / len(values) ** 0.5
