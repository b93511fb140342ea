r"""Whether a flow was trained with coupled noise: then the density formula does not hold for it.

The formula needs x_t = alpha x + sigma eps with eps independent of x. A network trained on pairs (x, eps) that were
matched (optimal transport, minibatch or exact; reflow) returns the velocity of another process. It gives itself away at
both ends. Where there is almost no signal, independent noise tells nothing about the data, so the data that the network
predicts, x_hat(x_t), must not depend on it, while a coupling carries every noise to its own data. Of rows
x_t = alpha x + sigma eps_r, with alpha^2 / sigma^2 = 0.02 / tr Var x, the share

.. math:: \mathrm{Var}_r\, \hat x(\alpha x + \sigma \epsilon_r) \,/\, \mathrm{Var}\, x

is at most 0.02 for the exact network of Gaussian data and independent noise, and rho^2 for a correlation of rho between
noise and data. Where there is almost no noise, the noise that the network predicts follows the noise that there is, or
nothing, while a coupled one tells each data point's own: of two rows of one data point the share

.. math:: E\, \hat\epsilon(\alpha x + \sigma \epsilon_1) \cdot \hat\epsilon(\alpha x + \sigma \epsilon_2) \,/\, d

is s c / (1 + s c)^2 for data of variance c at the signal-to-noise ratio s, and again rho^2. A network that is hardly
trained looks the same: the velocity zero is the transport of a standard normal distribution to itself. A share of the
noise is an error of as much in every squared residual at the clean end, so that the density is wrong either way, by
half of it for each dimension and unit of log-SNR.

References:
    Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport (Tong et al., 2024),
    https://arxiv.org/abs/2302.00482
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..process.predictions import coefficients
from ..process.schedules import FlowMatching
from ..reference.gaussians import Reference
from ..support.warn import warn
from .asking import ask
from .network import Network
from .samples import Samples

SIGNAL = 0.02  # signal-to-noise ratio, in units of the data's total variance, at which predictions are compared
REACHED = 5 * SIGNAL  # above which a schedule's noisiest time is not noise
CLEAN = 0.9  # of the range of log-SNR, where the noise that is predicted is compared
SHARES = 0.2, 2.0  # of the data's variance, and of the noise's, that predictions of a coupled flow have
ALIGNED = 0.65  # least alignment of their directions with the data's, which is 1 where both are the same
VALUES, LEAST_ROWS = 256, 8  # numbers that a variance is taken of, rows of a sample at least
FEW, MANY = 4, 16  # samples
NEAREST = 0.01  # least variance of a batch, in units of that of the reference
ENOUGH = 24  # numbers in a batch, below which no spread is a sign of anything


def may_be_coupled(network: Network, samples: Samples) -> bool:
    """Return whether a network predicts what a coupling shows in, and there are numbers enough to see one."""
    flow = network.predicts == "flow" or (isinstance(network.schedule, FlowMatching) and network.predicts == "x0")
    return flow and samples.x.numel() >= ENOUGH


def warn_if_coupled(network: Network, samples: Samples, reference: Reference, rows_at_once: int) -> None:
    """Warn where a flow's predictions follow the noise at the noisy end, and the data at the clean one.

    The network is called for at most 4 samples with 8 rows each (more below d = 32), and once for two rows of at most
    16 samples where that looks coupled.
    """
    shares = coupled_shares(network, samples, reference, rows_at_once)
    if shares is not None:
        warn(
            "this flow looks trained with coupled noise (optimal transport, reflow), or not trained to the end: where "
            "almost no signal is left, its predictions of the data still follow the noise, by "
            f"{shares[0]:.0%} of the data's variance instead of none, and where almost no noise is left, its "
            f"predictions of the noise follow the data, by {shares[1]:.0%} of the noise's variance instead of none; "
            "the density formula needs independent noise and is wrong here by many nats; for a coupled flow use "
            "fastscore.probability_flow_log_prob"
        )


@torch.no_grad()
def coupled_shares(
    network: Network, samples: Samples, reference: Reference, rows_at_once: int = 1 << 30
) -> tuple[float, float] | None:
    """Return the shares of the data's and of the noise's variance, None where nothing looks coupled."""
    total, variance = _scales(samples.x, reference)
    lo, hi = network.schedule.log_snr_range
    noisiest = min(max(math.log(SIGNAL / total), lo), hi)
    if math.exp(noisiest) * variance > REACHED:
        return None
    moved = _moved_by_noise(network, samples, noisiest, rows_at_once)
    share = float(moved.square().sum(-1).sum(1).median() / (moved.shape[1] - 1) / variance)
    if not SHARES[0] < share < SHARES[1] or _alignment(moved.flatten(0, 1), samples.x) < ALIGNED:
        return None
    some = samples.select(slice(0, MANY if samples.x.shape[1] <= VALUES else FEW))
    noise = _of_the_data(network, some, rows_at_once)
    return (share, noise) if SHARES[0] < noise < SHARES[1] else None


def _moved_by_noise(network: Network, samples: Samples, log_snr: float, rows_at_once: int) -> Tensor:
    """Return how far the predicted data of some samples lie from their mean over rows of noise, (samples, rows, d)."""
    rows, moved = max(LEAST_ROWS, math.ceil(VALUES / samples.x.shape[1])), []
    for i in range(min(FEW, len(samples))):
        x_hat, _ = _split(network, samples.select(slice(i, i + 1)), log_snr, rows, i, rows_at_once)
        moved.append(x_hat - x_hat.mean(1, keepdim=True))
    return torch.cat(moved).double()


def _of_the_data(network: Network, samples: Samples, rows_at_once: int) -> float:
    """Return the share of the predicted noise that two rows of one data point have in common, near the clean end."""
    lo, hi = network.log_snr_range
    _, eps = _split(network, samples, lo + CLEAN * (hi - lo), 2, FEW, rows_at_once)
    return float(eps.double().prod(1).mean())


def _split(
    network: Network, samples: Samples, log_snr: float, rows: int, seed: int, rows_at_once: int
) -> tuple[Tensor, Tensor]:
    """Return the data and the noise, (B, R, d), that the network sees in rows x_t, by prediction = a eps + b x."""
    time = network.schedule.time(torch.tensor([log_snr], dtype=torch.float64, device="cpu"))
    size, generator = (len(samples), rows, samples.x.shape[1]), torch.Generator().manual_seed(seed)
    noise = torch.randn(size, generator=generator, device="cpu", dtype=samples.x.dtype).to(samples.device)
    alpha, sigma = network.schedule.alpha_sigma(time)
    x_t = alpha.to(noise) * samples.x[:, None] + sigma.to(noise) * noise
    times = time.expand(rows).to(samples.device)
    prediction = ask(network, samples, x_t, times, rows_at_once)
    a, b, _ = coefficients(network.predicts, network.schedule, time)
    whole = (sigma * b - a * alpha).to(x_t)
    x_hat = (sigma.to(x_t) * prediction - a.to(x_t) * x_t) / whole
    return x_hat, (b.to(x_t) * x_t - alpha.to(x_t) * prediction) / whole


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
    return above, max(float(x.double().var(0).sum()), NEAREST * spread)
