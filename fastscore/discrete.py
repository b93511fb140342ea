r"""Discrete data: levels such as the 256 of 8-bit images, and the log-probability (not density) that they have.

Two bounds turn a density into a probability of levels k with spacing Delta in each of d dimensions:

- *uniform dequantization*: x = v_k + Delta (u - 1/2), u uniform in [0, 1). Then log P(k) >= E_u log p(x) + d log Delta.
  The network must have been trained on dequantized data: `Levels.dequantize`, then `Estimate.bits_per_dim(bins, ...)`.
- *the diffusion's own bound*, for networks trained on the bare levels:

  .. math:: \log P(k) \ge E \log P(k | x_{\lambda_{max}}) - KL_{prior}
      - \tfrac12 \int_{\lambda_{min}}^{\lambda_{max}} E\|\epsilon - \hat\epsilon\|^2 d\lambda

  with the discretized Gaussian decoder of DDPM, whose expectation is exact here: `discrete_log_prob`.

Bits per dimension are -log P / (d log 2), and three things go wrong with them in practice: adding a constant offset
that fits 8-bit data in one scaling only (use Delta of *your* scaling: 2/255 for k/127.5 - 1, 2/256 for dequantized
data in [-1, 1), 1/256 in [0, 1)); dividing nats by d without log 2; evaluating the bare levels with a continuous
density, which has no upper limit (negative bits per dimension are the symptom).

References:
    A Note on the Evaluation of Generative Models (Theis et al., 2016), https://arxiv.org/abs/1511.01844
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
    Variational Diffusion Models (Kingma et al., 2021), https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import noise
from .density import ScoreDensity
from .estimate import Estimate
from .masks import inside, mask_rows
from .methods import prior_kl


@dataclass(frozen=True)
class Levels:
    """`bins` equidistant values from `first` to `last`, the way the network saw them; k = 0 .. bins - 1.

    Raises:
        ValueError: for fewer than 2 bins, or last <= first.
    """

    bins: int = 256
    first: float = -1.0
    last: float = 1.0

    def __post_init__(self):
        if self.bins < 2 or not self.last > self.first:
            raise ValueError(f"Levels needs bins >= 2 and last > first, got {self}")

    @property
    def width(self) -> float:
        """Delta, the distance of two levels."""
        return (self.last - self.first) / (self.bins - 1)

    @property
    def low(self) -> float:
        """Lower end of dequantized data, half a level below `first`."""
        return self.first - self.width / 2

    @property
    def high(self) -> float:
        """Upper end of dequantized data."""
        return self.last + self.width / 2

    def values(self, k: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return v_k = first + k Delta, shape of k.

        Raises:
            ValueError: if k is not integer, or leaves 0 .. bins - 1.
        """
        self._check(k)
        return (self.first + k.to(torch.float64) * self.width).to(dtype)

    def dequantize(
        self, k: Tensor, seed: int = 0, sample_index: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Return v_k + Delta (u - 1/2), shape of k, with u keyed by (seed, sample index, element).

        Arguments:
            k: levels, integer, shape (B, *shape).
            sample_index: int64, shape (B,); 0 .. B-1 by default.
        """
        self._check(k)
        index = torch.arange(len(k)) if sample_index is None else sample_index
        w = noise.words(seed, index.to(k.device), 0, noise.STREAM_DEQUANTIZE, k[0].numel())
        u = noise.uniform(w, torch.float64).reshape(k.shape)
        return (self.low + (k + u) * self.width).to(dtype)

    def _check(self, k: Tensor) -> None:
        if k.is_floating_point() or k.dtype == torch.bool:
            raise ValueError(f"levels must be integers 0 .. {self.bins - 1}, got {k.dtype}; round and cast them first")
        if k.numel() and (int(k.min()) < 0 or int(k.max()) >= self.bins):
            raise ValueError(f"levels must be 0 .. {self.bins - 1}, got {int(k.min())} .. {int(k.max())}")


def discrete_log_prob(
    density: ScoreDensity, k: Tensor, levels: Levels, *, mask: Tensor | None = None, **options
) -> Estimate:
    r"""Return a lower bound of log P(k) in nats for levels k, with its standard error.

    `bits_per_dim()` of the result, without bins, is the number that papers report. The bound counts what lies outside
    the schedule's range by itself (decoder and prior), so `truncation` is zero.

    Arguments:
        density: of a network trained on `levels.values(k)`; a mixture reference is replaced by its Gaussian.
        k: levels, integer, shape (B, *shape).
        mask: which entries count, as in `ScoreDensity.estimate`; the others are given, at their levels.
        options: as in `ScoreDensity.estimate`, but for `method`.

    Raises:
        ValueError: if k does not fit the levels, and as `ScoreDensity.estimate` does.
    """
    x = levels.values(k)
    gaussian = density.reference.gaussian()
    plain = density if gaussian is density.reference else density.with_reference(gaussian)
    found = plain.estimate(x, mask=mask, **options)
    flat, counted = x.reshape(len(x), -1), None if mask is None else mask_rows(mask, x)
    lo, hi = density.log_snr_range
    expected = gaussian.expected_integral(flat, lo, hi, counted)
    diffusion = (found.log_prob - gaussian.log_prob(flat, counted)) - 0.5 * expected
    log_prob = reconstruction(k, levels, hi, counted) - prior_kl(flat, lo, counted) + diffusion
    return replace(
        found, log_prob=log_prob.to(found.log_prob.dtype), ends=torch.zeros_like(found.ends), method="discrete_log_prob"
    )


def reconstruction(k: Tensor, levels: Levels, log_snr: float, mask: Tensor | None = None) -> Tensor:
    r"""Return E log P(k | x_lambda) of the discretized Gaussian decoder, nats, float64, shape (B,).

    The decoder gives level k the mass of N(x_lambda / alpha, sigma^2 / alpha^2) within half a level of v_k, the outer
    levels all that lies beyond. With h = Delta e^{lambda/2} / 2 the expectation over eps does not depend on k:

    .. math:: E \log[\Phi(h - \epsilon) - \Phi(-h - \epsilon)] \text{ inside}, \quad
        E \log \Phi(h - \epsilon) \text{ outside}
    """
    half = levels.width / 2 * math.exp(log_snr / 2)
    # 12 standard deviations on both sides hold all but 1e-32 of the mass; the integrands are smooth.
    eps = torch.linspace(-12, 12, 9601, dtype=torch.float64)
    weight = torch.exp(-0.5 * eps**2)
    weight /= weight.sum()
    upper, lower = torch.special.log_ndtr(half - eps), torch.special.log_ndtr(-half - eps)
    inner = float(weight @ (upper + torch.log1p(-torch.exp(torch.clamp(lower - upper, max=-1e-15)))))
    outer = float(weight @ upper)
    flat = k.reshape(len(k), -1)
    edge = inside((flat == 0) | (flat == levels.bins - 1), mask).sum(1).to(torch.float64)
    count = flat.shape[1] if mask is None else mask.sum(1)
    return edge * outer + (count - edge) * inner
