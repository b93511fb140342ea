"""GaussianDiffusion of denoising-diffusion-pytorch, by lucidrains.

It normalizes images from [0, 1] to 2 x - 1 itself; the density returned here is that of the images in [0, 1].

References:
    https://github.com/lucidrains/denoising-diffusion-pytorch
"""

from __future__ import annotations

import torch
from torch import nn

from ..density import ScoreDensity
from ..transformed import Transformed
from ..transforms import zscore
from .checks import expect, expect_attributes, expect_key
from .clocks import noise_table

PREDICTIONS = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}


def from_lucidrains(diffusion: nn.Module, **options) -> Transformed:
    """Return the density of a `GaussianDiffusion` (also 1D, learned-variance or classifier-free-guidance ones).

    Conditions such as `classes` are keyword arguments of `log_prob` and `estimate`. A self-conditioned network is
    called without a previous estimate, as in half of its training steps.

    Arguments:
        diffusion: holds the network as `model`, its `objective`, its table and whether it normalizes.
        options: of `ScoreDensity`.

    Returns:
        `Transformed`: the density of images as the library's user has them, before its normalization.

    Raises:
        TypeError: if it is something else; the continuous-time and elucidated ones have no table.
        ValueError: for an unknown objective, or a normalization that is neither none nor 2 x - 1.
    """
    expect_attributes(
        diffusion,
        ("model", "objective", "sqrt_recipm1_alphas_cumprod", "normalize"),
        "diffusion",
        "a GaussianDiffusion of denoising-diffusion-pytorch",
        "for ElucidatedDiffusion build a ScoreDensity with EDM()",
    )
    predicts = expect_key(PREDICTIONS, diffusion.objective, "objective", "see GaussianDiffusion")
    ends = diffusion.normalize(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    remedy = "wrap a ScoreDensity in fastscore.Transformed with your own transform"
    expect(ends in ([0, 1], [-1, 1]), "normalize", f"[0, 1] to {ends}", "the identity or x * 2 - 1", remedy)
    # sigma / alpha was computed in float64 before it was stored, 1 - alphas_cumprod was not.
    schedule = noise_table(diffusion.sqrt_recipm1_alphas_cumprod)
    density = ScoreDensity(diffusion.model, schedule, predicts=predicts, **options)
    return Transformed(density, zscore(0.5, 0.5) if ends == [-1, 1] else zscore(0.0, 1.0))
