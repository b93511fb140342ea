r"""Whether a flow was trained with coupled noise: then the density formula does not hold for it.

The formula needs x_t = alpha x + sigma eps with eps independent of x. A network trained on pairs (x, eps) that were
matched (optimal transport, minibatch or exact; reflow) returns the velocity of another process. It gives itself away
where there is almost no signal: independent noise tells nothing about the data, so the data that the network predicts,
x_hat(x_t), must not depend on it, while a coupling carries every noise to its own data. Of rows
x_t = alpha x + sigma eps_r, with alpha^2 / sigma^2 = 0.02 / tr Var x, the share

.. math:: \mathrm{Var}_r\, \hat x(\alpha x + \sigma \epsilon_r) \,/\, \mathrm{Var}\, x

is at most 0.02 for the exact network of Gaussian data and independent noise, and 1 for a transport map. A network that
has hardly been trained can have any share. It is told apart by three more signs: a coupled network carries data to
noise of unit variance, each sample its own way, and its predictions vary in the directions in which data do. A weak
coupling is not seen: minibatches of 256 make a correlation of 0.98 at d = 2, 0.6 at 16, 0.3 at 64, 0.1 at 784.

References:
    Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport (Tong et al., 2024),
    https://arxiv.org/abs/2302.00482
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor, nn

from ..process.network import predict
from ..process.predictions import coefficients
from ..process.schedules import FlowMatching
from ..reference.gaussians import Reference
from ..support.warn import warn
from .network import Network
from .samples import Samples

SIGNAL = 0.02  # signal-to-noise ratio, in units of the data's total variance, at which predictions are compared
SHARES = 0.4, 2.0  # of the data's variance that predictions of a coupled flow have
ALIGNED = 0.65  # least alignment of their directions with the data's, which is 1 where both are the same
CARRIED = 0.02  # least variance, in units of the data's, of the way from data to noise: below it nothing was learned
LENGTHS = 0.3  # by which the mean square of the noise that the data come from may differ from 1
VALUES, LEAST_ROWS = 256, 8  # numbers that a variance is taken of, rows of a sample at least
FEW, MANY = 4, 16  # samples
ENOUGH = 24  # numbers in a batch, below which no spread is a sign of anything
STEPS = 16  # of the flow

_CHECKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def warn_if_coupled(network: Network, samples: Samples, reference: Reference) -> None:
    """Warn, once a network, where a flow's predictions at the noisy end follow the noise as those of a coupled one.

    Networks that predict something else have no flow's coupling, and are not called. The others are called for at most
    4 samples with 8 rows each (more below d = 32), and 33 times for at most 16 samples where that looks coupled.
    """
    flow = network.predicts == "flow" or (isinstance(network.schedule, FlowMatching) and network.predicts == "x0")
    if not flow or network.model in _CHECKED or samples.x.numel() < ENOUGH:
        return
    _CHECKED.add(network.model)
    share = coupled_share(network, samples, reference)
    if share:
        warn(
            f"this flow looks trained with coupled noise (optimal transport, reflow): where almost no signal is left, "
            f"its predictions of the data still follow the noise, by {share:.0%} of the data's variance instead of "
            "none; the density formula needs independent noise and is wrong here by many nats; use "
            "fastscore.probability_flow_log_prob"
        )


@torch.no_grad()
def coupled_share(network: Network, samples: Samples, reference: Reference) -> float:
    """Return the share of the data's variance that the predictions have of the noise, 0 where nothing looks coupled."""
    total, variance = _scales(samples.x, reference)
    moved = _moved_by_noise(network, samples, total)
    share = float(moved.square().sum(-1).sum(1).median() / (moved.shape[1] - 1) / variance)
    if not SHARES[0] < share < SHARES[1] or _alignment(moved.flatten(0, 1), samples.x) < ALIGNED:
        return 0.0
    few = samples.select(slice(0, min(len(samples), MANY if samples.x.shape[1] <= VALUES else FEW)))
    noise = _noise_of(network, few)
    way = noise - few.x
    carried = len(few) == 1 or float(way.var(0).sum() / few.x.double().var(0).sum().clamp(min=1e-30)) > CARRIED
    normal = abs(float(noise.square().mean()) - 1) < LENGTHS + 3 * math.sqrt(2 / noise.numel())
    return share if carried and normal else 0.0


def _moved_by_noise(network: Network, samples: Samples, total: float) -> Tensor:
    """Return how far the predicted data of some samples lie from their mean over rows of noise, (samples, rows, d)."""
    d, (lo, hi) = samples.x.shape[1], network.schedule.log_snr_range
    time = network.schedule.time(
        torch.tensor([min(max(math.log(SIGNAL / total), lo), hi)], dtype=torch.float64, device="cpu")
    )
    rows, moved = max(LEAST_ROWS, math.ceil(VALUES / d)), []
    generator = torch.Generator(samples.x.device).manual_seed(0)
    for i in range(min(FEW, len(samples))):
        one = samples.select(slice(i, i + 1))
        eps = torch.randn(1, rows, d, generator=generator, device=one.x.device, dtype=one.x.dtype)
        alpha, sigma = (v.to(one.x) for v in network.schedule.alpha_sigma(time))
        x_hat, _ = _split(network, one, alpha * one.x[:, None] + sigma * eps, time)
        moved.append(x_hat - x_hat.mean(1, keepdim=True))
    return torch.cat(moved).double()


def _split(network: Network, samples: Samples, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Return the data and the noise that the network sees in x_t (B, R, d) at one time, by prediction = a eps + b x."""
    times = time.expand(x_t.shape[1]).to(x_t.device)
    prediction = predict(network.model, x_t, times, samples.conds[0], samples.shape, network.time_dtype)
    alpha, sigma = network.schedule.alpha_sigma(time)
    a, b, _ = coefficients(network.predicts, network.schedule, time)
    x_hat = (sigma.to(x_t) * prediction - a.to(x_t) * x_t) / (sigma * b - a * alpha).to(x_t)
    return x_hat, (x_t - alpha.to(x_t) * x_hat) / sigma.to(x_t)


def _noise_of(network: Network, samples: Samples) -> Tensor:
    """Return the noise (B, d) to which the flow carries the data, by the midpoint rule with shorter first steps."""
    clean, noisy = network.schedule.time_range
    grid = clean + (noisy - clean) * torch.linspace(0, 1, STEPS + 1, dtype=torch.float64, device="cpu") ** 2

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        x_hat, eps = _split(network, samples, x_t, t)
        d_alpha, d_sigma = (v.to(x_t) for v in network.schedule.derivatives(t))
        return d_alpha * x_hat + d_sigma * eps

    x_t = samples.x[:, None]
    for start, end in zip(grid[:-1, None], grid[1:, None]):
        step = (end - start).to(x_t)
        middle = x_t + 0.5 * step * velocity(x_t, start)
        x_t = x_t + step * velocity(middle, 0.5 * (start + end))
    return x_t[:, 0].double() / float(network.schedule.alpha_sigma(grid[-1])[1])


def _alignment(moved: Tensor, x: Tensor) -> float:
    """Return the mean squared cosine between predictions' and data's deviations, over that between data's own.

    One where there are too few samples to tell the data's directions.
    """
    if len(x) < 2 * FEW:
        return 1.0
    x, y = (v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=1e-30) for v in (x - x.mean(0), moved))
    x = x[:VALUES].double()
    own = ((x @ x.mT).square().sum() - len(x)) / (len(x) * (len(x) - 1))
    return float((y @ x.mT).square().mean() / own)


def _scales(x: Tensor, reference: Reference) -> tuple[float, float]:
    """Return the data's total variance, once from above, and once near, from the batch and the reference."""
    q = reference.gaussian()
    spread = float(q.variance.expand(-1, x.shape[1]).sum())
    above = max(float((q.turn(x) - q.mean[0].to(x)).double().square().sum(1).mean()), spread)
    if len(x) < FEW:
        return above, above
    return above, max(float(x.double().var(0).sum()), 0.1 * spread)
