"""Who evaluates the rounds of an estimate, and reports what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..program.row_program import RowProgram
from ..reference.gaussians import Reference
from ..support.warn import warn
from .calibration import uncalibrated
from .estimate import Estimate
from .faults import Faults
from .methods import Method
from .network import Network
from .nodes import FittedNodes
from .plan import Plan
from .planner import Wanted
from .round import Numbers, Round
from .rows import Draws
from .samples import Samples, deferred
from .summary import Summary, with_rounding
from .trapezoids import fault_of

MIDDLE = 1 << 63  # of the seeds' 64 bits, which int64 has with a sign


@dataclass(frozen=True)
class Estimator:
    """Evaluates rounds by one method, with a density's network, reference and nodes, and reports what they say."""

    network: Network
    reference: Reference
    nodes: FittedNodes
    programs: tuple[RowProgram | None, ...]
    method: Method

    def evaluate(self, samples: Samples, plan: Plan, advance: Callable[[int], object]) -> Round:
        """Evaluate the draws of a plan; `advance` is told of every chunk's samples."""
        draws, network = plan.draws, self.network
        reference, nfe = self.method.control_variate(self.reference), draws.rules.nfe
        calibration = calibration_of(self.nodes, samples, draws)
        says = Summary(self.method, reference, network.schedule, self.nodes, calibration, nfe, network.backend)
        found = Round.empty(len(samples), len(draws), nfe, samples.device)
        for part in plan.run(samples, self.programs, reference, not deferred(samples.device)):
            says.put(part, samples, found)
            advance(len(part.f))
        return found

    def numbers(self, found: Round, samples: Samples) -> Numbers:
        """Return what rounds say, with the rounding of the data's dtype."""
        if found.numbers is not None:
            return found.numbers
        variance = with_rounding(found.variance, found.value, samples, self.nodes.log_snr_range)
        told = torch.stack([found.value, variance[0].sqrt()]).to(samples.x.dtype)
        return Numbers(told, variance[1])

    def report(self, found: Round, samples: Samples, wanted: Wanted, numbers: Numbers | None = None) -> Estimate:
        """Return the estimate of all rounds; its curve and its offset are those of the first."""
        told, variance = numbers or self.numbers(found, samples)
        table = self.method.by_trapezoids(self.network.schedule)
        if table is not None and (fault := fault_of(table)):
            warn(fault)
        return Estimate(
            log_prob=told[0],
            stderr=told[1],
            variance=variance,
            jump=found.jump,
            nfe=found.nfe,
            curve_sum=found.curve_sum,
            dims=samples.dims,
            method=self.method.name,
            noise=wanted.noise,
            control=wanted.control,
            seed=torch.full_like(samples.index, (wanted.seed + MIDDLE) % (2 * MIDDLE) - MIDDLE),
            sample_index=samples.index,
            ends=found.ends,
            rule_error=found.rule_error,
            offset=found.offset,
            table=table,
            faults=Faults(samples, found.value, found.curve_sum, self.reference) if deferred(samples.device) else None,
        )


def calibration_of(nodes: FittedNodes, samples: Samples, draws: Draws) -> Tensor:
    """Return the calibration of the error bars of some draws: what `fit` measured on whole samples, or none."""
    measured = draws.noise == "sobol" and samples.mask is None
    return nodes.calibration if measured else uncalibrated()
