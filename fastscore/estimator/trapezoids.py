r"""What the trapezoid rule over a table is off the integral, sample by sample, from a sample's own draws.

The rule errs by :math:`h^3 f''/12` in a cell of width h. With f'' from the parabolas through three neighbouring entries
(the mean of the two that a cell is part of) that is a weighted sum of f over the entries, which is estimated by the
same draws as the integral: unbiased, and with a variance by the differences of draws at the same entry, or of
neighbouring ones where an entry has one draw. Errors of samples have both signs: their mean over a batch says nothing
of one sample.

In a cell far wider than the integrand's own structure the leading term says little: under
`DDPM.linear(50, 1e-4, 0.4)`, whose cleanest step is 4.4 wide, it was 0.8 nats for errors of 1.4. There a bound stands
for it: where f rises or falls from end to end, with :math:`|f''| \le |f'|` as a logistic course has it,

.. math:: |error| \le \Big(\frac h2 \coth\frac h2 - 1\Big) |f_b - f_a|

with the values at both ends of the cell, and equality for :math:`f = e^{\pm\lambda}`. (The error is the integral of
f' times the distance to the middle; of all f' with that integral and slope, exponential ones have the largest.) The
noisiest cell, which is seven wide under cosine schedules, is left to the leading term: there it is not too small.

References:
    Handbook of Mathematical Functions, 25.4.2 (Abramowitz and Stegun, 1964)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAST_ENTRIES = 3  # of a table, which show a curvature
WIDE = 3.5  # in log-SNR; a logistic course takes 4.4 from a tenth to nine tenths of its height


class Trapezoids(NamedTuple):
    """Weights of the draws in the rule's error and in its variance; all are empty where there is no table.

    Attributes:
        error: of -f/2 less its known mean, at each draw, float64, shape (N,).
        remainder: the error of the known mean itself, shape ().
        noise: of the squared differences of successive draws in the variance, shape (N - 1,).
    """

    error: Tensor
    remainder: Tensor
    noise: Tensor

    @classmethod
    def none(cls) -> Trapezoids:
        empty = torch.zeros(0, dtype=torch.float64, device="cpu")
        return cls(empty, empty, empty)

    @classmethod
    def of(cls, per_cell: Tensor, remainder: Tensor, entry: Tensor, weight: Tensor) -> Trapezoids:
        """Return the weights of draws.

        Arguments:
            per_cell: the error's weights over the rule's, entry by entry, shape (T,).
            remainder: the error's weights times the known mean at the entries, summed.
            entry: of each draw, ascending, int64, shape (N,).
            weight: of each draw in the rule, shape (N,).
        """
        error = weight * per_cell[entry]
        same = entry[1:] == entry[:-1]
        alone = torch.ones(len(entry), dtype=torch.bool, device="cpu")
        alone[1:] &= ~same
        alone[:-1] &= ~same
        # Each draw's variance is half of the mean of these squared differences; those to another entry count only
        # where a draw is the only one of its own, since they have the integrand's course in them.
        left, right = same | alone[1:], same | alone[:-1]
        count = torch.zeros(len(entry), dtype=torch.float64, device="cpu")
        count[1:] += left
        count[:-1] += right
        square = error.square() / (8 * count.clamp(min=1))
        return cls(error, remainder, left * square[1:] + right * square[:-1])


def error_weights(log_snr: Tensor) -> Tensor:
    """Return the weights of f in the rule's error over ascending log-SNRs, float64, (T,); NaN for fewer than three."""
    n = len(log_snr)
    if n < LEAST_ENTRIES:
        return torch.full_like(log_snr, torch.nan)
    h = log_snr.diff()
    bound = bounds(h)
    cell = (h**3 / 12).masked_fill(bound > 0, 0)
    # What each parabola has: half of both cells beside its middle, and all of the first and the last one.
    half = torch.cat([cell[:1], cell[1:-1] / 2, cell[-1:]])
    second = half[:-1] + half[1:]
    # Second and first differences read from their ends: what a table of T entries takes is a few times T numbers.
    slope = _differences_of(second / (0.5 * (log_snr[2:] - log_snr[:-2])))
    return _differences_of(slope / h + bound)


def bounds(width: Tensor) -> Tensor:
    """Return what a cell's difference of f is multiplied with where the cell is wide, ascending; 0 elsewhere, (T - 1,).

    The sign of the error is not known there.
    """
    wide = (width > WIDE) & (torch.arange(len(width), device=width.device) > 0)
    return torch.where(wide, width / 2 / (width / 2).tanh() - 1, 0.0)


def fault_of(log_snr: Tensor) -> str | None:
    """Return what no draw shows of the rule over a table of ascending log-SNRs, None where they show it."""
    if len(log_snr) < LEAST_ENTRIES:
        return (
            f"a table of {len(log_snr)} timesteps shows no curvature of the integrand: how far the trapezoid rule "
            "over it is off, which may be tens of nats, is in no error; give a schedule of "
            f"{LEAST_ENTRIES} timesteps at least"
        )
    widest = float(log_snr.diff()[1:].max())  # of the cells that `bounds` is for; little work, since every call asks
    if widest > WIDE:
        return (
            f"timesteps of the table are {widest:.2g} apart in log-SNR, where more than {WIDE} hides "
            "what the integrand does between them: the discretization is a bound only if it rises or falls there "
            "without a peak and no faster than the signal-to-noise ratio; give a schedule of more timesteps, or of "
            "smaller betas where it is clean"
        )
    return None


def _differences_of(weight: Tensor) -> Tensor:
    """Return the weights of numbers, (n + 1,), in a sum of their differences with these weights, (n,)."""
    edge = weight.new_zeros(1)
    return torch.cat([edge, weight]) - torch.cat([weight, edge])


def error_of_rule(f: Tensor, curve: Tensor, trapezoids: Trapezoids) -> Tensor:
    """Return the estimated error of log p by the rule and the variance of this estimate, float64, shape (..., 2).

    Arguments:
        f, curve: of each draw, and its known mean, shapes (..., N).
    """
    noise = f.detach().to(torch.float64) - curve
    error = -0.5 * ((noise * trapezoids.error).sum(-1) + trapezoids.remainder)
    return torch.stack([error, (noise.diff(dim=-1).square() * trapezoids.noise).sum(-1)], -1)


def size_of_error(found: Tensor) -> Tensor:
    """Return the size of errors (B, 2) as `error_of_rule` tells them, without what their noise adds, shape (B,)."""
    error, variance = found.unbind(-1)
    return (error.square() - variance).clamp(min=0).sqrt()
