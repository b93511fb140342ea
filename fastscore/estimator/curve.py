r"""The integrand over log-SNR, averaged over samples, and what its course says of the two errors that no draw shows.

What lies outside of the range of log-SNR is taken from the reference (truncation), and a table's sum over its entries
is the integral by the trapezoid rule (discretization). Both are estimates from the course inside, not bounds: nothing
that was evaluated can bound what a network would say where nobody asked it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .trapezoids import bounds

END = 1.0  # of the range, in units of log-SNR, whose draws stand for its end
FEWEST = 4  # draws, in two stretches of two, that show a course
NEAR = 1e-6  # units of log-SNR, by which rounding may put a draw beyond the range
TABLE_BINS = 48
SUMS = ("log_snr", "total", "squares")  # of a `CurveSum`
MOST_POWERS = 9  # of ten, by which samples are told apart
SLOWEST, FASTEST_GROWTH = 0.02, -1.5  # rates a unit of log-SNR that a handful of draws can tell apart


class Curve(NamedTuple):
    r"""The integrand over log-SNR: log p = log q + its integral.

    Attributes:
        log_snr: of each draw, averaged over the samples, float64, shape (N,).
        mean: -(E||eps - eps_hat||^2 - E||eps - eps_q||^2) / 2 averaged over the batch, nats per unit log-SNR.
        stderr: its standard error over the batch; NaN for one sample.
    """

    log_snr: Tensor
    mean: Tensor
    stderr: Tensor


@dataclass
class CurveSum:
    """Accumulates the curve over chunks of samples where these are; only the sums go to the CPU, when they are read.

    Arguments:
        log_snr: of each draw, summed over the samples, float64, shape (N,), on the CPU.
        total, squares: of -f/2, float64, shape (N,).
        count: of samples.
    """

    log_snr: Tensor
    total: Tensor
    squares: Tensor
    count: int = 0

    @classmethod
    def empty(cls, draws: int, device: torch.device | str = "cpu") -> CurveSum:
        total, squares = torch.zeros(2, draws, dtype=torch.float64, device=device)
        return cls(torch.zeros(draws, dtype=torch.float64, device="cpu"), total, squares)

    @classmethod
    def joined(cls, parts: Sequence[CurveSum]) -> CurveSum:
        """Return the sums over the samples of several, whose draws are as many."""
        log_snr, total, squares = (torch.stack([getattr(part, name) for part in parts]).sum(0) for name in SUMS)
        return cls(log_snr, total, squares, sum(part.count for part in parts))

    def add(self, f: Tensor, log_snr: Tensor) -> None:
        """Take in f of some samples, whose draws have these log-SNRs in the mean."""
        half = -0.5 * f.to(torch.float64)
        self.add_sums(half.sum(0), half.square().sum(0), len(half), log_snr)

    def add_sums(self, total: Tensor, squares: Tensor, count: int, log_snr: Tensor) -> None:
        """Take in the sums over `count` samples, whose draws have these log-SNRs in the mean."""
        self.count_in(count, log_snr)
        self.total += total
        self.squares += squares

    def count_in(self, count: int, log_snr: Tensor) -> None:
        """Count samples whose sums are taken in already."""
        self.count += count
        self.log_snr += count * log_snr

    def curve(self) -> Curve:
        total, squares = torch.stack([self.total, self.squares]).cpu()
        mean = total / self.count
        variance = (squares / self.count - mean**2).clamp(min=0) / max(self.count - 1, 0)
        return Curve(self.log_snr / self.count, mean, variance.sqrt())


class EndTable(NamedTuple):
    """What `ends` sums up of the draws at both ends of the range: weights of f and of its squared differences.

    Outermost are the draws within one unit of log-SNR of the first of them, two at least; next to them come as many. In
    this order, at the noisy end and then at the clean one.

    Attributes:
        mean: weights of -f/2 in the means over these draws, float64, shape (N, 4).
        spread: weights of its squared successive differences in the variances of these means, shape (N - 1, 4).
        at: the distance of the two stretches in log-SNR, and that of the outer one to the end, shape (2, 2).
    """

    mean: Tensor
    spread: Tensor
    at: Tensor

    @classmethod
    def of(cls, log_snr: Tensor, log_snr_range: tuple[float, float]) -> EndTable:
        """Return the table of draws at these log-SNRs, ascending; those beyond the range say nothing of its ends.

        It has NaN where fewer than four are in the range.
        """
        (lo, hi), values = log_snr_range, log_snr.tolist()
        total, skip = len(values), bisect_right(values, lo - NEAR)
        values = values[skip : bisect_left(values, hi + NEAR)]
        n = len(values)
        # numpy: some dozens of operations on a handful of numbers, for every group of a new seed.
        mean, spread, at = np.zeros((total, 4)), np.zeros((total - 1, 4)), np.full((2, 2), math.nan)
        if n < FEWEST:
            return cls(*map(torch.from_numpy, (mean + math.nan, spread, at)))
        for end, (first, away) in enumerate(((lo, values), (-hi, [-value for value in reversed(values)]))):
            count = min(max(bisect_left(away, away[0] + END), 2), max(2, n // 4))
            outer, inner = sum(away[:count]) / count, sum(away[count : 2 * count]) / count
            at[end] = inner - outer, outer - first
            for k, start in ((2 * end, 0), (2 * end + 1, count)):
                start = skip + (start if end == 0 else n - start - count)
                mean[start : start + count, k] = 1 / count
                spread[start : start + count - 1, k] = 1 / (2 * (count - 1) * count)
        return cls(*map(torch.from_numpy, (mean, spread, at)))

    @classmethod
    def stacked(cls, tables: Sequence[EndTable]) -> EndTable:
        """Return the tables of several groups of samples as one, for a block (G, m, N) of f."""
        if len(tables) == 1:
            return tables[0]
        mean, spread, at = (torch.stack(each) for each in zip(*tables))
        return cls(mean, spread, at[:, None])


def ends(f: Tensor, table: EndTable, slowest: tuple[float, float]) -> Tensor:
    """Return what `truncation` needs of each sample: float64, (B, 2, 7) or (G, m, 2, 7), the noisy end first.

    The seven are the mean of -f/2 over the outermost draws and its variance, the same over the draws next to them, the
    distance of the two in log-SNR, that of the outermost draws to the end, and the slowest decay to be reckoned with
    there.
    """
    half = -0.5 * f.to(torch.float64)
    means, spreads = half @ table.mean, half.diff(dim=-1).square() @ table.spread
    pairs = torch.stack([means, spreads], -1).unflatten(-2, (2, 2)).flatten(-2)
    shape = pairs.shape[:-1]
    found = torch.cat([pairs, table.at.expand(*shape, 2), pairs.new_empty(*shape, 1)], -1)
    rates = found[..., 6]
    for end, rate in enumerate(slowest):
        rates[..., end].fill_(rate)
    return found


def truncation(ends: Tensor) -> Tensor:
    r"""Estimate how far each sample's integrand reaches beyond both ends of the range, nats, shape (B,).

    Far out the difference to the reference decays like the signal-to-noise ratio (noisy end) or its inverse (clean
    end), at the rate 1 in log-SNR; nearer, where the data have structure at the scale of the noise, more slowly, or it
    still grows. With v the value at the end and r the rate there, as two stretches of the curve show them, the tail is

    .. math:: |v|\,\frac{-\log r}{1 - r} \;\text{ for a decay, }\qquad |v|\,\max\Big(\frac{(1 + 2u)(1 + u)}{2u^2},
        \frac{1 + w}{w}\Big),\; u = \frac{2 + r}{1 - r},\; w = \frac{1 + r}{1 - r} \;\text{ for growth, } r < 0

    The first is exact for a logistic course u/(1 + u), the others for u^2/(1 + u)^3 and w/(1 + w)^2: the differences of
    two Gaussians of almost the same width, and of almost the same mean. Where nothing decays, the reference's own width
    says how far the course may go on.

    A sample's own v is known no better than its noise: it counts as far as the samples differ by more than that, and
    otherwise their mean stands for it; two standard errors are added. Rates and means are those of samples alike, whose
    integrand is of the same power of ten, so that an outlier says nothing of the others.

    It is infinite where fewer than four draws lie within the range, which is upside down where all of the data's
    structure is finer or coarser than the noise of the schedule.
    """
    known = ends[..., 0].isfinite().all(1)
    filled = torch.where(known[:, None, None], ends, torch.ones_like(ends))
    outer, outer_noise, inner, inner_noise, distance, inside, slowest = filled.unbind(-1)  # (B, 2) each
    alike = _Alike((outer.square() + inner.square()).masked_fill(~known[:, None], math.nan))
    noise = alike.mean(outer_noise)
    size = alike.mean(outer.square()) - noise
    apart = (distance * known[:, None]).sum(0) / known.sum()
    decay = ((alike.mean(inner.square()) - alike.mean(inner_noise)) / size).log() / (2 * apart)
    # Without a value that stands out of the noise there is no rate to be seen.
    seen = size > 3 * noise / alike.count.sqrt()
    rate = torch.where(seen, decay.nan_to_num(1.0, 1.0, FASTEST_GROWTH), 1.0).clamp(FASTEST_GROWTH, 1 - 1e-6)
    tail = _tail(rate, slowest.amin(0)) * (-rate.clamp(min=0) * inside).exp()
    mean = alike.mean(outer)
    spread = alike.mean((outer - mean).square()) * alike.count / (alike.count - 1).clamp(min=1)
    own = ((spread - noise) / spread.clamp(min=1e-300)).clamp(0, 1).masked_fill(alike.count == 1, 1.0)
    error = own * outer_noise + (1 - own) ** 2 * spread / alike.count
    value = mean + own * (outer - mean)
    return torch.where(known, ((value.abs() + 2 * error.sqrt()) * tail).sum(1), math.inf)


def truncation_in_words(largest: float) -> str:
    """Return what is printed of the largest truncation, nats."""
    if math.isinf(largest):
        return "truncation unknown with so few draws in the range"
    return f"largest truncation about {largest:.2g}"


class _Alike:
    """Which samples are alike at an end: by how many powers of ten their integrand is above that of most, if it is.

    Attributes:
        count: how many are like a sample, itself included, float64, shape (B, 2); none like one with NaN.
    """

    def __init__(self, squares: Tensor) -> None:
        above = squares / squares.nanmedian(0).values.clamp(min=1e-300)
        power = (above.clamp(min=1.0).log10() / 2).round().clamp(max=MOST_POWERS)
        every = torch.arange(MOST_POWERS + 1, dtype=power.dtype, device=power.device)
        self._member = (power[..., None] == every).to(squares)  # (B, 2, powers)
        self.count = self._total(torch.ones_like(squares))

    def mean(self, values: Tensor) -> Tensor:
        """Return for each sample the mean of values (B, 2) over those that are like it, shape (B, 2)."""
        return self._total(values) / self.count.clamp(min=1)

    def _total(self, values: Tensor) -> Tensor:
        return torch.einsum("bek,ek->be", self._member, torch.einsum("bek,be->ek", self._member, values))


def _tail(rate: Tensor, slowest: Tensor) -> Tensor:
    """Return the integral of a course beyond an end, for the value 1 and a rate of decay there."""
    decay = torch.maximum(rate, slowest.clamp(max=SLOWEST))
    u, w = (2 + rate) / (1 - rate), ((1 + rate) / (1 - rate)).clamp(min=0.05)
    growing = torch.where(rate < 0, torch.maximum((1 + 2 * u) * (1 + u) / (2 * u**2), (1 + w) / w), 0.0)
    return torch.maximum(-decay.log() / (1 - decay), growing)


def table_error(curve: Curve, table: Tensor) -> float:
    r"""Estimate the error of the trapezoid rule over a whole table of log-SNRs, ascending, nats.

    .. math:: \sum_i \frac{h_i^3}{12}\, |f''|

    with the second derivative from the curve's means in 48 bins, and in wide cells what
    `fastscore.estimator.trapezoids` has for them. The small cells of a long table make their noise
    harmless; on a table of fewer than some 200 entries it adds to the estimate where evaluations are few. NaN where
    draws are at fewer than three places, which show no curvature.
    """
    edges = torch.linspace(float(table[0]), float(table[-1]), TABLE_BINS + 1, dtype=torch.float64, device="cpu")
    place = (torch.searchsorted(edges, curve.log_snr.contiguous(), right=True) - 1).clamp(0, TABLE_BINS - 1)
    count, at, mean = torch.zeros(3, TABLE_BINS, dtype=torch.float64, device="cpu")
    count.index_add_(0, place, torch.ones_like(curve.mean))
    held = count > 0
    at, mean = (
        v.index_add_(0, place, values)[held] / count[held] for v, values in ((at, curve.log_snr), (mean, curve.mean))
    )
    if len(at) < 3:
        return float("nan")
    slope = mean.diff() / at.diff()
    second = slope.diff().abs() / (0.5 * (at[2:] - at[:-2]))
    middle = (table[1:] + table[:-1]) / 2
    nearest = torch.searchsorted((at[2:-1] + at[1:-2]) / 2, middle) if len(at) > 3 else torch.zeros_like(middle).long()
    width = table.diff()
    bound, change = bounds(width), mean[_nearest(at, table)].diff().abs()
    return float(torch.where(bound > 0, bound * change, width**3 / 12 * second[nearest]).sum())


def _nearest(at: Tensor, places: Tensor) -> Tensor:
    """Return for each place which of some ascending values is nearest to it."""
    return torch.searchsorted((at[1:] + at[:-1]) / 2, places.contiguous())
