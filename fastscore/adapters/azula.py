"""Denoisers of azula: q(x | x_t) with its mean, at a time in [0, 1] of a schedule that gives alpha and sigma.

References:
    https://github.com/probabilists/azula
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..density import ScoreDensity
from ..process.alpha_sigma import AlphaSigma
from ..process.schedules import LOG_SNR_CEIL, LOG_SNR_FLOOR, Cut
from ..support.host import as_tensor
from .checks import adapter, expect, expect_attributes, expect_module
from .wrappers import bare

HALVINGS = 60  # of the interval of times, after which it is as short as float64 tells
GRID = 513  # times at which a schedule is looked at


class AzulaClock(AlphaSigma):
    """The process of a schedule that is called with times in [0, 1] and returns alpha and sigma, whatever its formula.

    Its inverse is found by bisection. An end without noise, or without data, is cut at log-SNR 16, or -14, for data of
    standard deviation one.

    Raises:
        ValueError: unless the log-SNR falls with time.
    """

    def __init__(self, schedule: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        self.schedule = schedule
        every = self.log_snr(torch.linspace(0, 1, GRID, dtype=torch.float64, device="cpu"))
        falling = bool((every.diff() < 0).all())
        what, remedy = f"log-SNR of {type(schedule).__name__}", "see azula.noise for schedules"
        expect(falling, what, "one that rises, stays or is NaN", "falling from t = 0 to t = 1", remedy)
        clean, noisy = self.time(every[[0, -1]].clamp(LOG_SNR_FLOOR, LOG_SNR_CEIL)).tolist()
        endless = torch.isinf(every)
        self.time_range = (Cut(clean) if endless[0] else 0.0, Cut(noisy) if endless[-1] else 1.0)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.schedule(as_tensor(t).to(torch.float64))
        return alpha, sigma

    def time(self, log_snr: Tensor) -> Tensor:
        log_snr = as_tensor(log_snr).to(torch.float64)
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            noisier = self.log_snr(middle) < log_snr
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return (low + high) / 2

    def __repr__(self) -> str:
        return f"AzulaClock({type(self.schedule).__name__})"


class MeanOf(nn.Module):
    """Call a denoiser, and return the mean of what it returns."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.denoiser(x_t, t, **cond).mean


@adapter
def from_azula(denoiser: nn.Module, **options: Any) -> ScoreDensity:
    """Return the density of an azula denoiser; its conditions are keyword arguments (`label`, ...).

    Arguments:
        denoiser: a `SimpleDenoiser`, a `KarrasDenoiser`, or another one that takes one time a sample, with its
            `schedule`. Weights in half precision are refused: x_t would be rounded to them before the denoiser scales
            it, and at the least noise nothing of eps would be left.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the denoiser's own data.

    Raises:
        TypeError: if it is no denoiser with a schedule.
        ValueError: for a denoiser of `azula.guidance`, one that rounds its times to a table, and weights in half
            precision; if the schedule's log-SNR does not fall.
    """
    wanted, remedy = "an azula Denoiser with its schedule", "wrap the network in KarrasDenoiser or SimpleDenoiser"
    expect_module(denoiser, "denoiser", wanted, remedy)
    own = bare(denoiser)
    expect_attributes(own, ("schedule",), "denoiser", wanted, remedy)
    kind = type(own)
    guided = any(base.__module__.startswith("azula.guidance") for base in kind.__mro__)
    expect(not guided, "denoiser", kind.__name__, "one without guidance, which has no density", "give what it guides")
    expect(
        not isinstance(getattr(own, "sigmas", None), Tensor),
        "denoiser",
        f"{kind.__name__}, which rounds its times to a table",
        "one that takes any time",
        "give its backbone to from_guided_diffusion or from_diffusers, with the table of training",
    )
    dtype = next((p.dtype for p in own.parameters() if p.is_floating_point()), torch.float32)
    expect(
        dtype.itemsize >= 4, "denoiser", f"weights of {dtype}", "weights of float32 or float64", "call .float() first"
    )
    return ScoreDensity(MeanOf(denoiser), AzulaClock(own.schedule), predicts="denoiser", **options)
