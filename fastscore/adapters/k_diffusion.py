"""Denoisers of k-diffusion: D(x, sigma) with noise x + sigma eps.

`Denoiser` and `VDenoiser` take any sigma. Those around a table of timesteps (`DiscreteEpsDDPMDenoiser` and its kin,
`CompVisDenoiser`, `DiscreteVDDPMDenoiser`) are evaluated at the table's own sigmas and nowhere between.

References:
    https://github.com/crowsonkb/k-diffusion
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..density import ScoreDensity
from ..process.schedules import EDM
from .checks import adapter, expect, expect_module
from .clocks import noise_table
from .table_denoiser import TableDenoiser
from .wrappers import bare


@adapter
def from_k_diffusion(
    denoiser: nn.Module, sigma_min: float = 0.01, sigma_max: float = 80.0, **options: Any
) -> ScoreDensity:
    """Return the density of a k-diffusion denoiser, called as `denoiser(x, sigma, **cond)`.

    Arguments:
        denoiser: returns denoised data; `sigma_data` is read, and `sigmas` where it holds a table.
        sigma_min, sigma_max: the trained range of a continuous denoiser, `sigma_sample_density`'s ends in its
            configuration; not used for a table.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the denoiser's own data.

    Raises:
        TypeError: if denoiser is not a torch module.
        ValueError: unless 0 < sigma_min < sigma_max, or if a table's sigmas do not rise.
    """
    expect_module(denoiser, "denoiser", "a k-diffusion denoiser", "wrap the network in Denoiser or VDenoiser")
    own = bare(denoiser)
    expect(
        hasattr(own, "sigma_data"),
        "denoiser",
        f"{type(own).__name__} without sigma_data",
        "a k-diffusion denoiser",
        "wrap the network in Denoiser or VDenoiser, or use from_edm",
    )
    sigmas = getattr(own, "sigmas", None)
    if sigmas is not None:
        return ScoreDensity(TableDenoiser(denoiser, sigmas), noise_table(sigmas), predicts="x0", **options)
    expect(
        0 < sigma_min < sigma_max,
        "the noise range",
        f"{sigma_min} to {sigma_max}",
        "0 < sigma_min < sigma_max",
        "give the configuration's",
    )
    schedule = EDM(sigma_min, sigma_max, sigma_data=float(own.sigma_data))
    return ScoreDensity(denoiser, schedule, predicts="denoiser", **options)
