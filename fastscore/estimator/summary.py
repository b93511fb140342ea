"""What evaluated draws say of their samples, put into a round: in one launch with Triton's kernels, else by torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.select import implementation, runnable
from ..process.schedules import Schedule
from ..reference.gaussians import Reference
from ..reference.picking import Picked
from . import self_fit
from .calibration import calibrated, constants
from .curve import ends
from .methods import DENSITY, Method
from .nodes import FittedNodes
from .part import Part
from .round import Numbers, Round
from .samples import Samples
from .statistics import EXPECTED, FEWEST_BENDS, KNOWN, SelfFitted, Spread, draw_sum
from .trapezoids import error_of_rule


@dataclass(frozen=True)
class Summary:
    """How the draws of an estimate are summed up.

    Arguments:
        method: what the value is, see `fastscore.estimator.methods`, with its reference and the schedule.
        nodes: which say how fast the integrand decays beyond the ends.
        calibration: of the error bars.
        nfe: evaluations per sample.
        backend: that was asked for.
    """

    method: Method
    reference: Reference
    schedule: Schedule
    nodes: FittedNodes
    calibration: Tensor
    nfe: int
    backend: str

    def put(self, part: Part, samples: Samples, found: Round) -> None:
        """Put what a part of the samples has shown into their places of a round."""
        x = samples.x
        by_kernel = runnable(x.device, x.dtype, self.backend)[0] != "torch"
        own = isinstance(self.reference, Picked)
        if by_kernel and not own and self.method is DENSITY and samples.mask is None:
            self._by_kernel(part, samples, found)
        else:
            self._by_torch(part, samples, found)

    def _by_torch(self, part: Part, samples: Samples, found: Round) -> None:
        chosen, rule, flat = part.samples, part.rule, part.f.to(torch.float64)
        f = part.block(flat)
        x, mask = samples.entries(chosen)
        value = self.method.base(self.reference, x, self.schedule, mask) + part.flat(draw_sum(f, rule))
        found.value[chosen] = value
        own = self._of_own_draws(f.shape[-1]) if isinstance(self.reference, Picked) else None
        spread = Spread.of(f, rule, x.shape[1] if mask is None else part.block(mask.sum(1)), own)
        spread = Spread(*map(part.flat, spread))
        found.variance[:, chosen], found.jump[chosen] = calibrated(spread, self.nfe, self.calibration), spread.jump
        found.ends[chosen] = part.flat(ends(f, part.ends, self.nodes.slowest_decay))
        found.curve_sum.add(flat, rule.log_snr)
        if rule.trapezoids.error.numel():
            found.rule_error[chosen] = part.flat(error_of_rule(f, rule.curve, rule.trapezoids))
        if self.method is not DENSITY:
            integral = part.flat(draw_sum(f, rule, density=True))
            integral += DENSITY.base(self.reference, x, self.schedule, mask)
            found.offset = found.offset + (value - integral).sum() / len(samples)
            found.rule_error[chosen, 0] = (value - integral).detach()

    def _of_own_draws(self, draws: int) -> SelfFitted:
        # By their number alone: the draws' own log-SNRs depend on their group's shift, and a stack has several.
        coarse = round(draws * self.nodes.own_coarse)
        missed = float(self.nodes.own_missed) / draws
        return SelfFitted(self_fit.inflation(draws, self.nodes.log_snr_range), coarse, missed)

    def _by_kernel(self, part: Part, samples: Samples, found: Round) -> None:
        x, rule, q = samples.x, part.rule, self.reference
        if found.numbers is None:
            told = torch.empty(2, len(x), dtype=x.dtype, device=x.device)
            found.numbers = Numbers(told, torch.empty(len(x), dtype=torch.float64, device=x.device))
        one = q.components == 1 and q.along_axes
        outside = (q.mean[0], q.variance[0]) if one else q.log_prob(x[part.samples])
        rounding = _rounding(samples, self.nodes.log_snr_range)
        measured, known = constants(self.nfe, self.calibration), (KNOWN, EXPECTED, FEWEST_BENDS)
        curve, rows = found.curve_sum, len(part.f)
        first = found.block[-2 * part.f.shape[1] :].view(2, -1) if curve.count == 0 else None
        kernels = implementation("triton")
        sums = kernels.summary(
            part.f,
            part.samples,
            None if part.stack is None else part.stack.group,
            x,
            outside,
            (rule.weight, rule.remainder, rule.curve, rule.even, rule.ends, *rule.trapezoids, *part.ends),
            kernels.Bars(measured is not None, *(measured or (0.0, 0.0, 0.0, 0.0, 1.0)), *known, *rounding),
            self.nodes.slowest_decay,
            (found.value, found.variance, found.jump, found.ends, *found.numbers, found.rule_error),
            first,
        )
        if first is None:
            curve.add_sums(*sums, rows, rule.log_snr)
        else:
            curve.count_in(rows, rule.log_snr)


def with_rounding(variance: Tensor, log_prob: Tensor, samples: Samples, log_snr_range: tuple[float, float]) -> Tensor:
    """Return variances with the rounding of the sums: of log p itself, and of a row's two norms of size d."""
    eps, norms = _rounding(samples, log_snr_range)
    return variance + (eps * (log_prob.abs() + norms)).square()


def _rounding(samples: Samples, log_snr_range: tuple[float, float]) -> tuple[float, float | Tensor]:
    """Return the relative rounding of the sums, and the size of the norms that it comes from."""
    lo, hi = log_snr_range
    return torch.finfo(samples.x.dtype).eps, 0.25 * (hi - lo) * samples.dims
