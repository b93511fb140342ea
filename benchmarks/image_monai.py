"""MONAI's own likelihood of an image network: `DiffusionInferer.get_likelihood`, a sum over 1,000 timesteps.

One noise an image serves all timesteps, and the last step is a discretized Gaussian over 256 levels. It returns nats a
dimension of levels; their probability is the density's times the width of a level. "fixed_large" is the variance for
which that Gaussian has a width at all. As a sum over a table, it is another number than the integral.
"""

from __future__ import annotations

import math

import torch
from image_networks import SCHEDULE
from image_ode import Likelihood
from torch import Tensor, nn

import fastscore as fs

TIMESTEPS, LEVELS = 1000, 256


class Inside(nn.Module):
    """The network's v at timesteps of a table, called as the inferer calls its own U-Nets."""

    def __init__(self, network: nn.Module, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.network, self.table = network, fs.DDPM(alphas_cumprod.double())

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None) -> Tensor:
        return self.network(x, self.table.log_snr(timesteps).clamp(SCHEDULE.lo, SCHEDULE.hi).to(x))


def monai(network: nn.Module) -> Likelihood:
    """Return the likelihood of dequantized images in [-1, 1), (x, seed) -> log p in nats and evaluations per sample."""
    from monai.inferers import DiffusionInferer
    from monai.networks.schedulers import DDPMScheduler

    options = {"variance_type": "fixed_large", "clip_sample": False, "prediction_type": "v_prediction"}
    scheduler = DDPMScheduler(TIMESTEPS, **options)
    inferer, inside = DiffusionInferer(scheduler), Inside(network, scheduler.alphas_cumprod)
    ranges = {"original_input_range": (0, LEVELS), "scaled_input_range": (-1, 1)}

    def run(x: Tensor, seed: int) -> tuple[Tensor, float]:
        torch.manual_seed(seed)
        with torch.no_grad():
            bound = inferer.get_likelihood(x, inside, scheduler, verbose=False, **ranges)
        return -x[0].numel() * (bound.double() + math.log(2 / LEVELS)), TIMESTEPS

    return run
