"""How many steps the ODE's path is cut into: a number that the caller gives, or twice as many until it is enough.

An answer is a number where it is finite and, of "auto", where it settles as the steps shrink. Where moves halve, the
last one is at least what is left, by the geometric series. Moves that no longer do are of roundings, as far as they are
small; large ones count only where they have halved twice, which may be chance once. Any other answer is NaN: nothing is
known of how far off it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..estimator.samples import deferred
from ..estimator.statistics import student_quantile
from .flow_field import kinds
from .flow_frame import Course
from .flow_path import Flow

FIRST_STEPS, MAX_STEPS = 4, 2048  # of "auto"
STUDENT = {2: 12.71, 3: 4.30}  # the 97.5 % quantile for few probes, where its expansion fails
ROUNDED = 1.0  # nats: larger moves are none of roundings, but of a path that the grid does not follow yet

Chosen = slice | Tensor


class Solved(NamedTuple):
    """Log-densities (B, columns), where paths end, evaluations, error of the grid; the first again with its graph.

    Log-densities without a number are NaN in all columns. `again` takes the flow of some of the samples, and which.
    `beyond` is the truncation, where it came with the path.
    """

    log_prob: Tensor
    end: Tensor
    nfe: Tensor
    discretization: Tensor
    again: Callable[[Flow, Chosen], Tensor]
    beyond: Tensor | None = None


def once(solver: Callable[[Flow], Course], flow: Flow, fixed: bool = True) -> Solved:
    """Solve once, with an error that nobody knows; `fixed` says that the grid does not depend on the answer.

    Raises:
        ValueError: where the answer of no sample is finite.
    """
    found = solver(flow)
    if not deferred(found.log_prob.device):
        _refuse_not_finite(found.log_prob)
    unknown = torch.full_like(found.log_prob[:, 0], math.nan)

    def again(flow: Flow, chosen: Chosen) -> Tensor:
        if not fixed:
            raise ValueError(
                "a solver that chooses its own steps has no gradient here, since the steps would have one too; use "
                "method='auto', 'midpoint', or a fixed grid such as method='rk4' with steps"
            )
        return solver(flow).log_prob

    nfe = torch.full_like(unknown, found.nfe, dtype=torch.int64)
    return Solved(_or_nan(found.log_prob), found.end, nfe, unknown, again, found.beyond)


def doubling(flow: Flow, error: float, share: float = 0.0) -> Solved:
    """Double the steps of the samples whose answer still moves by more than `error`, up to `MAX_STEPS`.

    A larger move is enough where it is below a `share` of the standard error that the probes of the trace leave.

    The rule is of second order, so a third of the last move is what is left, and is taken off the answer. The whole
    move is the estimate of its error, or a quarter of the move before, if that is larger: two coarse grids may agree
    by chance.

    Raises:
        ValueError: where no sample has an answer.
    """
    steps, device = FIRST_STEPS, flow.samples.device
    on_host = torch.arange(len(flow.samples), device="cpu")
    active = torch.arange(len(on_host), device=device)
    coarse, end, calls, _ = flow.midpoint(steps)
    log_prob, spent, finest = coarse.clone(), torch.full_like(active, calls), torch.full_like(active, steps)
    move, before, earlier = torch.full((3, len(active)), math.inf, dtype=coarse.dtype, device=coarse.device)
    discretization = move
    while len(active) and steps < MAX_STEPS:
        steps *= 2
        some = flow if len(active) == len(flow.samples) else flow.select(active, on_host)
        fine, end[active], calls, _ = some.midpoint(steps)
        moved = (fine - coarse[active]).mean(1).abs()
        earlier[active], before[active], move[active] = before[active], move[active], moved
        log_prob[active], coarse[active] = _extrapolated(fine, coarse[active]), fine
        spent[active], finest[active] = spent[active] + calls, steps
        discretization = torch.maximum(move, before / 4)
        wanted = enough(error, share, standard_error(some, fine)) if share else error
        moving = on_host[~(discretization[active] <= wanted).cpu()]  # the one question to the device
        if len(moving) < len(on_host):
            on_host, active = moving, moving.to(device)
    if len(active):
        discretization[active] = _left(move[active], before[active], earlier[active])
        log_prob[active] = torch.where(discretization[active, None] < math.inf, log_prob[active], math.nan)
        if bool(log_prob.isnan().all()):
            _refuse_not_finite(coarse)
            raise ValueError(
                f"error={error:g} nats is not reached with {MAX_STEPS} steps by any of {len(log_prob)} samples, and no "
                "answer settles: the last steps still move each by more than a nat; check the scale of the data, fit "
                "the density to them, or give float64 data"
            )
    return Solved(log_prob, end, spent, discretization, lambda flow, chosen: _on_two_grids(flow, finest[chosen]))


def standard_error(flow: Flow, log_prob: Tensor) -> Tensor:
    """Return the standard error of the mean over probes, (B, columns) -> (B,), as wide as Student's t has it.

    It is 0 where the trace is exact, and NaN for a single probe.
    """
    n = flow.probes
    if flow.trace == "exact" or n == kinds(flow.samples.x.shape[1]):
        return torch.zeros_like(log_prob[:, 0])
    if n == 1:
        return torch.full_like(log_prob[:, 0], math.nan)
    quantile = STUDENT.get(n) or float(student_quantile(0.025, torch.tensor(n - 1.0, device="cpu")))
    return log_prob.std(1) * (quantile / 1.96 / n**0.5)


def enough(error: float, share: float, stderr: Tensor) -> Tensor:
    """Return how far off each sample's grid may leave its answer, nats, (B,), given the probes' standard error."""
    return (share * stderr.nan_to_num(0.0)).clamp(min=error)


def _left(move: Tensor, before: Tensor, earlier: Tensor) -> Tensor:
    """Return an estimate of the error that is left after three moves, (B,); infinite where they tell nothing of it."""
    halved, halved_before, small = move <= before / 2, before <= earlier / 2, torch.maximum(move, before) <= ROUNDED
    by_halving = torch.where(halved, torch.maximum(move, before / 4), torch.maximum(move, before))
    return torch.where(small | (halved & halved_before), by_halving, math.inf)  # no comparison holds for NaN


def _on_two_grids(flow: Flow, steps: Tensor) -> Tensor:
    """Return the answer of `doubling`, which ended at these steps of each sample, (B,)."""
    order, found = [], []
    for count in steps.unique().tolist():
        chosen = (steps == count).nonzero().flatten()
        part = flow.select(chosen)
        order.append(chosen)
        found.append(_extrapolated(part.midpoint(count).log_prob, part.midpoint(count // 2).log_prob))
    return torch.cat(found)[torch.cat(order).argsort()]


def _extrapolated(fine: Tensor, coarse: Tensor) -> Tensor:
    """Return what steps of length zero would give, of a rule of second order."""
    return fine + (fine - coarse) / 3


def _or_nan(log_prob: Tensor) -> Tensor:
    return log_prob + 0 * log_prob.sum(1, keepdim=True)  # NaN where one of a sample's columns is not finite


def _refuse_not_finite(log_prob: Tensor) -> None:
    """Raise ValueError where no sample's answer is finite."""
    if not bool(torch.isfinite(log_prob).all(1).any()):
        raise ValueError(f"the ODE gives NaN or inf for all of {len(log_prob)} samples: {not_finite(log_prob)}")


def not_finite(log_prob: Tensor) -> str:
    """Return why an answer is NaN or inf, and what to do."""
    return (
        f"the network returned them, or the path left the range of {log_prob.dtype}; check its weights and the scale "
        "of the data, use more steps, or float64 data"
    )
