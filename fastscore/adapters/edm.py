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

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # of EDM's sampler, where a network does not state its own


@adapter
def from_edm(
    net: nn.Module, sigma_min: float | None = None, sigma_max: float | None = None, **options: Any
) -> ScoreDensity:
    """Return the density of an EDM or EDM2 network, called as `net(x, sigma, class_labels=...)`.

    Class labels, one-hot as the network wants them, are the keyword argument `class_labels` of `log_prob` and
    `estimate`. The density is that of the network's own data: images scaled to [-1, 1], or EDM2's latents.

    Arguments:
        net: returns denoised data; its `sigma_data`, and finite `sigma_min` > 0 and `sigma_max`, are read.
        sigma_min, sigma_max: the range of noise to integrate over; the network's own, else 0.002 and 80. Not used for
            iDDPMPrecond, whose whole table counts.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the network's own images.

    Raises:
        TypeError: if net is not a torch module.
        ValueError: unless 0 < sigma_min < sigma_max.
    """
    expect_module(net, "net", "a preconditioned network such as EDMPrecond", "give the pickle's 'ema' entry")
    rounded = getattr(net, "u", None)
    if isinstance(rounded, Tensor):
        sigmas = rounded[rounded > 0].sort().values
        return ScoreDensity(TableDenoiser(net, sigmas), noise_table(sigmas), predicts="x0", **options)
    low = _own(net, "sigma_min", SIGMA_MIN) if sigma_min is None else float(sigma_min)
    high = _own(net, "sigma_max", SIGMA_MAX) if sigma_max is None else float(sigma_max)
    expect(0 < low < high, "the noise range", f"{low} to {high}", "0 < sigma_min < sigma_max", "pass both")
    schedule = EDM(low, high, sigma_data=float(getattr(net, "sigma_data", 0.5)))
    return ScoreDensity(net, schedule, predicts="denoiser", **options)


def _own(net: nn.Module, name: str, default: float) -> float:
    value = float(getattr(net, name, default))
    return value if math.isfinite(value) and value > 0 else default
