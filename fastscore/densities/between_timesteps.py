"""A table's density on the continuous process through it, if its network answers between the timesteps.

Most networks turn the timestep into waves, and answer at 12.5 as smoothly as at 12 and 13. Some look it up in a table,
round it, or turn it into waves faster than a step. So each is asked at whole timesteps and half way between them, on
the same x_t: half way, the answer must lie near the middle of its neighbours'. Over all places, waves of one radian a
step, the fastest that are in use, are off by an eighth of the neighbours' distance, networks that round by half of it.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from ..density import ScoreDensity
from ..estimator.samples import Samples
from ..process.network import predict
from ..process.table_twin import ContinuousDDPM
from ..process.taken_dtype import model_dtype
from ..support.untouched import uncompiled

FRACTION = "; round it first"  # the remedy of a table, which is none here
PLACES = 9  # of the table, from end to end
ROWS = 8
OFF = 0.35  # most distance from the middle of the neighbours, in units of theirs
ROUNDINGS = 32  # of the network's dtype

_SMOOTH: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def between_timesteps(density: ScoreDensity, samples: Samples) -> ScoreDensity:
    """Return the density of the same network and reference on `ContinuousDDPM`; a network that has passed is not asked.

    Raises:
        ValueError: if the network does not answer between timesteps.
    """
    own = density.time_dtype
    twin = ScoreDensity(
        density.model,
        ContinuousDDPM(density.schedule),
        density.predicts,
        reference=density.reference,
        time_dtype=own if own is None or own.is_floating_point else None,
    )
    # Programs know this network at times of both dtypes, and graphs what they depend on.
    twin._programs, twin.flows = density._programs, density.flows
    if density.model not in _SMOOTH:
        with uncompiled():
            _check(density, twin, samples)
        _SMOOTH.add(density.model)
    return twin


@torch.no_grad()
def _check(density: ScoreDensity, twin: ScoreDensity, samples: Samples) -> None:
    rows = samples.select(torch.arange(ROWS, device=samples.device) % len(samples))
    noise = torch.randn(rows.x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(rows.x)
    rounding = ROUNDINGS * torch.finfo(model_dtype(density.model, rows.x.dtype)).eps
    off = apart = size = 0.0
    for i in torch.linspace(0, density.schedule.time_range[1] - 1, PLACES, device="cpu").long().unique().tolist():
        alpha, sigma = (v.to(rows.x) for v in twin.schedule.alpha_sigma(torch.tensor(i + 0.5, device="cpu")))
        x_t = alpha * rows.x + sigma * noise
        x_t = x_t if rows.mask is None else torch.where(rows.mask, x_t, rows.x)
        before, after = (_answer(density, rows, x_t, k) for k in (i, i + 1))
        try:
            as_fraction, half = (_answer(twin, rows, x_t, float(k)) for k in (i, i + 0.5))
        except ValueError as problem:
            reason = str(problem).removesuffix(FRACTION)
            if reason != str(problem):
                reason += " (where the network itself asks it, fs.ContinuousDDPM of the same table answers at any time)"
            raise ValueError(_refusal(density, reason)) from problem
        if not bool(torch.isfinite(before).all()):
            raise ValueError(f"the network returned NaN or inf at t = {i}; check its weights and the scale of the data")
        if not bool((as_fraction - before).norm() <= rounding * before.norm()):
            raise ValueError(_refusal(density, f"it answers otherwise to t = {i}.0 than to the integer {i}"))
        off += float((half - (before + after) / 2).square().sum())
        apart += float((after - before).square().sum())
        size += float(before.square().sum())
    if not off**0.5 <= OFF * apart**0.5 + rounding * size**0.5:
        reason = (
            f"half way between neighbours its answers are {(off / apart) ** 0.5:.2g} of their distance off the middle, "
            "as of one that rounds its time, or turns it into waves faster than a step"
        )
        raise ValueError(_refusal(density, reason))


def _answer(density: ScoreDensity, rows: Samples, x_t: Tensor, t: float) -> Tensor:
    """Return what a network says of rows at one time, (B, d): an int stays an integer, as a table's own time."""
    time = torch.tensor([t], device="cpu").to(x_t.device)
    return predict(density.model, x_t[:, None], time, rows.conds[0], rows.shape, density.time_dtype).double()


def _refusal(density: ScoreDensity, reason: str) -> str:
    return (
        f"the ODE asks between the timesteps of {density.schedule!r}, and the network does not answer there: {reason}; "
        "use estimate, which asks at whole timesteps alone"
    )
