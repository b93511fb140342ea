r"""Rounds of paired draws: which classes are still in, and what all rounds together say.

Round r gives a whole estimate :math:`S_{c r}` to class c, the sum of a term for every draw; every class still in sees
the same noise, so classes are compared by the terms' differences. Rounds are averaged with their evaluations as
weights. A class that was dropped keeps the rounds in which it took part: its log-likelihood is that of the best class
plus their paired difference over these rounds,

.. math:: L_c = \sum_r \big[ a_{c r}\, S_{c r} + (a_{b r} - a_{c r})\, S_{b r} \big]

with :math:`a_{c r}` the share of round r in the rounds of class c, zero after the last, and b the best class.

References:
    The Approximate Distribution of Estimates of Variance Components (Satterthwaite, 1946),
    https://doi.org/10.2307/3002019
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..estimator.statistics import (
    contrast_variance,
    first_variance,
    freedom_of_pairs,
    shift_variance,
    student_quantile,
    successive_variance,
    widened,
)
from ..support.host import whole

# Evaluations per class; with fewer the nodes are so far apart that their own error decides.
FIRST_ROUND = 32


@dataclass(frozen=True)
class Classification:
    """The result of `DiffusionClassifier.classify`, for B samples and C classes.

    Attributes:
        log_likelihood: log p(x | y), nats, shape (B, C); with weighting "uniform" minus the mean squared error.
        stderr: its standard error, shape (B, C). Differences between classes are far more accurate than that.
        log_posterior: log p(y | x), shape (B, C).
        log_posterior_stderr: its standard error, from paired differences, shape (B, C). What lies beyond the range of
            log-SNR, and how far a table's sum is from the integral, is in no error here; `ScoreDensity.estimate` tells
            it for a class.
        prediction: the class of the highest posterior, int64, shape (B,).
        active: classes that were not dropped, bool, shape (B, C).
        nfe: network evaluations spent on each sample, all classes together, int64, shape (B,).
    """

    log_likelihood: Tensor
    stderr: Tensor
    log_posterior: Tensor
    log_posterior_stderr: Tensor
    prediction: Tensor
    active: Tensor
    nfe: Tensor

    @classmethod
    def joined(cls, parts: list[Classification]) -> Classification:
        """Return the result of all samples from those of some each."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    @property
    def decided(self) -> Tensor:
        """Whether all classes but one were dropped, bool, shape (B,)."""
        return self.active.sum(1) == 1

    def topk(self, k: int) -> tuple[Tensor, Tensor]:
        """Return the k highest posteriors p(y | x) in descending order and their classes, shape (B, k) each.

        Raises:
            ValueError: for less than one class, or more than there are.
        """
        count = self.active.shape[1]
        if not 1 <= (k := whole("k", k)) <= count:
            raise ValueError(f"topk takes 1 to {count} of {count} classes, got {k}")
        log_posterior, classes = self.log_posterior.topk(k, dim=1)
        return log_posterior.exp(), classes

    def __repr__(self) -> str:
        samples, classes = self.active.shape
        return (
            f"Classification({samples} samples, {classes} classes, {float(self.nfe.double().mean()):.0f} evaluations "
            f"per sample, {float(self.decided.double().mean()):.1%} decided)"
        )


Variance = Callable[[Tensor], tuple[Tensor, Tensor]]  # of the terms' sum, and its degrees of freedom
VARIANCES: tuple[Variance, ...] = (first_variance, successive_variance)  # of a difference, none of which is too small
# Of the level, for each of them, since the sooner of the two errs more often than either: at the whole level 5.9 % of
# 4,000 repetitions dropped the better of two near classes where 5 % were stated, at three quarters of it 4.2 %.
SHARE = 0.8


class Rounds:
    """The terms of some samples in every round so far.

    Attributes:
        active: classes still in, bool, shape (B, C).
        nfe: network evaluations spent on each sample, int64, shape (B,).
    """

    def __init__(self, log_prior: Tensor, samples: int) -> None:
        self.log_prior = log_prior
        self.active = torch.ones(samples, len(log_prior), dtype=torch.bool, device=log_prior.device)
        self.nfe = torch.zeros(samples, dtype=torch.int64, device=log_prior.device)
        self._totals: list[Tensor] = []  # one round each, float64, (B, C), zero where a class took no part
        self._terms: list[Tensor] = []  # the same with the draws last, (B, C, N): they say how noisy the totals are
        self._ends: list[Tensor] = []
        self._cost: list[int] = []
        self._took_part: list[Tensor] = []

    def result(self, common: Tensor, dtype: torch.dtype, placed: bool) -> Classification:
        """Return what all rounds say.

        Arguments:
            common: the part of the log-likelihood that all classes share, (B,).
            placed: whether the nodes lie where classes differ, so that every sample's draws show how noisily.
        """
        log_likelihood = self.log_likelihood()
        log_posterior = (log_likelihood + self.log_prior).log_softmax(1)
        return Classification(
            log_likelihood=(log_likelihood + common[:, None]).to(dtype),
            stderr=self.stderr().to(dtype),
            log_posterior=log_posterior.to(dtype),
            log_posterior_stderr=self.log_posterior_stderr(log_posterior.exp(), placed).to(dtype),
            prediction=self.best(),
            active=self.active,
            nfe=self.nfe,
        )

    def open(self) -> Tensor:
        """Return what the next round has to evaluate: (sample, class) in rows, shape (P, 2)."""
        return (self.active & (self.active.sum(1, keepdim=True) > 1)).nonzero()

    def add(self, pairs: Tensor, totals: Tensor, terms: Tensor, ends: Tensor, nfe: int) -> None:
        """Add a round of these (sample, class) pairs.

        Arguments:
            totals: of each pair, shape (P,).
            terms: of each draw, whose noise is that of the total, shape (P, N).
            ends: 1 at the last draw that the nodes' shift decides, -1 at the first, else 0, shape (P, N).
            nfe: evaluations of a pair.
        """
        own = pairs.unbind(1)
        self._totals.append(totals.new_zeros(self.active.shape).index_put(own, totals))
        self._terms.append(terms.new_zeros(*self.active.shape, terms.shape[1]).index_put(own, terms))
        ends_of = terms.new_zeros(len(self.active), 1, terms.shape[1])
        ends_of[own[0], 0] = ends.to(terms.dtype)
        self._ends.append(ends_of)
        self._took_part.append(torch.zeros_like(self.active).index_put(own, self.active.new_ones(())))
        self._cost.append(nfe)
        self.nfe += nfe * self._took_part[-1].sum(1)

    def drop(self, level: float) -> None:
        """Drop every class whose posterior is below the best one's, each at a one-sided error of `level`.

        Differences are skewed: without one of their rare large terms both they and their variance are small, and plain
        Student's t would drop the best of two near classes three times as often as stated. Hence half of the degrees
        of freedom, and a variance that is at least the mean of the sample's differences. Both orders of differences
        between draws tell that variance, the first with a course of the terms in it, the second with fewer degrees of
        freedom; the one counts that drops sooner.
        """
        best = self.best()[:, None]
        log_odds = self.log_likelihood() + self.log_prior
        log_odds = log_odds - log_odds.gather(1, best)  # the best one's are zero
        self.active &= log_odds >= -torch.minimum(*(self._margin(level, best, by) for by in VARIANCES))

    def _margin(self, level: float, best: Tensor, by: Variance) -> Tensor:
        """Return how far below the best class a class has to be for `drop`, nats, shape (B, C)."""
        share = self._share()
        variance, nu, shift = self._variance(lambda r, g: share[r][..., None] * (g - _of(g, best)), by)
        variance, others = variance + shift, self.active.scatter(1, best, False)
        mean = (variance * others).sum(1, keepdim=True) / others.sum(1, keepdim=True).clamp(min=1)
        quantile = student_quantile(SHARE * level, (nu / 2).clamp(min=1))
        return quantile * torch.maximum(variance, mean).sqrt()

    def best(self) -> Tensor:
        """Return the class of the highest posterior among those still in, shape (B,)."""
        own = sum(a * total for a, total in zip(self._share(), self._totals)) + self.log_prior
        return own.masked_fill(~self.active, -torch.inf).argmax(1)

    def log_likelihood(self) -> Tensor:
        """Return L_c, without what is common to all classes, nats, float64, shape (B, C)."""
        best, found = self.best()[:, None], 0.0
        for a, total in zip(self._share(), self._totals):
            found = found + a * total + (a.gather(1, best) - a) * total.gather(1, best)
        return found

    def stderr(self) -> Tensor:
        """Return the standard error of each L_c, shape (B, C)."""
        best, share = self.best()[:, None], self._share()

        def contrast(r: int, g: Tensor) -> Tensor:
            a = share[r]
            return a[..., None] * g + (a.gather(1, best) - a)[..., None] * _of(g, best)

        variance, nu, shift = self._variance(contrast, successive_variance)  # as an estimate of the class alone has it
        return (widened(variance, nu) + shift).sqrt()

    def log_posterior_stderr(self, posterior: Tensor, placed: bool) -> Tensor:
        r"""Return the standard error of each log-posterior, shape (B, C), to first order in the terms' noise.

        .. math:: d \log p_c = dL_c - \sum_k p_k\, dL_k
        """
        share = self._share()

        def contrast(r: int, g: Tensor) -> Tensor:
            p = posterior * self._took_part[r]
            p = p / p.sum(1, keepdim=True).clamp(min=1e-300)
            return share[r][..., None] * (g - (p[:, None] @ g.to(torch.float64)))

        variance, nu, shift = self._variance(contrast)
        if not placed:
            alone = self._variance(lambda r, g: share[r][..., None] * g, successive_variance)[0]
            ratio, draws = variance / alone.clamp(min=1e-300), sum(g.shape[-1] for g in self._terms)
            nu = freedom_of_pairs(nu, ratio, 1.0, draws)
        return (widened(variance, nu) + shift).sqrt()

    def _share(self) -> list[Tensor]:
        """Return a_{c r} of every round, float64, shape (B, C)."""
        spent = [n * took.to(torch.float64) for n, took in zip(self._cost, self._took_part)]
        total = sum(spent)
        return [s / total for s in spent]

    def _variance(
        self, contrast: Callable[[int, Tensor], Tensor], by: Variance = contrast_variance
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the variance of a sum of contrasts over all rounds, and its degrees of freedom, (B, C) each."""
        variance = spread = shift = 0.0
        for r, (g, ends) in enumerate(zip(self._terms, self._ends)):
            c = contrast(r, g)
            of_round, nu = by(c)
            variance = variance + of_round
            spread = spread + of_round.square() / nu
            shift = shift + shift_variance((c * ends).sum(-1))
        return variance, (variance.square() / spread.clamp(min=1e-300)).clamp(min=1.0), shift


def round_sizes(nfe: int) -> list[int]:
    """Return the evaluations per class of each round: each doubles what was spent, the last takes the rest."""
    sizes, left = [], nfe
    while left:
        size = max(FIRST_ROUND, nfe - left)
        sizes.append(size if left - size >= FIRST_ROUND else left)
        left -= sizes[-1]
    return sizes


def _of(g: Tensor, best: Tensor) -> Tensor:
    """Return the terms of one class of every sample, shape (B, 1, N)."""
    return g.gather(1, best[..., None].expand(-1, -1, g.shape[2]))
