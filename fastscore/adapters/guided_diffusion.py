"""Networks of guided-diffusion, improved-diffusion and DiT: a model beside a GaussianDiffusion or SpacedDiffusion.

The network gets the original timestep 0 .. T-1, also where a spaced process keeps only some of them; with
`rescale_timesteps` it gets 1000 / T times that.

References:
    https://github.com/openai/guided-diffusion
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..density import ScoreDensity
from ..support.buffers import Constants
from ..support.host import as_tensor
from .checks import adapter, expect_attributes, expect_key, expect_module
from .clocks import table

PREDICTIONS = {"EPSILON": "eps", "START_X": "x0"}


class OriginalTime(Constants):
    """Call the network with the original timestep of entry i, rescaled where it was trained so."""

    def __init__(self, model: nn.Module, timesteps: Tensor, factor: float | None) -> None:
        super().__init__()
        self.model, self.factor = model, factor
        self.register_buffer("timesteps", timesteps, persistent=False)

    def forward(self, x_t: Tensor, i: Tensor, **cond: Any) -> Tensor:
        t = self.timesteps[i]
        return self.model(x_t, t if self.factor is None else t.float() * self.factor, **cond)


@adapter
def from_guided_diffusion(model: nn.Module, diffusion: object, **options: Any) -> ScoreDensity:
    """Return the density of a guided-diffusion model; class labels are the keyword argument `y`.

    The density is that of images scaled to [-1, 1], as the data loader gives them. A learned variance (twice the
    channels) is cut off.

    Arguments:
        model: called as `model(x_t, t, **cond)`.
        diffusion: what `create_gaussian_diffusion` returns; with a `timestep_map` only its entries are evaluated.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the network's own images.

    Raises:
        TypeError: if model is not a module, or diffusion something else.
        ValueError: for the mean type PREVIOUS_X.
    """
    expect_module(model, "model", "a guided-diffusion model such as UNetModel", "give model, diffusion in this order")
    expect_attributes(
        diffusion,
        ("alphas_cumprod", "model_mean_type", "rescale_timesteps"),
        "diffusion",
        "a GaussianDiffusion or SpacedDiffusion of guided-diffusion",
        "give what create_gaussian_diffusion returns",
    )
    mean_type = getattr(diffusion.model_mean_type, "name", diffusion.model_mean_type)
    predicts = expect_key(PREDICTIONS, mean_type, "model_mean_type", "build a ScoreDensity with your own module")
    alphas_cumprod = as_tensor(diffusion.alphas_cumprod).to(torch.float64)
    kept = getattr(diffusion, "timestep_map", None)
    timesteps = torch.tensor(range(len(alphas_cumprod)) if kept is None else list(kept), device="cpu")
    original = getattr(diffusion, "original_num_steps", len(alphas_cumprod))
    net = OriginalTime(model, timesteps, 1000.0 / original if diffusion.rescale_timesteps else None)
    return ScoreDensity(net, table(alphas_cumprod), predicts=predicts, **options)
