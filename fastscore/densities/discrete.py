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
from typing import Any

import torch
from torch import Tensor

from ..density import ScoreDensity
from ..estimator.calibration import uncalibrated
from ..estimator.estimate import Estimate
from ..estimator.methods import prior_kl
from ..estimator.nodes import FittedNodes
from ..estimator.protocol import Density, check_density
from ..estimator.resolution import clean_end_counted
from ..estimator.samples import check_index
from ..ops import noise
from ..process.masks import inside, mask_rows
from ..support.host import finite, whole

PROBES = 4  # samples of levels that tell whether they are equidistant for the network


@dataclass(frozen=True)
class Levels:
    """`bins` equidistant values from `first` to `last`, the way the network saw them; k = 0 .. bins - 1.

    Raises:
        ValueError: for fewer than 2 bins, or last <= first.
    """

    bins: int = 256
    first: float = -1.0
    last: float = 1.0

    def __post_init__(self) -> None:
        whole("bins", self.bins)
        finite("first of Levels", self.first), finite("last of Levels", self.last)
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

        Give another seed in every step of a training, and one more for test data: by default the first sample of every
        call has the same u, which a network may learn, and then takes what it knows of u for knowledge of the data.

        Arguments:
            k: levels, integer, shape (B, *shape).
            sample_index: int64, shape (B,); 0 .. B-1 by default.
            dtype: float32 or float64; in a smaller one a level would hold a few numbers instead of an interval.

        Raises:
            ValueError: if k is not integer, or leaves 0 .. bins - 1; for another dtype, or indices that are none.
        """
        self._check(k)
        if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dequantized data must be float32 or float64, got {dtype}; cast x_t in the network instead"
            )
        if sample_index is None:
            index = torch.arange(len(k), device=k.device)
        else:  # of one on a GPU, to look at the values would wait for it
            on_host = not isinstance(sample_index, Tensor) or sample_index.device.type == "cpu"
            index = check_index(sample_index, len(k)) if on_host else sample_index
        w = noise.words(seed, index.to(k.device), 0, noise.STREAM_DEQUANTIZE, k[0].numel())
        u = noise.uniform(w, torch.float64).reshape(k.shape)
        return (self.low + (k + u) * self.width).to(dtype)

    def _check(self, k: Tensor) -> None:
        if not isinstance(k, Tensor):
            raise ValueError(
                f"levels must be a tensor of integers 0 .. {self.bins - 1}, got {type(k).__name__}; give "
                "torch.as_tensor(levels)"
            )
        if k.is_floating_point() or k.dtype == torch.bool:
            raise ValueError(f"levels must be integers 0 .. {self.bins - 1}, got {k.dtype}; round and cast them first")
        if k.numel() and (int(k.min()) < 0 or int(k.max()) >= self.bins):
            raise ValueError(f"levels must be 0 .. {self.bins - 1}, got {int(k.min())} .. {int(k.max())}")


def discrete_log_prob(
    density: Density, k: Tensor, levels: Levels, *, mask: Tensor | None = None, **options: Any
) -> Estimate:
    r"""Return a lower bound of log P(k) in nats for levels k, with its standard error.

    `bits_per_dim()` of the result, without bins, is the number that papers report. The bound counts what lies outside
    the schedule's range by itself (decoder and prior), so `truncation` is zero.

    Arguments:
        density: of a network trained on `levels.values(k)`, or on an affine map of each element of them
            (`Transformed`); a mixture reference is replaced by its Gaussian.
        k: levels, integer, shape (B, *shape).
        mask: which entries count, as in `ScoreDensity.estimate`; the others are given, at their levels.
        options: as in `ScoreDensity.estimate`, but for `method`.

    Raises:
        TypeError: if the density is none.
        ValueError: if k does not fit the levels, if the network's levels are not equidistant, and as
            `ScoreDensity.estimate` does.
    """
    if "method" in options:
        raise ValueError(
            f"discrete_log_prob is a method of its own, got method={options['method']!r}; leave it out, or take "
            "density.estimate(levels.dequantize(k), method=...)"
        )
    if not isinstance(levels, Levels):
        raise ValueError(f"levels must be fastscore.Levels such as Levels(256), got {type(levels).__name__}")
    if check_density(density).subspace:
        raise ValueError(
            f"discrete_log_prob needs levels of each entry, which {density.subspace} do not have; dequantize them and "
            "take estimate"
        )
    z, width = _as_the_network_saw(density, k, levels)
    core = density.core
    plain = _with_one_gaussian(core)
    with clean_end_counted():
        found = plain.estimate(z, mask=mask, **options)
    gaussian = plain.reference  # on the device of the data by now
    flat, counted = z.reshape(len(z), -1), None if mask is None else mask_rows(mask, z)
    lo, hi = core.log_snr_range
    expected = gaussian.expected_integral(flat, lo, hi, counted)
    diffusion = (found.log_prob - gaussian.log_prob(flat, counted)) - 0.5 * expected
    log_prob = reconstruction(k, levels, hi, width, counted) - prior_kl(flat, lo, counted) + diffusion
    return replace(
        found, log_prob=log_prob.to(found.log_prob.dtype), ends=torch.zeros_like(found.ends), method="discrete_log_prob"
    )


def _with_one_gaussian(density: ScoreDensity) -> ScoreDensity:
    """Return a density with the one Gaussian like its reference, and the nodes for it; itself if it has one."""
    if density.reference.components == 1:
        return density
    other = density.with_reference(density.reference.gaussian())
    other.nodes = FittedNodes(density.nodes.gaussian, uncalibrated(), other.reference.scales())
    return other


def _as_the_network_saw(density: Density, k: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Return the network's values of the levels, float32 (B, *shape), and the distance of two in each element, (d,).

    Raises:
        ValueError: if the network's levels are not equidistant, element by element, or lie outside of its data.
    """
    z, _ = density.to_network(levels.values(k, torch.float64))
    probes = torch.randint(
        levels.bins, (PROBES, *k.shape[1:]), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    probes[0], probes[1] = 0, levels.bins - 1
    try:
        seen = density.to_network(levels.values(probes, torch.float64).to(k.device))[0].reshape(PROBES, -1)
    except ValueError as problem:
        raise ValueError(f"the network has no value for some of the levels {levels}: {problem}") from problem
    step = (seen[1] - seen[0]) / (levels.bins - 1)
    affine = seen[0] + step * probes.reshape(PROBES, -1).to(seen)
    # Rounding of float64, about 1e-16 of the values, against a bend of a level's width over all of them.
    if not bool(((seen - affine).abs() <= 1e-6 * step.abs() + 1e-12 * seen.abs()).all()):
        raise ValueError(
            "discrete_log_prob needs levels that are equidistant for the network, got "
            f"{' '.join(density.extra_repr().split())}, which is no affine map of each element; dequantize them "
            "(Levels.dequantize) and take estimate(x).bits_per_dim()"
        )
    return z.to(torch.float32), step.abs()


def reconstruction(
    k: Tensor, levels: Levels, log_snr: float, width: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    r"""Return E log P(k | x_lambda) of the discretized Gaussian decoder, nats, float64, shape (B,).

    The decoder gives level k the mass of N(x_lambda / alpha, sigma^2 / alpha^2) within half a level of v_k, the outer
    levels all that lies beyond. With h = Delta e^{lambda/2} / 2 the expectation over eps does not depend on k:

    .. math:: E \log[\Phi(h - \epsilon) - \Phi(-h - \epsilon)] \text{ inside}, \quad
        E \log \Phi(h - \epsilon) \text{ outside}

    Arguments:
        width: Delta of each element as the network sees it, shape (d,), that of `levels` by default.
        mask: which elements count, bool, shape (B, d); all by default.
    """
    flat = k.reshape(len(k), -1)
    edge = (flat == 0) | (flat == levels.bins - 1)
    if width is None:
        width = torch.full(flat.shape[1:], levels.width, dtype=torch.float64, device=k.device)
    # Rounded to 40 bits: elements of one scale differ in the last digits.
    mantissa, exponent = torch.frexp(width.to(torch.float64))
    kinds, kind = torch.ldexp((mantissa * 2**40).round() / 2**40, exponent).unique(return_inverse=True)
    inner, outer = (
        torch.stack(each).to(k.device)[kind]
        for each in zip(*(_log_mass(one / 2 * math.exp(log_snr / 2)) for one in kinds.tolist()))
    )
    return inside(torch.where(edge, outer, inner), mask).sum(1)


def _log_mass(half: float) -> tuple[Tensor, Tensor]:
    """Return the two expectations of `reconstruction` at one h, float64."""
    # 12 standard deviations on both sides hold all but 1e-32 of the mass; the integrands are smooth.
    eps = torch.linspace(-12, 12, 9601, dtype=torch.float64, device="cpu")
    weight = torch.exp(-0.5 * eps**2)
    weight /= weight.sum()
    upper, lower = torch.special.log_ndtr(half - eps), torch.special.log_ndtr(-half - eps)
    inner = weight @ (upper + torch.log1p(-torch.exp(torch.clamp(lower - upper, max=-1e-15))))
    return inner, weight @ upper
