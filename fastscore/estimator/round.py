"""A round of draws: what it says of some samples, and how further ones are averaged in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .curve import CurveSum


class Numbers(NamedTuple):
    """Log-density and standard error in the dtype of the data, (2, B), and the variance that means add up, (B,)."""

    told: Tensor
    variance: Tensor

    def copy(self) -> Numbers:
        return Numbers(self.told.clone(), self.variance.clone())


@dataclass
class Round:
    """What one set of draws says of some samples.

    It says value, variances, jump, evaluations, ends, the error of a table's rule with the variance of this, curve, and
    the offset to the integral.

    Of the variances, (2, B), the first is wide enough for intervals of single samples, the second is that of means,
    without the error of the nodes' shift, which `jump` says; see `fastscore.estimator.statistics`.
    `numbers` are there where a kernel has written them together with the rest.
    """

    value: Tensor
    variance: Tensor
    jump: Tensor
    nfe: Tensor
    ends: Tensor
    rule_error: Tensor
    curve_sum: CurveSum
    offset: float | Tensor
    block: Tensor
    numbers: Numbers | None = None

    @classmethod
    def empty(cls, samples: int, draws: int, nfe: int, device: torch.device) -> Round:
        block = torch.zeros(20 * samples + 2 * draws, dtype=torch.float64, device=device)
        log_snr = torch.zeros(draws, dtype=torch.float64, device="cpu")
        return cls._of(block, torch.full((samples,), nfe, dtype=torch.int64, device=device), log_snr, 0, 0.0)

    @classmethod
    def _of(cls, block: Tensor, nfe: Tensor, log_snr: Tensor, count: int, offset: float | Tensor) -> Round:
        """Return a round whose numbers lie in one block, so that one copy takes them all."""
        samples, draws = len(nfe), len(log_snr)
        sizes = [samples, 2 * samples, samples, 14 * samples, 2 * samples, draws, draws]
        value, variance, jump, at_ends, of_rule, *sums = block.split(sizes)
        curve_sum, at_ends = CurveSum(log_snr, *sums, count), at_ends.view(samples, 2, 7)
        of_rule = of_rule.view(samples, 2)
        return cls(value, variance.view(2, samples), jump, nfe, at_ends, of_rule, curve_sum, offset, block)

    def copy(self, log_snr: Tensor) -> Round:
        """Return the same in other memory, with draws at these log-SNRs."""
        count = self.curve_sum.count
        return Round._of(self.block.clone(), self.nfe.clone(), count * log_snr, count, self.offset)

    def above(self, target: float, most: int) -> Tensor:
        """Return which samples have a larger standard error than `target`, and may spend as much again."""
        return ((self.variance[0].sqrt() > target) & (2 * self.nfe <= most)).nonzero().flatten()

    def average(self, chosen: Tensor, extra: Round) -> None:
        """Take a further round of some samples in: rounds are averaged with their evaluations as weights.

        Shifts of two rounds are independent; their jumps are added as if they were one, which is at least the error.
        """
        share = extra.nfe / (self.nfe[chosen] + extra.nfe)
        self.value[chosen] += share * (extra.value - self.value[chosen])
        self.jump[chosen] += share * (extra.jump - self.jump[chosen])
        self.variance[:, chosen] = (1 - share) ** 2 * self.variance[:, chosen] + share**2 * extra.variance
        own, (error, noise) = self.rule_error[chosen], extra.rule_error.unbind(1)
        error = own[:, 0] + share * (error - own[:, 0])
        self.rule_error[chosen] = torch.stack([error, (1 - share) ** 2 * own[:, 1] + share**2 * noise], 1)
        self.nfe[chosen] += extra.nfe
        self.numbers = None
