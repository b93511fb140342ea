r"""What stands outside the sum: log p = base(x) - 1/2 sum_s w_s f_s, one base a method.

- ``density``: log q(x). The integral's tails are q's.
- ``discrete``: Li and Yan's sum over a table of timesteps. With t_1 its least noisy time, the base is
  -(1 + log(2 pi t_1)) d/2 - 1/2 sum_i w_i E||eps - eps_q||^2; the last term puts back what the control variate took.
- ``elbo``: the variational bound of DDPM with posterior variances: a Gaussian decoder of variance t_1 at the first
  step, minus KL(N(alpha_T x, sigma_T^2) || N(0, 1)), and the same last term.

References:
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..process.masks import inside
from ..process.schedules import Schedule
from ..reference.gaussians import Reference
from .rules import method_table, method_weights


def control_variate(method: str, reference: Reference) -> Reference:
    """Return the reference that a method subtracts: sums need closed-form residuals, hence a single Gaussian."""
    return reference if method == "density" else reference.gaussian()


def base(method: str, reference: Reference, x: Tensor, schedule: Schedule, mask: Tensor | None = None) -> Tensor:
    """Return the term outside the sum, nats, float64, shape (B,); `reference` as `control_variate` gives it."""
    if method == "density":
        return reference.log_prob(x, mask)
    d = x.shape[1] if mask is None else mask.sum(1, dtype=torch.float64)
    _, log_snr = method_table(schedule)
    weight = method_weights(log_snr, method).to(x.device)
    control = reference.expected_residual(x, log_snr.exp().to(x.device), weight, mask)
    log_first = math.log(1 / (1 + math.exp(float(log_snr[-1]))))
    if method == "discrete":
        return -(1 + math.log(2 * math.pi) + log_first) * d / 2 - 0.5 * control
    return -(math.log(2 * math.pi) + log_first) * d / 2 - prior_kl(x, float(log_snr[0]), mask) - 0.5 * control


def prior_kl(x: Tensor, log_snr: float, mask: Tensor | None = None) -> Tensor:
    """Return KL(N(alpha x, sigma^2) || N(0, 1)) at the noisiest step, nats, float64, shape (B,)."""
    alpha2, sigma2 = 1 / (1 + math.exp(-log_snr)), 1 / (1 + math.exp(log_snr))
    x2 = inside(x.to(torch.float64), mask).square().sum(1)
    d = x.shape[1] if mask is None else mask.sum(1, dtype=torch.float64)
    return 0.5 * (alpha2 * x2 + d * (sigma2 - 1 - math.log(sigma2)))
