r"""Rounds of paired draws: which classes are still in, and what all rounds together say.

Round r gives a term :math:`g_{c s}` to class c and draw s whose sum over s is a whole estimate; every class still in
sees the same noise, so classes are compared by the terms' differences. Rounds are averaged with their evaluations as
weights. A class that was dropped keeps the rounds in which it took part: its log-likelihood is that of the best class
plus their paired difference over these rounds,

.. math:: L_c = \sum_r \big[ a_{c r}\, S_{c r} + (a_{b r} - a_{c r})\, S_{b r} \big], \qquad S_{c r} = \sum_s g_{c s}

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

from ..estimator.statistics import student_quantile, successive_variance, widened

# Evaluations per class; with fewer the nodes are so far apart that their own error decides.
FIRST_ROUND = 32


@dataclass(frozen=True)
class Classification:
    """The result of `DiffusionClassifier.classify`, for B samples and C classes.

    Attributes:
        log_likelihood: log p(x | y), nats, shape (B, C); with weighting "uniform" minus the mean squared error.
        stderr: its standard error, shape (B, C). Differences between classes are far more accurate than that.
        log_posterior: log p(y | x), shape (B, C).
        log_posterior_stderr: its standard error, from paired differences, shape (B, C).
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
        """Return the k highest posteriors p(y | x) in descending order and their classes, shape (B, k) each."""
        log_posterior, classes = self.log_posterior.topk(k, dim=1)
        return log_posterior.exp(), classes

    def __repr__(self) -> str:
        samples, classes = self.active.shape
        return (
            f"Classification({samples} samples, {classes} classes, {float(self.nfe.double().mean()):.0f} evaluations "
            f"per sample, {float(self.decided.double().mean()):.1%} decided)"
        )


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
        self._terms: list[Tensor] = []  # one round each, (B, C, N), zero where a class took no part
        self._cost: list[int] = []
        self._took_part: list[Tensor] = []

    def result(self, common: Tensor, dtype: torch.dtype) -> Classification:
        """Return what all rounds say; `common` (B,) is the part of the log-likelihood that all classes share."""
        log_likelihood = self.log_likelihood()
        log_posterior = (log_likelihood + self.log_prior).log_softmax(1)
        return Classification(
            log_likelihood=(log_likelihood + common[:, None]).to(dtype),
            stderr=self.stderr().to(dtype),
            log_posterior=log_posterior.to(dtype),
            log_posterior_stderr=self.log_posterior_stderr(log_posterior.exp()).to(dtype),
            prediction=self.best(),
            active=self.active,
            nfe=self.nfe,
        )

    def open(self) -> Tensor:
        """Return what the next round has to evaluate: (sample, class) in rows, shape (P, 2)."""
        return (self.active & (self.active.sum(1, keepdim=True) > 1)).nonzero()

    def add(self, pairs: Tensor, terms: Tensor, nfe: int) -> None:
        """Add a round: the terms (P, N) of these (sample, class) pairs, at `nfe` evaluations a pair."""
        filled = terms.new_zeros(*self.active.shape, terms.shape[1])
        took_part = torch.zeros_like(self.active)
        filled[pairs[:, 0], pairs[:, 1]] = terms
        took_part[pairs[:, 0], pairs[:, 1]] = True
        self._terms.append(filled)
        self._took_part.append(took_part)
        self._cost.append(nfe)
        self.nfe += nfe * took_part.sum(1)

    def drop(self, level: float) -> None:
        """Drop every class whose posterior is below the best one's, each at a one-sided error of `level`.

        Differences are skewed: without one of their rare large terms both they and their variance are small, and plain
        Student's t would drop the best of two near classes three times as often as stated. Hence half of the degrees
        of freedom, and a variance that is at least the mean of the sample's differences.
        """
        best = self.best()[:, None]
        share, log_odds = self._share(), self.log_likelihood() + self.log_prior
        log_odds = log_odds - log_odds.gather(1, best)
        variance, nu = self._variance(lambda r, g: share[r][..., None] * (g - _of(g, best)))
        others = self.active.scatter(1, best, False)
        mean = (variance * others).sum(1, keepdim=True) / others.sum(1, keepdim=True).clamp(min=1)
        spread = torch.maximum(variance, mean).sqrt()
        self.active &= log_odds >= -student_quantile(level, (nu / 2).clamp(min=1)) * spread  # the best one's are zero

    def best(self) -> Tensor:
        """Return the class of the highest posterior among those still in, shape (B,)."""
        share = self._share()
        own = sum(a * g.sum(2, dtype=torch.float64) for a, g in zip(share, self._terms)) + self.log_prior
        return own.masked_fill(~self.active, -torch.inf).argmax(1)

    def log_likelihood(self) -> Tensor:
        """Return L_c, without what is common to all classes, nats, float64, shape (B, C)."""
        best, share, total = self.best()[:, None], self._share(), 0.0
        for a, g in zip(share, self._terms):
            own = g.sum(2, dtype=torch.float64)
            total = total + a * own + (a.gather(1, best) - a) * own.gather(1, best)
        return total

    def stderr(self) -> Tensor:
        """Return the standard error of each L_c, shape (B, C)."""
        best, share = self.best()[:, None], self._share()

        def contrast(r: int, g: Tensor) -> Tensor:
            a = share[r]
            return a[..., None] * g + (a.gather(1, best) - a)[..., None] * _of(g, best)

        return widened(*self._variance(contrast)).sqrt()

    def log_posterior_stderr(self, posterior: Tensor) -> Tensor:
        r"""Return the standard error of each log-posterior, shape (B, C), to first order in the terms' noise.

        .. math:: d \log p_c = dL_c - \sum_k p_k\, dL_k
        """
        share = self._share()

        def contrast(r: int, g: Tensor) -> Tensor:
            p = posterior * self._took_part[r]
            p = p / p.sum(1, keepdim=True).clamp(min=1e-300)
            return share[r][..., None] * (g - (p[:, None] @ g.to(torch.float64)))

        return widened(*self._variance(contrast)).sqrt()

    def _share(self) -> list[Tensor]:
        """Return a_{c r} of every round, float64, shape (B, C)."""
        spent = [n * took.to(torch.float64) for n, took in zip(self._cost, self._took_part)]
        total = sum(spent)
        return [s / total for s in spent]

    def _variance(self, contrast: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return the variance of a sum of contrasts over all rounds, and its degrees of freedom, (B, C) each."""
        variance = spread = 0.0
        for r, g in enumerate(self._terms):
            of_round, nu = successive_variance(contrast(r, g))
            variance = variance + of_round
            spread = spread + of_round.square() / nu
        return variance, (variance.square() / spread.clamp(min=1e-300)).clamp(min=1.0)


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
