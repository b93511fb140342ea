r"""Error bars under low-discrepancy noise: as narrow as they may be for each sample, by what its own draws look like.

Sobol points leave a smaller error than differences of the draws show, by a ratio that a pilot measures. It holds for
samples like the pilot's. One that is odd (between modes, in a tail) has differences larger than theirs, and gains less.
With v a sample's variance by differences, a = log v less its mean over typical samples, and q_60, q_95 quantiles of a,

.. math:: w = \mathrm{clamp}\Big(\frac{a - q_{60}}{q_{95} - q_{60}}, 0, 1\Big), \qquad
    \mathrm{Var} = v\, t_\nu^2\, \exp\big((1 - w)\,\rho + w\,\tau\big)

(t_nu: Student's widening). The pilot chooses rho so that 1.96 standard errors cover 95.5 % of its typical estimates,
and tau so that they cover 95.5 % of those of every kind of odd point that it makes: midpoints of two samples, samples
pushed outwards, and samples with noise added.

References:
    Monte Carlo Variance of Scrambled Net Quadrature (Owen, 1997), https://doi.org/10.1137/S0036142994277468
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor

from .statistics import Spread, widened

NORMAL_95 = 1.96
TYPICAL_COVER, ODD_COVER = 0.955, 0.955
ODD_KINDS = 3  # of points that a pilot makes, in turns
RAMP = (0.60, 0.95)  # quantiles at which it begins and ends
ODD_SHRINK = 0.5
RATIOS = (-8.0, 0.5)  # range of rho and tau
ROWS = 6


class Replicates(NamedTuple):
    """Estimates at one number of evaluations: their errors, variances by differences, and degrees of freedom."""

    nfe: int
    error: Tensor
    variance: Tensor
    nu: Tensor

    def select(self, samples: slice) -> Replicates:
        return Replicates(self.nfe, *(v[:, samples] for v in self[1:]))


def uncalibrated() -> Tensor:
    """Return the calibration of noise that nobody has measured: none."""
    return torch.empty(ROWS, 0, dtype=torch.float64, device="cpu")


def calibrate(found: list[Replicates], typical: int) -> Tensor:
    """Return (log2 nfe, typical log v, rho, tau, q_60, q_95) at every number of evaluations, float64, (6, K).

    Arguments:
        found: ascending in evaluations, tensors of shape (replicates, samples).
        typical: how many samples, the first ones, are like the data; the others are odd, three kinds in turns.
    """
    level = torch.stack([_log(r.variance[:, :typical]).mean() for r in found])
    excess = [_log(r.variance) - at for r, at in zip(found, level)]
    pooled = torch.cat([a[:, :typical].flatten() for a in excess])
    ends = torch.quantile(pooled, torch.tensor(RAMP, dtype=torch.float64, device="cpu"))
    ends[1] = torch.maximum(ends[1], ends[0] + 1e-3)
    ratios = torch.tensor(
        [_ratios(r, _oddness(a, ends[0], ends[1]), typical) for r, a in zip(found, excess)],
        dtype=torch.float64,
        device="cpu",
    )
    at = torch.tensor([math.log2(r.nfe) for r in found], dtype=torch.float64, device="cpu")
    rho = _polynomial(at, ratios[:, 0], 2)
    # A third of the pilot is odd, in three kinds: too few to know tau well. Half of the way to the ratio of independent
    # noise, which is honest for every point, costs width for odd points alone.
    tau = torch.maximum(ODD_SHRINK * _polynomial(at, ratios[:, 1], 1), rho)
    return torch.stack([at, level, rho, tau, *(end.expand_as(at) for end in ends)])


def calibrated(spread: Spread, nfe: int, calibration: Tensor) -> Tensor:
    """Return variances such that 1.96 standard errors cover 95 %, and those that means add up: shape (2, B).

    Arguments:
        spread: of each sample's draws.
        nfe: evaluations per sample. Ratios stay as they are beyond the measured ones.
        calibration: as `calibrate` returns it; without columns the noise is independent.
    """
    measured = constants(nfe, calibration)
    if measured is None:
        return torch.stack([spread.widened(), spread.variance])
    level, ordinary, odd, lo, hi = measured
    w = _oddness(_log(spread.variance) - level, lo, hi)
    both = torch.stack([widened(spread.variance, spread.nu), spread.variance])
    return both * ((1 - w) * ordinary + w * odd).exp()


def constants(nfe: int, calibration: Tensor) -> tuple[float, float, float, float, float] | None:
    """Return typical log v, rho, tau, q_60 and q_95 at a number of evaluations; None where nothing is measured."""
    if not calibration.shape[1]:
        return None
    at, *columns = calibration.tolist()
    u = min(max(math.log2(nfe), at[0]), at[-1])
    k = min(bisect_right(at, u) - 1, len(at) - 2)
    part = (u - at[k]) / (at[k + 1] - at[k])
    level, ordinary, odd, lo, hi = (column[k] + part * (column[k + 1] - column[k]) for column in columns)
    level -= math.log(2) * (math.log2(nfe) - u)  # beyond the ends v falls like 1 / nfe
    return level, ordinary, odd, lo, hi


def _ratios(found: Replicates, w: Tensor, typical: int) -> tuple[float, float]:
    """Return (rho, tau) at one number of evaluations, by turns."""
    z = found.error.abs() / (NORMAL_95 * widened(found.variance, found.nu).sqrt()).clamp(min=1e-12)
    (own, odd), (own_w, odd_w) = ((v[:, :typical], v[:, typical:]) for v in (z, w))
    rho = tau = 0.0
    for _ in range(3):
        each = ((odd[:, kind::ODD_KINDS], odd_w[:, kind::ODD_KINDS]) for kind in range(ODD_KINDS))
        tau = max(rho, *(_least_ratio(z_k, w_k, (1 - w_k) * rho, ODD_COVER) for z_k, w_k in each))
        rho = _least_ratio(own, 1 - own_w, own_w * tau, TYPICAL_COVER)
    return rho, max(tau, rho)


def _least_ratio(z: Tensor, share: Tensor, rest: Tensor, target: float) -> float:
    """Return the least r such that a share `target` has z below exp((share r + rest) / 2)."""
    lo, hi = RATIOS
    for _ in range(30):
        middle = (lo + hi) / 2
        covered = float((z < (0.5 * (share * middle + rest)).exp()).double().mean())
        lo, hi = (middle, hi) if covered < target else (lo, middle)
    return hi


def _oddness(excess: Tensor, lo: float | Tensor, hi: float | Tensor) -> Tensor:
    return ((excess - lo) / (hi - lo)).clamp(0, 1)


def _log(variance: Tensor) -> Tensor:
    return variance.clamp(min=1e-300).log()


def _polynomial(at: Tensor, values: Tensor, degree: int) -> Tensor:
    """Replace values by their polynomial in log2 nfe, which has half of the nine measurements' noise or less."""
    powers = torch.stack([at**power for power in range(degree + 1)], 1)
    return powers @ torch.linalg.lstsq(powers, values[:, None]).solution[:, 0]
