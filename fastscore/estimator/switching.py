r"""The least variance of a network that switches between components of the data, where a sample's draws do not show it.

Let data be one of two components alike, x at the centre of one of them, :math:`\Delta` their distance, and
:math:`\mu = \alpha^2 \Delta^2 / 2 \sigma^2`. Of x_t the network tells that it comes from the other one with the
probability :math:`p = 1 / (1 + e^L)` with the log-odds :math:`L \sim N(\mu, 2\mu)`, and its squared residual has
:math:`2 \mu p^2` beside the rest. A sum over draws that are h apart in log-SNR, and hence has weights h, has of these
the variance

.. math:: h u, \qquad u = \tfrac14 \int \mathrm{Var}(2 \mu p^2)\, d\lambda
    = \int \mathrm{Var}(\mu p^2)\, d\mu / \mu = 1.055

whatever the distance is, which only decides where on the axis of log-SNR the switch lies. Components that are more than
two make more: 2.2 nats^2 for four, all at one distance from each other, and 3.5 for eight.

Few draws hold it. Half of u is in draws whose probability, added up over log-SNR, is 0.0135: at 256 evaluations a
sample has 0.1 of them, and one that has none says in its differences what the rest leaves. It errs by what it lacks,
the same way each time, and says so in too small a bar. But every switch begins where it is frequent, with small terms
(:math:`\mu < 2`), which nearly all samples have. So `unseen` takes the sum of what the draws show of u; where that
is `SURE` or more there is a switch, and it has at least u.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1.055  # u, nats^2
# Of exact networks of 192 numbers at 256 evaluations, 95 % of the samples show 0.06 or more where there are four
# components, 0.025 or more where there are two, and half of them 0.011 to 0.08 where two differ in width alone. Of a
# single Gaussian, 95 % show 0.004 or less.
SURE = 0.035


def unseen(terms: Tensor, weight: Tensor) -> Tensor:
    r"""Return by how much the variance of the terms' sum is at least larger than their third differences say.

    With u_s what the draws show of u, :math:`u_s = \sum_s d_s^2 / 20 h_s` of third differences d, that is

    .. math:: \Big(\frac{\min(1, u_s / SURE)^2 u}{u_s} - 1\Big)_+ \sum_s d_s^2 / 20

    Nothing is added where u_s is u or more; and next to nothing where it is far below `SURE`, so that the noise of
    fitted coefficients is not taken for a switch.

    Arguments:
        terms: w f / 2 of the draws, at log-SNRs where components are told from each other, float64, (..., N).
        weight: w of the draws, which is h, broadcast against the terms.
    """
    if terms.shape[-1] < 4:
        return terms.new_zeros(terms.shape[:-1])
    spacing = weight.unfold(-1, 4, 1).mean(-1)
    variance = terms.diff(n=3, dim=-1).square() / 20
    seen = (variance / spacing).sum(-1)
    least = LEAST * (seen / SURE).clamp(max=1).square()
    return ((least / seen.clamp(min=torch.finfo(seen.dtype).tiny) - 1).clamp(min=0)) * variance.sum(-1)
