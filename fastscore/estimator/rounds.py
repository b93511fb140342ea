"""Rounds of draws: what one says of some samples, and how further ones are averaged in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..program.row_program import RowProgram
from ..reference.gaussians import Reference
from .calibration import calibrated, uncalibrated
from .curve import CurveSum, ends
from .estimate import Estimate
from .faults import Faults
from .methods import base, control_variate
from .network import Network
from .nodes import FittedNodes
from .plan import Plan
from .rows import Draws
from .rules import method_table
from .samples import Samples, deferred
from .statistics import Spread, draw_sum


@dataclass
class Round:
    """What one set of draws says of some samples: value, variances, evaluations, ends, curve, offset to the integral.

    Of the variances, (2, B), the first is wide enough for intervals of single samples, the second is that of means.
    """

    value: Tensor
    variance: Tensor
    nfe: Tensor
    ends: Tensor
    curve_sum: CurveSum
    offset: float | Tensor
    block: Tensor

    @classmethod
    def empty(cls, samples: int, draws: int, device: torch.device) -> Round:
        block = torch.zeros(17 * samples + 2 * draws, dtype=torch.float64, device=device)
        log_snr = torch.zeros(draws, dtype=torch.float64, device="cpu")
        return cls._of(block, torch.empty(samples, dtype=torch.int64, device=device), log_snr, 0, 0.0)

    @classmethod
    def _of(cls, block: Tensor, nfe: Tensor, log_snr: Tensor, count: int, offset: float | Tensor) -> Round:
        """Return a round whose numbers lie in one block, so that one copy takes them all."""
        samples, draws = len(nfe), len(log_snr)
        value, variance, at_ends, total, squares = block.split([samples, 2 * samples, 14 * samples, draws, draws])
        curve_sum = CurveSum(log_snr, total, squares, count)
        return cls(value, variance.view(2, samples), nfe, at_ends.view(samples, 2, 7), curve_sum, offset, block)

    def copy(self, log_snr: Tensor) -> Round:
        """Return the same in other memory, with draws at these log-SNRs."""
        count = self.curve_sum.count
        return Round._of(self.block.clone(), self.nfe.clone(), count * log_snr, count, self.offset)

    def above(self, target: float, most: int) -> Tensor:
        """Return which samples have a larger standard error than `target`, and may spend as much again."""
        return ((self.variance[0].sqrt() > target) & (2 * self.nfe <= most)).nonzero().flatten()

    def average(self, chosen: Tensor, extra: Round) -> None:
        """Take a further round of some samples in: rounds are averaged with their evaluations as weights."""
        share = extra.nfe / (self.nfe[chosen] + extra.nfe)
        self.value[chosen] += share * (extra.value - self.value[chosen])
        self.variance[:, chosen] = (1 - share) ** 2 * self.variance[:, chosen] + share**2 * extra.variance
        self.nfe[chosen] += extra.nfe


class Numbers(NamedTuple):
    """Log-density and standard error in the dtype of the data, (2, B), and the variance that means add up, (B,)."""

    told: Tensor
    variance: Tensor

    def copy(self) -> Numbers:
        return Numbers(self.told.clone(), self.variance.clone())


@dataclass(frozen=True)
class Estimator:
    """Evaluates rounds by one method, with a density's network, reference and nodes, and reports what they say."""

    network: Network
    reference: Reference
    nodes: FittedNodes
    programs: tuple[RowProgram | None, ...]
    method: str

    def evaluate(self, samples: Samples, plan: Plan, advance: Callable[[int], object]) -> Round:
        """Evaluate the draws of a plan; `advance` is told of every chunk's samples."""
        method, schedule, draws = self.method, self.network.schedule, plan.draws
        reference = control_variate(method, self.reference)
        calibration = calibration_of(self.nodes, samples, draws)
        found = Round.empty(len(samples), len(draws), samples.device)
        for part in plan.run(samples, self.programs, reference, not deferred(samples.device)):
            chosen, rule, f = part.samples, part.rule, part.block(part.f)
            x, mask = samples.entries(chosen)
            value = base(method, reference, x, schedule, mask) + part.flat(draw_sum(f, rule))
            found.value[chosen], found.nfe[chosen] = value, rule.nfe
            spread = Spread.of(f, rule, x.shape[1] if mask is None else part.block(mask.sum(1)))
            found.variance[:, chosen] = calibrated(Spread(*map(part.flat, spread)), draws.rules.nfe, calibration)
            found.ends[chosen] = part.flat(ends(f, part.ends, self.nodes.slowest_decay))
            found.curve_sum.add(part.f, rule.log_snr)
            if method != "density":
                integral = part.flat(draw_sum(f, rule, density=True))
                integral += base("density", reference, x, schedule, mask)
                found.offset = found.offset + (value - integral).sum() / len(samples)
            advance(len(chosen))
        return found

    def numbers(self, found: Round, samples: Samples) -> Numbers:
        """Return what rounds say, with the rounding of the data's dtype."""
        variance = with_rounding(found.variance, found.value, samples, self.nodes.log_snr_range)
        told = torch.stack([found.value, variance[0].sqrt()]).to(samples.x.dtype)
        return Numbers(told, variance[1])

    def report(self, found: Round, samples: Samples, noise: str, numbers: Numbers | None = None) -> Estimate:
        """Return the estimate of all rounds; its curve and its offset are those of the first."""
        told, variance = numbers or self.numbers(found, samples)
        by_trapezoids = self.method == "density" and self.network.schedule.discrete
        return Estimate(
            log_prob=told[0],
            stderr=told[1],
            variance=variance,
            nfe=found.nfe,
            curve_sum=found.curve_sum,
            dims=samples.dims,
            method=self.method,
            noise=noise,
            group=samples.group,
            ends=found.ends,
            offset=found.offset,
            table=method_table(self.network.schedule)[1] if by_trapezoids else None,
            faults=Faults(samples, found.value, found.curve_sum) if deferred(samples.device) else None,
        )


def calibration_of(nodes: FittedNodes, samples: Samples, draws: Draws) -> Tensor:
    """Return the calibration of the error bars of some draws: what `fit` measured on whole samples, or none."""
    measured = draws.noise == "sobol" and samples.mask is None
    return nodes.calibration if measured else uncalibrated()


def with_rounding(variance: Tensor, log_prob: Tensor, samples: Samples, log_snr_range: tuple[float, float]) -> Tensor:
    """Return variances with the rounding of the sums: of log p itself, and of a row's two norms of size d."""
    lo, hi = log_snr_range
    size = log_prob.abs() + 0.25 * (hi - lo) * samples.dims
    return variance + (torch.finfo(samples.x.dtype).eps * size).square()
