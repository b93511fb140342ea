r"""Sums over draws with their variances, and means over samples with theirs.

With g_s = -w_s N (f_s - c_s) / 2 for draw s of N, log p = log q - 1/2 int c + mean(g), and its variance comes from
second differences, because neighbouring draws share almost the same log-SNR:

.. math:: \mathrm{Var} = \sum_s (g_{s+1} - 2 g_s + g_{s-1})^2 \,/\, (6 (N-2) N)

The plain variance over draws would count the integrand's course over log-SNR as noise and be far too large. With few
draws, or in hundreds of dimensions, a slope of that course is as large as their noise, and first differences would see
it. Student's t then widens the variance for the degrees of freedom that the differences have (`draw_variance`). Entries
of a table that are drawn once or twice in turns have terms of unlike size whatever the integrand; differences are taken
as if each were drawn as often as it deserves (`Rule.even`).

The shift U of all nodes has an error of its own. Between the ends it is as small as the integrand is smooth; at the
ends it is, to first order in 1/N (Euler and Maclaurin),

.. math:: \big(\tfrac12 - U\big)\, J, \qquad J = g_N / N - g_1 / N, \qquad \mathrm{Var} = J^2 / 12

with the jump J of the last term over the first one. A group of samples shares its nodes (`fastscore.estimator.rules`),
hence this error, which no spread within the group shows. `GroupSums.common_variance` adds it to the error of every
mean. (The spread between the groups' means would show more, and mostly how the samples themselves differ: the error of
a mean would depend on their order.)

References:
    The Mean Square Successive Difference (von Neumann et al., 1941), https://doi.org/10.1214/aoms/1177731677
    Handbook of Mathematical Functions, 23.1.18, 23.1.30 (Abramowitz and Stegun, 1964)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..support.warn import warn
from .rules import GROUPS, Rule, group_shifts
from .switching import unseen

KNOWN = 20  # draws, that an expected skewness counts for
# Its square times d. A squared norm has 8, and covered too much: the terms of most networks are less skewed.
EXPECTED = 6.0
# Of a difference whose draws are pairs; the share of pairs, and the draws, that change nothing.
FREEDOM_OF_PAIRS, FEW_PAIRS, FEW_DRAWS = 1.5, 0.3, 16
FEWEST_BENDS = 8  # draws, of which second differences have three degrees of freedom


class _Differences(NamedTuple):
    r"""What differences of one order say of even noise.

    Attributes:
        share: their mean square, in that of a term.
        freedom: c in the degrees of freedom :math:`c (\sum d_s^2)^2 / \sum d_s^4`.
        of_draw: how many of these a draw adds.
    """

    share: float
    freedom: float
    of_draw: float


STEEP = 4.0
FIRST, SECOND, THIRD = _Differences(2, 2, 2 / 3), _Differences(6, 1.54, 0.51), _Differences(20, 1.3, 0.43)


def draw_sum(f: Tensor, rule: Rule, density: bool = False) -> Tensor:
    """Return -1/2 of the rule's sum of f, float64; with the weights of "density" if asked.

    Arguments:
        f: shape (B, N), or (G, m, N) with a rule of G groups; the sum has no last dimension.
    """
    weight, remainder = (rule.density_weight, rule.density_remainder) if density else (rule.weight, rule.remainder)
    f = f.to(torch.float64)
    return -0.5 * ((f @ weight if weight.ndim == 1 else (f * weight).sum(-1)) + remainder)


def draw_variance(f: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return the variance of `draw_sum` by its draws' differences, and its degrees of freedom, float64, (B,) each."""
    return successive_variance(_terms(f, rule))


def draw_jump(f: Tensor, rule: Rule) -> Tensor:
    """Return the jump J from the first to the last of the terms that the shift decides, float64, (B,)."""
    return _jump(_terms(f, rule), rule)


def shift_variance(jump: Tensor) -> Tensor:
    """Return the variance that the shift of all nodes has by this jump."""
    return jump.square() / 12


class SelfFitted(NamedTuple):
    """What is known of draws that references were fitted to.

    Attributes:
        inflation: of the variance, as these draws are not independent (`fastscore.estimator.self_fit.inflation`).
        coarse: how many of the draws, from the first one on, may show that the network switches between components
            (`fastscore.estimator.switching`).
        missed: variance of their sum that `fit` found few draws to show (`fastscore.estimator.self_pilot`).
    """

    inflation: float
    coarse: int
    missed: float = 0.0


class Spread(NamedTuple):
    """What the draws of each sample say of the error of their sum.

    Attributes:
        variance: by differences of the draws, with its degrees of freedom `nu`.
        skewness: of the sum, squared.
        jump: from the first term to the last one.
        unseen: variance that these draws miss, and others have. Means have it in `variance` already, as that is right
            on average over samples.
    """

    variance: Tensor
    nu: Tensor
    skewness: Tensor
    jump: Tensor
    unseen: Tensor

    @classmethod
    def of(cls, f: Tensor, rule: Rule, dims: int | Tensor, own: SelfFitted | None = None) -> Spread:
        r"""Return the spread of some samples' draws, float64, (B,) each.

        The skewness of a sum of n terms is that of a term, over :math:`\sqrt n`. Few draws show little of it, since
        the rare large terms that make it are missing where they would matter. So what they show is averaged with the
        :math:`\sqrt{6 / d}` that is expected in d dimensions (`EXPECTED`), which counts as much as `KNOWN` draws.

        Arguments:
            dims: d, how many entries of a sample count; one number, or one a sample.
            own: where references were fitted to the draws, which have so little noise beside the course of f then that
                its slope and its bends have to be left out: third differences see neither.
        """
        terms = _terms(f, rule)
        second = terms.diff(n=2, dim=-1)
        if own is None:
            kind = _kind(terms.shape[-1])
            variance, nu = _mean_square(terms.diff(dim=-1) if kind is FIRST else second, kind)
            missed = torch.zeros_like(variance)
        else:
            kind = THIRD
            variance, nu = _mean_square(second.diff(dim=-1), kind)
            variance = own.inflation * variance
            missed = unseen(terms[..., : own.coarse], rule.even[..., : own.coarse]).clamp(min=own.missed)
        draws = nu / kind.of_draw  # N where all draws count alike
        third = torch.linalg.vecdot(second.square(), second) / 6  # 2^3 - 2 times a term's third moment
        seen = (third.square() / variance.pow(3).clamp(min=1e-300)).clamp(max=draws)
        skewness = (EXPECTED * KNOWN / (dims * draws) + draws * seen) / (KNOWN + draws)
        return cls(variance, nu, skewness, _jump(terms, rule), missed)

    def widened(self) -> Tensor:
        r"""Return variances such that +- 1.96 standard errors cover 95 % under Student's t, with skewness and jump.

        A skewed sum and its own standard error err together: the interval covers less than 95 % by
        :math:`2 z\, \varphi(z)\, \gamma^2 (z^4 + 2 z^2 - 3) / 18` (Hall's expansion), hence wider by 1.08 γ².

        References:
            The Bootstrap and Edgeworth Expansion, section 2.6 (Hall, 1992),
            https://doi.org/10.1007/978-1-4612-4384-7
        """
        noise = (1 + 1.08 * self.skewness).square() * widened(self.variance, self.nu)
        return noise + self.unseen + shift_variance(self.jump)


def _terms(f: Tensor, rule: Rule) -> Tensor:
    return (f.to(torch.float64) - rule.curve) * (0.5 * rule.even)


def _jump(terms: Tensor, rule: Rule) -> Tensor:
    return (terms * rule.ends).sum(-1)


def successive_variance(terms: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the variance of the terms' sum along the last dimension, and its degrees of freedom.

    Second differences d_s have about :math:`\nu = 1.54 (\sum d_s^2)^2 / \sum d_s^4` degrees of freedom: 0.51 N for even
    noise, fewer where a short stretch of log-SNR makes most of it. Fewer terms than `FEWEST_BENDS` have first ones
    taken, of 2 N / 3 degrees.

    Arguments:
        terms: float64, shape (..., N), ascending in log-SNR.
    """
    kind = _kind(terms.shape[-1])
    return _mean_square(terms.diff(n=1 if kind is FIRST else 2, dim=-1), kind)


def first_variance(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Return `successive_variance` by first differences, of 2 N / 3 degrees of freedom for any number of terms."""
    return _mean_square(terms.diff(dim=-1), FIRST)


def contrast_variance(terms: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return `successive_variance` of terms whose course is mostly gone, such as those of one class less another's.

    First differences have a third more degrees of freedom, which tell classes apart sooner. Second ones are taken where
    they say less by 1 + 4 / sqrt(nu), as noise alone says once in a thousand times.
    """
    variance, nu = first_variance(terms)
    if terms.shape[-1] < FEWEST_BENDS:
        return variance, nu
    straight, own_nu = _mean_square(terms.diff(n=2, dim=-1), SECOND)
    steep = variance > (1 + STEEP * own_nu.rsqrt()) * straight
    return torch.where(steep, straight, variance), torch.where(steep, own_nu, nu)


def _kind(draws: int) -> _Differences:
    """Return which differences the variance of so many draws is taken from."""
    return FIRST if draws < FEWEST_BENDS else SECOND


def bends(terms: Tensor) -> Tensor:
    """Return how far each inner term lies above the mean of its neighbours, shape (..., N - 2)."""
    return -0.5 * terms.diff(n=2, dim=-1)


def _mean_square(differences: Tensor, kind: _Differences) -> tuple[Tensor, Tensor]:
    """Return the variance of a sum of terms by their differences, with its degrees of freedom."""
    square, order = differences.square(), (FIRST, SECOND, THIRD).index(kind) + 1
    total, fourth = square.sum(-1), torch.linalg.vecdot(square, square)
    # At least one degree of freedom, also where there is no noise at all.
    nu = (kind.freedom * total.square() / fourth.clamp(min=1e-300)).clamp(min=1.0)
    count = differences.shape[-1]
    return total * ((count + order) / (kind.share * count)), nu


def widened(variance: Tensor, nu: Tensor) -> Tensor:
    """Return a variance such that +- 1.96 standard errors cover 95 % under Student's t with nu degrees of freedom."""
    rest = 1 / nu
    return (1 + rest * (1.21 + 1.44 * rest)).square() * variance


def freedom_of_pairs(nu: Tensor, share: Tensor, pairs: float | Tensor, draws: int) -> Tensor:
    r"""Return the degrees of freedom that count of the draws of a difference.

    Antithetic pairs cancel what is odd in the noise, nearly all of the difference where two networks are alike. The
    rest comes from the few draws in which they tell components of the data apart, and a sample that has none of these
    does not show what it lacks. So where draws are pairs, no more are counted than

    .. math:: \nu \le 1.5\, (1 + r^2) / s^2, \qquad s = \frac{(\pi - 0.3)_+}{0.7} \min\big(1, (N / 16 - 1)_+\big)

    with r the variance of the difference in that of one of the two, :math:`\pi` the share of pairs, and N draws: what
    16 of them say in Student's t is wide enough. `tests/test_alike.py` measures what +- 1.96 standard errors cover.

    Arguments:
        share: r, shape of nu.
        pairs: how many of the draws are pairs, 0 to 1.
        draws: N.
    """
    s = (torch.as_tensor(pairs, dtype=nu.dtype, device=nu.device) - FEW_PAIRS).clamp(min=0) / (1 - FEW_PAIRS)
    s = (s * min(max(draws / FEW_DRAWS - 1, 0), 1)).clamp(min=1e-6)
    return torch.minimum(nu, FREEDOM_OF_PAIRS * (1 + share.square()) / s.square())


def student_quantile(tail: float, nu: Tensor) -> Tensor:
    r"""Return Student's t that is exceeded with probability `tail`, shape of nu, by its expansion in :math:`1/\nu`.

    Within 3 % of the exact quantile for nu >= 3 and tails down to 0.001.

    References:
        Handbook of Mathematical Functions, 26.7.5 (Abramowitz and Stegun, 1964)
    """
    z = -float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64, device="cpu")))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / nu**power for power, term in enumerate(terms, 1))


class GroupSums(NamedTuple):
    """Sums over the samples of each group of nodes, float64, (GROUPS,) each.

    Attributes:
        count, total, squares: of the samples, of their values, and of these squared.
        jump: of their jumps.
    """

    count: Tensor
    total: Tensor
    squares: Tensor
    jump: Tensor

    @classmethod
    def of(cls, values: Tensor, jump: Tensor, group: Tensor) -> GroupSums:
        """Sum values and their jumps, shape (B,), by their group, int64, shape (B,)."""
        values = values.to(torch.float64)
        rows = torch.stack([torch.ones_like(values), values, values.square(), jump.to(values)])
        return cls(*rows.new_zeros(4, GROUPS).index_add_(1, group.to(values.device), rows))

    def mean_with_error(self) -> tuple[Tensor, Tensor]:
        """Return the mean and its standard error as an estimate of the data's; NaN for one sample.

        The error of an infinite mean is infinite.
        """
        mean = self.mean()
        error = (self.spread() / self.count.sum() + self.common_variance()).sqrt()
        return mean, torch.where(mean.isinf(), torch.inf, error)  # where a log-density overflows, nothing is known

    def told(self) -> tuple[float, float]:
        """Return the mean and its standard error as numbers of the host, in one copy."""
        mean, error = torch.stack(self.mean_with_error()).tolist()
        if math.isinf(mean):
            warn(
                f"the mean of these samples is {mean}, since a number among them is beyond what its dtype holds, and "
                "its error is given as inf: is the scale of x another than that of the data in training and in fit?"
            )
        return mean, error

    def mean(self) -> Tensor:
        return self.total.sum() / self.count.sum()

    def spread(self) -> Tensor:
        """Return the variance between samples; NaN for one sample."""
        count, mean = self.count.sum(), self.mean()
        return (self.squares.sum() - count * mean.square()).clamp(min=0) / (count - 1)

    def common_variance(self) -> Tensor:
        r"""Return the part of the mean's variance that samples with the same nodes have in common.

        It is the variance of :math:`\sum_g (\tfrac12 - U_g) J_g / n` over the common part of all shifts. The errors of
        shifts a distance :math:`\delta` apart have the covariance
        :math:`B_2(\delta) / 2 = (\delta^2 - \delta + \tfrac16) / 2`: groups with the same jump cancel each other's.
        """
        shift = group_shifts().to(self.jump.device)
        apart = (shift[:, None] - shift).abs()
        share = self.jump / self.count.sum()
        return (share @ ((apart.square() - apart + 1 / 6) / 2) @ share).clamp(min=0)
