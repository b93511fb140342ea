"""Forward processes that only some ecosystems have, and tables as libraries store them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..process.alpha_sigma import AlphaSigma
from ..process.ddpm import DDPM
from ..process.schedules import LOG_SNR_CEIL, LOG_SNR_FLOOR, VP, Cut, FlowMatching, Schedule
from ..support.host import as_tensor


class SubVP(VP):
    """Sub-variance-preserving SDE: alpha as of `VP`, sigma = 1 - alpha^2.

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456
    """

    def scale(self, log_snr: Tensor) -> Tensor:
        root = torch.exp(0.5 * log_snr)  # alpha / sigma = alpha / (1 - alpha^2), solved for alpha
        sigma = 2 / (1 + torch.sqrt(1 + 4 * root**2))
        return root * sigma, sigma

    def log_snr(self, t: Tensor) -> Tensor:
        loss = torch.nn.functional.softplus(-super().log_snr(t))  # -log alpha^2
        return -loss - 2 * torch.log(-torch.expm1(-loss))

    def time(self, log_snr: Tensor) -> Tensor:
        _, sigma = self.scale(as_tensor(log_snr).to(torch.float64))
        loss = -torch.log1p(-sigma)
        # The variance-preserving process has its log-SNR -log(exp(loss) - 1) at the same time.
        return super().time(-torch.log(torch.expm1(loss)))


class OffsetFlow(FlowMatching):
    """Straight path with a least noise: x_t = (1 - t) x + (t + offset) eps, t in [0, 1), data at t = 0."""

    def __init__(self, offset: float) -> None:
        super().__init__(data_at=0)
        if not 0 < offset < 1:
            raise ValueError(f"OffsetFlow needs 0 < offset < 1, got {offset}; without one use FlowMatching(0)")
        self.offset = float(offset)
        self.time_range = (0.0, self.time_range[1])

    def scale(self, log_snr: Tensor) -> Tensor:
        alpha, sigma = super().scale(log_snr)
        return (1 + self.offset) * alpha, (1 + self.offset) * sigma

    def log_snr(self, t: Tensor) -> Tensor:
        t = as_tensor(t).to(torch.float64)
        return 2 * torch.log((1 - t) / (t + self.offset))

    def time(self, log_snr: Tensor) -> Tensor:
        ratio = torch.exp(-0.5 * as_tensor(log_snr).to(torch.float64))  # (t + offset) / (1 - t)
        return ((ratio - self.offset) / (1 + ratio)).clamp(min=0.0)


class TargetFlow(AlphaSigma, FlowMatching):
    r"""Straight paths with a least noise: :math:`x_t = t x + (1 - (1 - \sigma) t)\, \epsilon`, data at t = 1.

    References:
        Flow Matching for Generative Modeling (Lipman et al., 2023), equation 20, https://arxiv.org/abs/2210.02747
    """

    def __init__(self, sigma: float) -> None:
        super().__init__(data_at=1)
        self.sigma = float(sigma)
        self.time_range = (1.0, self.time_range[1])

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = as_tensor(t).to(torch.float64)
        return t, 1 - (1 - self.sigma) * t

    def time(self, log_snr: Tensor) -> Tensor:
        ratio = torch.exp(-0.5 * as_tensor(log_snr).to(torch.float64))  # sigma_t / t
        return 1 / (ratio + 1 - self.sigma)


class Trigonometric(AlphaSigma):
    r"""Paths on a circle, and noise: :math:`x_t = \sin(\pi t / 2)\, x + \cos(\pi t / 2)\, \epsilon + \sigma z`.

    Data lie at t = 1. The two noises are one of variance :math:`\cos^2(\pi t / 2) + \sigma^2`, and the velocity
    :math:`\tfrac\pi2 E[\cos(\pi t / 2) x - \sin(\pi t / 2) \epsilon \mid x_t]` is the flow prediction of it, as for
    `ConditionalFlow`. The range ends at the noise that is left with the data, and has no clean end without any.

    References:
        Building Normalizing Flows with Stochastic Interpolants (Albergo and Vanden-Eijnden, 2023),
        https://arxiv.org/abs/2209.15571
    """

    def __init__(self, sigma: float = 0.0) -> None:
        self.sigma = float(sigma)
        ends = torch.tensor([LOG_SNR_CEIL, LOG_SNR_FLOOR], dtype=torch.float64, device="cpu")
        clean, noisy = self.time(ends).tolist()
        self.time_range = (1.0 if sigma > 0 else Cut(clean), Cut(noisy))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = 0.5 * math.pi * as_tensor(t).to(torch.float64)
        return torch.sin(angle), torch.sqrt(torch.cos(angle) ** 2 + self.sigma**2)

    def time(self, log_snr: Tensor) -> Tensor:
        snr = torch.exp(as_tensor(log_snr).to(torch.float64))  # sin^2 / (cos^2 + sigma^2), solved for the tangent
        sine, cosine = (snr * (1 + self.sigma**2)).sqrt(), (1 - snr * self.sigma**2).clamp(min=0).sqrt()
        return 2 / math.pi * torch.atan2(sine, cosine)


class Preconditioned(Schedule):
    r"""EDM's noise x + sigma eps as its inner network sees it, scaled by :math:`1 / \sqrt{\sigma^2 + \sigma_d^2}`.

    With the angle t of which :math:`\tan t = \sigma / \sigma_d` that is
    :math:`x_t = \cos(t)\, x / \sigma_d + \sin(t)\, \epsilon`, and what the inner network learns,
    :math:`\pm(\cos(t)\, \epsilon - \sin(t)\, x / \sigma_d)`, is the velocity along t or its negative. Read so, no large
    number is rounded to the network's dtype, where sigma is small and denoised data differ little from noised ones.

    References:
        Elucidating the Design Space of Diffusion Models (Karras et al., 2022), table 1, https://arxiv.org/abs/2206.00364
    """

    def __init__(self, sigma_min: float, sigma_max: float, sigma_data: float) -> None:
        self.data_std = self.sigma_data = float(sigma_data)
        self.time_range = (math.atan(sigma_min / sigma_data), math.atan(sigma_max / sigma_data))

    def scale(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.exp(-0.5 * log_snr)
        alpha = 1 / torch.sqrt(sigma**2 + self.sigma_data**2)
        return alpha, alpha * sigma

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(self.sigma_data * torch.tan(as_tensor(t).to(torch.float64)))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-0.5 * as_tensor(log_snr).to(torch.float64)) / self.sigma_data)


def table(alphas_cumprod: Tensor) -> DDPM:
    """Return the schedule of a library's table; an entry of zero at its end (zero terminal SNR) is left out.

    At a log-SNR of minus infinity nothing is left of the data, and the integrand is that of the reference. Those
    schedulers of diffusers that divide by it write 2**-24 in its place.
    """
    known = as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
    if len(known) and float(known[-1]) in (0.0, 2.0**-24):
        known = known[:-1]
    return DDPM(known)


def noise_table(sigmas: Tensor) -> DDPM:
    """Return the schedule of noise levels sigma of x + sigma eps, rising, as a variance-preserving table."""
    square = as_tensor(sigmas).detach().to("cpu", torch.float64) ** 2
    return table(1 / (1 + square))
