"""One density, three ways: fastscore, the same formula by plain Monte Carlo, and the probability-flow ODE."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..densities.probability_flow import probability_flow_log_prob
from ..density import ScoreDensity
from ..process.conditions import Conditions
from ..process.network import predict
from ..process.predictions import eps_from
from .problems import Problem

if TYPE_CHECKING:
    from ..support.generic import Result

PROBES = 8
GRID_ERROR = 0.1  # nats: below what the probes leave
SAMPLES_AT_ONCE = 16


class Row(NamedTuple):
    """A line of the table; `error` is the spread of one sample's log p over repetitions, nats."""

    method: str
    log_prob: float
    log_prob_error: float
    bits_per_dim: float | None
    bits_per_dim_error: float | None
    error: float
    passes: int
    seconds: float


def compare_methods(density: ScoreDensity, problem: Problem, nfe: int, seed: int) -> list[Row]:
    """Evaluate the held-out data in the three ways."""
    x, d = problem.test, problem.dims
    fitted, seconds = _timed(lambda: density.estimate(x, seed=seed).log_prob)
    again = density.estimate(x, seed=seed + 1).log_prob
    rows = [_row(problem, "fastscore, fitted", fitted, _spread(fitted, again), nfe, seconds)]

    plain, seconds = _timed(lambda: plain_monte_carlo(density, x, nfe, seed))
    again = plain_monte_carlo(density, x, nfe, seed + 1)
    rows.append(_row(problem, "the formula, plain Monte Carlo", plain, _spread(plain, again), nfe, seconds))

    # The exact trace costs d backward passes a call: cheap in two dimensions, not in 64.
    trace, probes, backward = ("exact", 1, d) if d <= PROBES else ("hutchinson", PROBES, PROBES)
    flow, seconds = _timed(
        lambda: probability_flow_log_prob(density, x, trace=trace, probes=probes, seed=seed, error=GRID_ERROR)
    )
    error = float(flow.stderr.square().mean().sqrt())
    calls = int(flow.nfe.double().mean())  # a trace for two, but one for each of the two ends
    passes = calls + (calls // 2 + 1) * backward
    rows.append(_row(problem, f"ODE, {trace} trace", flow.log_prob.detach(), error, passes, seconds))
    return rows


@torch.no_grad()
def plain_monte_carlo(density: ScoreDensity, x: Tensor, nfe: int, seed: int) -> Tensor:
    r"""Return -(d/2) log(2 pi e) - 1/2 int (E||eps - eps_hat||^2 - d sigmoid(lambda)) dlambda, nats, shape (B,).

    Uniform stratified log-SNR and independent noise; nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    lo, hi = density.log_snr_range
    d, cell = x.shape[1], (hi - lo) / nfe
    log_snr = lo + cell * (torch.arange(nfe) + torch.rand(nfe, generator=generator, dtype=torch.float64))
    t = density.schedule.time(log_snr)
    alpha, sigma, c_f, c_x = (
        v.to(x)[:, None] for v in (*density.schedule.alpha_sigma(t), *eps_from(density.predicts, density.schedule, t))
    )
    integral = []
    for part in x.split(SAMPLES_AT_ONCE):
        eps = torch.randn(len(part), nfe, d, generator=generator)
        x_t = alpha * part[:, None] + sigma * eps
        eps_hat = c_f * predict(density.model, x_t, t, Conditions({}, {}), (d,), density.time_dtype) + c_x * x_t
        integrand = (eps - eps_hat).square().sum(2) - d * torch.sigmoid(log_snr).to(x)
        integral.append(cell * integrand.sum(1))
    return -0.5 * d * math.log(2 * math.pi * math.e) - 0.5 * torch.cat(integral)


def _timed(run: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def _spread(first: Tensor, second: Tensor) -> float:
    """The standard deviation of one estimate from two of each sample."""
    return float((first - second).square().mean().sqrt()) / math.sqrt(2)


def _row(problem: Problem, method: str, log_prob: Tensor, error: float, passes: int, seconds: float) -> Row:
    mean, mean_error = float(log_prob.mean()), float(log_prob.std()) / math.sqrt(len(log_prob))
    bits = bits_error = None
    if problem.levels is not None:
        bits = -(mean / problem.dims + math.log(problem.levels.width)) / math.log(2)
        bits_error = mean_error / (problem.dims * math.log(2))
    return Row(method, mean, mean_error, bits, bits_error, error, passes, seconds)
