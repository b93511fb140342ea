"""A denoiser D(x, sigma) that was trained at the sigmas of a table and is called nowhere between."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..support.buffers import Constants


class TableDenoiser(Constants):
    """Call D at entry i with the variance-preserving x_t of a table, scaled to x + sigma eps.

    Arguments:
        denoiser: called as `denoiser(x, sigma, **cond)`, returns denoised data.
        sigmas: rising, shape (T,).
    """

    def __init__(self, denoiser: nn.Module, sigmas: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.register_buffer("sigmas", sigmas.detach().clone(), persistent=False)

    def forward(self, x_t: Tensor, i: Tensor, **cond: Any) -> Tensor:
        sigma = self.sigmas.to(x_t.dtype)[i]
        scale = (1 + sigma**2).sqrt().reshape(-1, *[1] * (x_t.ndim - 1))
        return self.denoiser(x_t * scale, sigma, **cond)
