"""Networks of score_sde: VPSDE, subVPSDE and VESDE, continuous or trained on N noise levels.

| sde | the network gets | and returns |
|---|---|---|
| VPSDE, subVPSDE, continuous | 999 t | -score sigma_t, that is eps |
| VPSDE, discrete | i of the table of N betas | eps |
| VESDE, continuous | sigma_t | score (divided by sigma inside, `scale_by_sigma`) |
| VESDE, discrete | i, with 0 the noisiest of N levels | score |

References:
    Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..density import ScoreDensity
from ..process.schedules import VE, VP
from ..support.buffers import Constants
from ..support.host import as_tensor
from .checks import adapter, expect_attributes, expect_module
from .clocks import SubVP, noise_table

LABELS = 999  # of continuous times, whatever N is


class TimesLabels(nn.Module):
    """Call the network with 999 t."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.model(x_t, t * LABELS, **cond)


class SigmaLabels(nn.Module):
    """Call the network with sigma_t = sigma_min (sigma_max / sigma_min)^t."""

    def __init__(self, model: nn.Module, sigma_min: float, sigma_max: float) -> None:
        super().__init__()
        self.model, self.sigma_min, self.sigma_max = model, sigma_min, sigma_max

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.model(x_t, self.sigma_min * (self.sigma_max / self.sigma_min) ** t, **cond)


class NoisiestFirst(Constants):
    """Call the network at entry i, counted from the least noise, with N - 1 - i; turn its score into eps.

    x_t comes variance-preserving from the table, and goes as x + sigma eps.
    """

    def __init__(self, model: nn.Module, sigmas: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("sigmas", sigmas, persistent=False)

    def forward(self, x_t: Tensor, i: Tensor, **cond: Any) -> Tensor:
        sigma = self.sigmas[i].to(x_t.dtype).reshape(-1, *[1] * (x_t.ndim - 1))
        return -sigma * self.model(x_t * (1 + sigma**2).sqrt(), len(self.sigmas) - 1 - i, **cond)


@adapter
def from_score_sde(model: nn.Module, sde: object, continuous: bool = True, **options: Any) -> ScoreDensity:
    """Return the density of a score_sde network under its SDE.

    The density is that of the network's data: where the configuration says `centered`, images in [0, 1] come to it as
    2 x - 1, and `Transformed(density, zscore(0.5, 0.5))` gives that of the images.

    Arguments:
        model: called as `model(x, labels)`.
        sde: VPSDE or subVPSDE (`beta_0`, `beta_1`), or VESDE (`sigma_min`, `sigma_max`); told apart by name.
        continuous: whether it was trained on continuous times, `config.training.continuous`.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the network's own data.

    Raises:
        TypeError: if model is not a module, or sde none of the three.
    """
    expect_module(model, "model", "a torch module", "give the network, without DataParallel")
    name = type(sde).__name__.lower()
    wanted = "a VPSDE, subVPSDE or VESDE of score_sde"
    if "vesde" in name:
        expect_attributes(sde, ("sigma_min", "sigma_max", "discrete_sigmas"), "sde", wanted, "see sde_lib")
        if continuous:
            ends = float(sde.sigma_min), float(sde.sigma_max)
            return ScoreDensity(SigmaLabels(model, *ends), VE(*ends), predicts="score", **options)
        sigmas = as_tensor(sde.discrete_sigmas).detach().clone()
        return ScoreDensity(NoisiestFirst(model, sigmas), noise_table(sigmas), predicts="eps", **options)
    expect_attributes(sde, ("beta_0", "beta_1"), "sde", wanted, "or build a ScoreDensity with your own Schedule")
    sub = "subvp" in name
    if continuous or sub:  # subVPSDE has no discrete form
        schedule = (SubVP if sub else VP)(float(sde.beta_0), float(sde.beta_1))
        return ScoreDensity(TimesLabels(model), schedule, predicts="eps", **options)
    # The float32 tables that noised the training data; computed from the betas, sigma would differ by up to 5e-5.
    names = "sqrt_1m_alphas_cumprod", "sqrt_alphas_cumprod"
    expect_attributes(sde, names, "sde", wanted, "see sde_lib")
    sigma, alpha = (as_tensor(getattr(sde, name)).to(torch.float64) for name in names)
    return ScoreDensity(model, noise_table(sigma / alpha), predicts="eps", **options)
