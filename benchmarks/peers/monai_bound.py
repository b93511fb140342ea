"""MONAI: DiffusionInferer.get_likelihood, the discrete bound of a table of 1,000 steps with one noise for all of them.

It returns nats a dimension of 8-bit-like levels; with levels as narrow as 0.004 their log-probability is that of the
density times the width. Its decoder takes what lies beyond +- 0.999 for the outermost levels of images in [-1, 1], so
the data are scaled into that range. "fixed_large" is the variance for which its decoder has a width at all; the same
variance stands for the posterior's, so that the sum is no bound: on these targets it lies above the density.
"""

import torch
from race_targets import Exact, Mixture
from torch import nn

import fastscore as fs

from . import Method, counted

RANGE, LEVELS = 8.0, 4_000
TIMESTEPS = 1000


class Inside(nn.Module):
    """An exact eps network for inputs (B, 1, d), called as the inferer calls its U-Nets."""

    def __init__(self, exact):
        super().__init__()
        self.exact = exact

    def forward(self, x, timesteps, context=None):
        return self.exact(x[:, 0], timesteps)[:, None]


def methods(problem):
    if problem.target is None:
        return []
    from monai.inferers import DiffusionInferer
    from monai.networks.schedulers import DDPMScheduler

    scheduler = DDPMScheduler(TIMESTEPS, variance_type="fixed_large", clip_sample=False)
    inferer = DiffusionInferer(scheduler)
    target = problem.target
    scaled = Mixture(target.weight, target.mean / RANGE, target.std / RANGE)
    network = Exact(scaled, fs.DDPM(scheduler.alphas_cumprod.double()), "eps")
    inside = Inside(network)
    ranges = {"original_input_range": (0, LEVELS), "scaled_input_range": (-1, 1)}
    log_width = torch.tensor(2 * RANGE / LEVELS).log()

    def run(x, repeats, seed):
        torch.manual_seed(seed)
        many = x.repeat(repeats, 1)[:, None] / RANGE
        with torch.no_grad():
            return counted(network, x, lambda: log_prob(many).reshape(repeats, -1).mean(0))

    def log_prob(x):
        bound = inferer.get_likelihood(x, inside, scheduler, verbose=False, **ranges)
        return -x.shape[-1] * (bound + log_width)

    return [Method("MONAI DiffusionInferer, 1,000 steps", run, (1, 4, 16))]
