"""GaussianDiffusion of denoising-diffusion-pytorch, by lucidrains.

It normalizes images from [0, 1] to 2 x - 1 itself; the density returned here is that of the images in [0, 1].

References:
    https://github.com/lucidrains/denoising-diffusion-pytorch
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..densities.transformed import Transformed
from ..density import ScoreDensity
from ..transforms import zscore
from .checks import adapter, expect, expect_attributes, expect_key
from .clocks import noise_table
from .wrappers import bare

PREDICTIONS = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}


class KeptLabels(nn.Module):
    """Call a classifier-free-guidance network without dropping labels, which its `forward` does in eval mode too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_t: Tensor, t: Tensor, cond_drop_prob: float = 0.0, **cond: Any) -> Tensor:
        return self.model(x_t, t, cond_drop_prob=cond_drop_prob, **cond)


@adapter
def from_lucidrains(diffusion: nn.Module, **options: Any) -> Transformed:
    """Return the density of a `GaussianDiffusion` (also 1D, learned-variance or classifier-free-guidance ones).

    Conditions such as `classes` are keyword arguments of `log_prob` and `estimate`. Labels are never dropped and no
    guidance is applied: log p(x | classes), or log p(x) with `cond_drop_prob=1.0`. A self-conditioned network is
    called without a previous estimate, as in half of its training steps.

    Arguments:
        diffusion: holds the network as `model`, its `objective`, its table and whether it normalizes.
        options: of `ScoreDensity`.

    Returns:
        `Transformed`: the density of images as the library's user has them, before its normalization.

    Raises:
        TypeError: if it is something else; the continuous-time and elucidated ones have no table.
        ValueError: for an unknown objective, a normalization that is neither none nor 2 x - 1, or noise that is not
            independent of the image (`immiscible`) or of its other pixels (`offset_noise_strength`).
    """
    diffusion = bare(diffusion) if isinstance(diffusion, nn.Module) else diffusion
    expect_attributes(
        diffusion,
        ("model", "objective", "sqrt_recipm1_alphas_cumprod"),
        "diffusion",
        "a GaussianDiffusion of denoising-diffusion-pytorch",
        "for ElucidatedDiffusion build a ScoreDensity with EDM()",
    )
    normalize = _normalization(diffusion)
    predicts = expect_key(PREDICTIONS, diffusion.objective, "objective", "see GaussianDiffusion")
    ends = normalize(torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")).tolist()
    remedy = "wrap a ScoreDensity in fastscore.Transformed with your own transform"
    expect(ends in ([0, 1], [-1, 1]), "normalize", f"[0, 1] to {ends}", "the identity or x * 2 - 1", remedy)
    _expect_independent_noise(diffusion)
    # sigma / alpha was computed in float64 before it was stored, 1 - alphas_cumprod was not.
    schedule = noise_table(diffusion.sqrt_recipm1_alphas_cumprod)
    drops = hasattr(bare(diffusion.model), "cond_drop_prob")
    model = KeptLabels(diffusion.model) if drops else diffusion.model
    density = ScoreDensity(model, schedule, predicts=predicts, **options)
    return Transformed(density, zscore(0.5, 0.5) if ends == [-1, 1] else zscore(0.0, 1.0))


def _normalization(diffusion: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return how images come to the network: the object's own way, or its module's where the class has no choice."""
    name = "normalize_to_neg_one_to_one"  # classifier_free_guidance calls it in every forward
    module = sys.modules.get(type(diffusion).__module__)
    own = getattr(diffusion, "normalize", None) or getattr(module, name, None)
    if own is None:
        expect_attributes(
            diffusion,
            ("normalize",),
            "diffusion",
            "a GaussianDiffusion of denoising-diffusion-pytorch",
            "for ElucidatedDiffusion build a ScoreDensity with EDM()",
        )
    return own


def _expect_independent_noise(diffusion: nn.Module) -> None:
    """Raise a ValueError where the network was trained with noise that the density formula does not know."""
    remedy = "such a network has no density by this formula; train without it"
    immiscible = bool(getattr(diffusion, "immiscible", False))
    expect(not immiscible, "immiscible", immiscible, "False (noise that was matched to images is not theirs)", remedy)
    strength = float(getattr(diffusion, "offset_noise_strength", 0.0))
    expect(strength == 0, "offset_noise_strength", strength, "0 (offset noise is not white)", remedy)
