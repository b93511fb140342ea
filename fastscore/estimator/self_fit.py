r"""The part of a network's residual that is linear in the noise, fitted to a sample's own draws, as a control variate.

In the basis of a reference q that is one Gaussian, its residual is :math:`e_q = \kappa z + m` entry by entry, with z
the noise. Fit what the network's residual e has beside it,

.. math:: e - e_q \approx c(\lambda) + w(\lambda) z, \qquad e_s = e_q + c(\lambda) + w(\lambda) z

and take away how far the squared norm of e_s is from its mean, instead of that of e_q:

.. math:: f' = f - \sum_i \Big[ 2 z_i \big(\kappa_i c_i + w_i (m_i + c_i)\big)
    + (z_i^2 - 1)\, w_i (2 \kappa_i + w_i) \Big]

with :math:`f = \|e\|^2 - \|e_q\|^2`. As :math:`E z = 0` and :math:`E z^2 = 1`, f' has the mean of f whatever c and w
are, as long as they do not depend on the draw's own noise. So draws go in folds, and the coefficients of a fold are
fitted to the others.

Both c and w are piecewise linear between knots, fitted by least squares with a penalty on their size and on their steps
from knot to knot. The normal equations of an entry are block tridiagonal with 2 x 2 blocks; those of all entries and
folds are solved at once. In all tensors here draws come first, (N, n) for N draws, a multiple of `FOLDS`, and n entries
of any samples that share their nodes. Draw s is in fold s mod `FOLDS`; one of weight zero is none.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..support.autocast import own_dtypes

FOLDS = 8
SPACING = 1.6  # of the knots, in log-SNR, at most
# In units of a draw, whose residual beside the fit is about as large as c and w themselves.
RIDGE, SMOOTH = 0.3, 1.0


class Hats(NamedTuple):
    """Piecewise linear functions of log-SNR, each one at its knot and zero at the others.

    Attributes:
        value: of every hat at every draw, by fold, (F, T, J).
        once: the values of draws that count, (F, J, T).
        twice: their products, of a hat with itself and then with the next one, (F, 2 J - 1, T).
    """

    value: Tensor
    once: Tensor
    twice: Tensor

    @classmethod
    def of(cls, log_snr: Tensor, counts: Tensor, span: tuple[float, float]) -> Hats:
        """Return hats over equidistant knots from one end of a span to the other.

        Arguments:
            log_snr: of the draws, (N,).
            counts: 1 for draws, 0 for what fills up the last folds, in the dtype of the fit, (N,).
        """
        value = _hats(log_snr, span).to(counts)
        once = value * counts[:, None]
        twice = torch.cat([once * value, once[:, :-1] * value[:, 1:]], 1)
        value, once, twice = (part.unflatten(0, (-1, FOLDS)).transpose(0, 1) for part in (value, once, twice))
        return cls(value.contiguous(), once.mT.contiguous(), twice.mT.contiguous())


@own_dtypes
def fit(z: Tensor, rest: Tensor, hats: Hats) -> tuple[Tensor, Tensor]:
    r"""Return c and w at every draw, by the draws of the other folds, (N, n) each.

    Their values at the knots minimize

    .. math:: \sum_s (rest_s - c_s - w_s z_s)^2 + \sum_{v \in \{c, w\}} \Big[ ridge \sum_k v_k^2
        + smooth \sum_k (v_{k+1} - v_k)^2 \Big]

    Arguments:
        z, rest: noise, and what is fitted, (N, n).
    """
    noise = _by_fold(z)
    moments = [hats.twice.sum(2, keepdim=True), *(torch.bmm(hats.twice, v) for v in (noise, noise.square()))]
    right = [torch.bmm(hats.once, v) for v in (_by_fold(rest), _by_fold(rest * z))]
    c, w = _solve([_others(sums) for sums in moments], [_others(sums) for sums in right])
    return tuple(torch.bmm(hats.value, v).transpose(0, 1).flatten(0, 1) for v in (c, w))


@lru_cache(maxsize=64)
def inflation(draws: int, span: tuple[float, float]) -> float:
    r"""Return by how much the variance of a sum over draws may be larger than that of the draws, added up.

    Two draws of different folds are fitted to each other. What the noise of one puts into the coefficients of the other
    is uncorrelated with all else, but not with what the other puts into its own: at most it is the same. With r the
    share that the coefficients' noise has beside the rest of a draw's variance, the sum's is at most 1 + 2 r, and what
    the draws show 1 + r. A regression of N draws with the hat matrix H has :math:`r = tr(H^2) / N`.
    """
    count = draws - draws // FOLDS
    log_snr = torch.linspace(*span, count, dtype=torch.float64, device="cpu")
    value = _hats(log_snr, span)
    inner, one = value.mT @ value, torch.eye(value.shape[1], dtype=torch.float64, device="cpu")
    step = one.diff(dim=0)
    hat = torch.linalg.solve(inner + RIDGE * one + SMOOTH * step.mT @ step, inner)
    share = 2 * float((hat * hat.mT).sum()) / count  # of c and of w
    return (1 + 2 * share) / (1 + share)


def departure(z: Tensor, keep: Tensor, mean: Tensor, c: Tensor, w: Tensor) -> Tensor:
    r"""Return how far the squared residual e_s is from its mean, beyond e_q, entry by entry; of mean zero itself.

    .. math:: 2 z (\kappa c + w (m + c)) + (z^2 - 1)\, w (2 \kappa + w)

    Arguments:
        z: noise, (N, n).
        keep, mean: kappa and m of the reference's residual there.
        c, w: fitted without these draws.
    """
    linear = torch.addcmul(keep * c, w, mean + c)
    return torch.addcmul(2 * z * linear, z.square() - 1, w * (2 * keep + w))


def _hats(log_snr: Tensor, span: tuple[float, float]) -> Tensor:
    """Return the value of every hat at some places, (N, J)."""
    knots = 1 + max(1, math.ceil((span[1] - span[0]) / SPACING))
    place = ((log_snr - span[0]) * ((knots - 1) / (span[1] - span[0]))).clamp(0, knots - 1)
    return (1 - (place[:, None] - torch.arange(knots, device=place.device)).abs()).clamp(min=0)


def _by_fold(values: Tensor) -> Tensor:
    """Return (N, n) as (F, T, n)."""
    return values.unflatten(0, (-1, FOLDS)).transpose(0, 1)


def _others(sums: Tensor) -> Tensor:
    """Return for each fold the sum over the other folds."""
    return sums.sum(0, keepdim=True) - sums


Pair = tuple[Tensor, Tensor]
Symmetric = tuple[Tensor, Tensor, Tensor]  # the upper triangle of a 2 x 2 matrix


def _solve(moments: list[Tensor], right: list[Tensor]) -> Pair:
    """Return c and w at the knots, (F, J, n), by elimination from the first knot to the last, and back.

    Arguments:
        moments: of 1, z and z^2, under the hats' products, (F, 2 J - 1, n) or (F, 2 J - 1, 1).
        right: of rest and rest z, under the hats, (F, J, n).
    """
    one, z, zz = moments
    knots = right[0].shape[1]
    inverse: list[Symmetric] = []
    held: list[Pair] = []
    for k in range(knots):
        more = RIDGE + SMOOTH * ((k > 0) + (k < knots - 1))
        block, value = (one[:, k] + more, z[:, k], zz[:, k] + more), (right[0][:, k], right[1][:, k])
        if k:
            block, value = _eliminated(block, value, _beside(moments, knots, k - 1), inverse[-1], held[-1])
        determinant = block[0] * block[2] - block[1].square()
        inverse.append((block[2] / determinant, -block[1] / determinant, block[0] / determinant))
        held.append(value)
    found = [_times(inverse[-1], held[-1])]
    for k in reversed(range(knots - 1)):
        next_c, next_w = _times(_beside(moments, knots, k), found[-1])
        found.append(_times(inverse[k], (held[k][0] - next_c, held[k][1] - next_w)))
    return tuple(torch.stack(each[::-1], 1) for each in zip(*found))


def _beside(moments: list[Tensor], knots: int, k: int) -> Symmetric:
    """Return the block of the equations between knot k and the next one."""
    one, z, zz = (sums[:, knots + k] for sums in moments)
    return one - SMOOTH, z, zz - SMOOTH


def _eliminated(block: Symmetric, value: Pair, beside: Symmetric, inverse: Symmetric, before: Pair) -> tuple:
    """Return a knot's block and right side without the knot before it."""
    p, q, r = beside
    a, b = _times(inverse, (p, q))
    c, d = _times(inverse, (q, r))
    left = block[0] - p * a - q * b, block[1] - p * c - q * d, block[2] - q * c - r * d
    return left, (value[0] - a * before[0] - b * before[1], value[1] - c * before[0] - d * before[1])


def _times(matrix: Symmetric, vector: Pair) -> Pair:
    p, q, r = matrix
    return p * vector[0] + q * vector[1], q * vector[0] + r * vector[1]
