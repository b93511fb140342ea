"""Preconditioned networks of EDM and EDM2: D(x, sigma, class_labels) returns denoised data.

VPPrecond, VEPrecond and EDMPrecond share the interface: the noise x + sigma eps and the time sigma are EDM's for all
of them. iDDPMPrecond rounds sigma to a table `u`, and is evaluated at its entries alone.

References:
    Elucidating the Design Space of Diffusion Models (Karras et al., 2022), https://arxiv.org/abs/2206.00364
    Analyzing and Improving the Training Dynamics (Karras et al., 2024), https://arxiv.org/abs/2312.02696
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..density import ScoreDensity
from ..process.schedules import EDM
from .checks import adapter, expect, expect_module
from .clocks import noise_table
from .table_denoiser import TableDenoiser
from .wrappers import bare

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # of EDM's sampler, for networks that state sigma_data and take any noise


@adapter
def from_edm(
    net: nn.Module, sigma_min: float | None = None, sigma_max: float | None = None, **options: Any
) -> ScoreDensity:
    """Return the density of an EDM or EDM2 network, called as `net(x, sigma, class_labels=...)`.

    Class labels, one-hot as the network wants them, are the keyword argument `class_labels` of `log_prob` and
    `estimate`. The density is that of the network's own data: images scaled to [-1, 1], or EDM2's latents.

    Arguments:
        net: returns denoised data; its `sigma_data`, and finite `sigma_min` > 0 and `sigma_max`, are read, inside of
            wrappers such as `DataParallel` too.
        sigma_min, sigma_max: the range of noise to integrate over; the network's own, else 0.002 and 80 of EDM's
            sampler for one that states `sigma_data`, as EDMPrecond does, which takes any noise. Not used for
            iDDPMPrecond, whose whole table counts.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the network's own images.

    Raises:
        TypeError: if net is not a torch module.
        ValueError: unless 0 < sigma_min < sigma_max; where neither the network nor the caller says an end.
    """
    expect_module(net, "net", "a preconditioned network such as EDMPrecond", "give the pickle's 'ema' entry")
    own = bare(net)
    rounded = getattr(own, "u", None)
    if isinstance(rounded, Tensor):
        sigmas = rounded[rounded > 0].sort().values
        return ScoreDensity(TableDenoiser(net, sigmas), noise_table(sigmas), predicts="x0", **options)
    low = _end(own, "sigma_min", SIGMA_MIN) if sigma_min is None else float(sigma_min)
    high = _end(own, "sigma_max", SIGMA_MAX) if sigma_max is None else float(sigma_max)
    expect(0 < low < high, "the noise range", f"{low} to {high}", "0 < sigma_min < sigma_max", "pass both")
    schedule = EDM(low, high, sigma_data=float(getattr(own, "sigma_data", 0.5)))
    return ScoreDensity(net, schedule, predicts="denoiser", **options)


def _end(net: nn.Module, name: str, default: float) -> float:
    """Return an end of the range of noise that a network states; the default for one that takes any noise."""
    value = float(getattr(net, name, math.nan))
    if math.isfinite(value) and value > 0:
        return value
    expect(
        hasattr(net, "sigma_data"),
        name,
        f"none, since {type(net).__name__} states neither a finite one nor sigma_data",
        "that of training",
        f"pass {name}=, or give the preconditioned network itself if this one wraps it",
    )
    return default
