r"""The density formula as a training objective.

.. math:: -\log p(x) \approx \tfrac d2 \log(2\pi e)
    + \tfrac12 \int \big( E\|\epsilon - \hat\epsilon(x_\lambda)\|^2 - d\,\mathrm{sigmoid}(\lambda) \big)\, d\lambda

One evaluation a sample estimates the integral without bias when log-SNR is drawn with density p and weighted by 1/p.
Uniform p in log-SNR weighs every prediction by its likelihood; fitted nodes lower the variance of the gradient.

References:
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
    Variational Diffusion Models (Kingma et al., 2021), https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import noise
from ..density import ScoreDensity
from ..network import Conditions, predict
from ..predictions import coefficients
from ..samples import check_samples


def density_loss(density: ScoreDensity, x: Tensor, *, seed: int, **cond) -> Tensor:
    """Return an unbiased estimate of -log p(x), averaged over the batch: a scalar in nats per sample.

    Log-SNRs are stratified over the batch. Outside the schedule's range the integrand is taken as N(0, I)'s.

    Arguments:
        density: network, schedule and nodes to train with.
        x: data, shape (B, *shape).
        seed: key of the noise; give every step another one, its number for instance.
        cond: keyword arguments of the network; tensors whose first dimension is B belong to their samples.

    Raises:
        ValueError: as `ScoreDensity.estimate` does for bad data.
    """
    samples = check_samples(x, None, (cond,), density.model)
    schedule, nodes = density.schedule, density.nodes.density
    batch, d = samples.x.shape
    w = noise.words(seed, samples.index, 0, noise.STREAM_LOSS, d + 1)
    # Permuted, so that the order of the data does not decide about their log-SNRs.
    u = (torch.arange(batch, dtype=torch.float64) + noise.uniform(w[:, 0].cpu(), torch.float64)) / batch
    log_snr = nodes.quantile(u[torch.randperm(batch, generator=torch.Generator().manual_seed(seed))])
    weight = 1 / nodes.density_at(log_snr)
    time = schedule.time(log_snr)
    alpha, sigma = (v.to(samples.x)[:, None] for v in schedule.alpha_sigma(time))
    a, b, c = (v.to(samples.x)[:, None] for v in coefficients(density.predicts, schedule, time))
    eps = noise.normal(w[:, 1:], dtype=samples.x.dtype)
    x_t = alpha * samples.x + sigma * eps
    # As one sample with B rows, since every row has its own time here; conditions go along with the rows.
    rows = Conditions({}, cond)
    prediction = predict(density.model, x_t[None], time.to(x.device), rows, samples.shape, density.time_dtype)[0]
    error = (c * (a * eps + b * samples.x - prediction)).square().sum(1)
    integral = weight.to(error) * (error - d * torch.sigmoid(log_snr).to(error))
    return 0.5 * d * math.log(2 * math.pi * math.e) + 0.5 * integral.mean()
