"""A schedule says the same in several ways; one whose answers contradict each other gives wrong numbers without a word.

An estimate places its nodes on log-SNR, asks `time` for the network's time there, noises the data with `alpha_sigma` of
that time (which asks `scale`, unless it was overridden), counts the answer at the log-SNR, and of a flow asks
`derivatives`. A class of a user's may override each of these alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..process.schedules import LogSNR, Schedule
from ..process.settings import is_ours
from ..support.host import as_float64
from ..support.warn import warn
from .methods import table_of

INNER, NO_INVERSE = 9, 0.1  # places where a schedule is asked; of log-SNR, beyond what rounding or bisection makes
OTHER = 1e-3  # of log-SNR, between two formulas at one time; what rounding makes is added
ROUNDINGS = 16  # of an alpha or sigma, at most, in what is left of 1 where the other is subtracted from it
OTHER_SLOPE, STEP = 0.1, 1e-3  # of the larger derivative; of the distance to the next place


@torch.no_grad()
def refuse_contradictions(schedule: Schedule, ends: tuple[float, float], predicts: str) -> None:
    """Raise ValueError for a schedule whose methods contradict each other inside of its range of log-SNR.

    A log-SNR of another base, such as log(alpha / sigma), from which `scale` makes alpha and sigma, contradicts nothing
    but the network; it is warned of where the class extends one of ours.

    Arguments:
        ends: of log-SNR, from the noisy one to the clean one; a table is asked at its entries.
        predicts: "flow" needs derivatives, which a table does not have.
    """
    time = _times_of_entries(schedule) if schedule.discrete else _times_between(schedule, ends)
    _refuse_other_ratio(schedule, time)
    _warn_if_multiplied(schedule, time)
    if predicts == "flow":
        schedule.derivatives(torch.tensor(schedule.time_range[0], device="cpu"))  # raises for a table
        if type(schedule).derivatives is not Schedule.derivatives:
            _refuse_other_slopes(schedule, time)


def _times_between(schedule: Schedule, ends: tuple[float, float]) -> Tensor:
    """Return the times of places in a range; raise ValueError where time() is not the inverse of log_snr()."""
    wanted = torch.linspace(*ends, INNER + 2, dtype=torch.float64, device="cpu")[1:-1]
    time = schedule.time(wanted)
    _refuse_no_inverse(schedule, wanted, time, NO_INVERSE, "leave its time_range inside of where they agree")
    return time


def _times_of_entries(schedule: Schedule) -> Tensor:
    """Return some timesteps of a table; raise ValueError where it does not fall, or time() does not find an entry."""
    time, entries = table_of(schedule)
    rises = (entries.diff() < 0).nonzero()  # entries that rounding or a limit made equal are right
    if len(rises):
        later, earlier = int(rises[0]), int(rises[0]) + 1  # the table lies noisiest first
        raise ValueError(
            f"log_snr() of {type(schedule).__name__} must not rise from timestep to timestep, got "
            f"{float(entries[earlier]):.6g} then {float(entries[later]):.6g} at timesteps {int(time[earlier])}, "
            f"{int(time[later])}; if the table starts at the noise, flip it"
        )
    some = torch.linspace(0, len(time) - 1, INNER + 2, dtype=torch.float64, device="cpu").round().long().unique()
    wanted = as_float64(entries[some])
    # Of a table the nearest entry is asked for, and at an entry that is itself.
    remedy = "return the nearest timestep, counted from 0"
    _refuse_no_inverse(schedule, wanted, schedule.time(wanted), 1e-6 * (1 + wanted.abs()), remedy)
    return time[some]


def _refuse_no_inverse(
    schedule: Schedule, wanted: Tensor, time: Tensor, tolerance: Tensor | float, remedy: str
) -> None:
    found = as_float64(schedule.log_snr(time))
    worst = _worst((found - wanted).abs(), tolerance)
    if worst is None:
        return
    asked, at, answer = (float(each[worst]) for each in (wanted, time, found))
    raise ValueError(
        f"time() of {type(schedule).__name__} must be the inverse of its log_snr(), got log_snr(time({asked:.4g})) = "
        f"log_snr({at:.6g}) = {answer:.4g}; mend one of the two, or {remedy}"
    )


def _refuse_other_ratio(schedule: Schedule, time: Tensor) -> None:
    """Raise ValueError where alpha and sigma are not those of the log-SNR at the same time, by more than rounding."""
    known = as_float64(schedule.log_snr(time))
    alpha, sigma = schedule.alpha_sigma(time)
    rounding = max(_rounding(each) for each in (alpha, sigma))
    alpha, sigma = (as_float64(each).expand_as(known) for each in (alpha, sigma))
    found = 2 * torch.log(alpha / sigma)
    # Where sigma^2 is taken as 1 - alpha^2, it is known to the rounding of alpha only, and the other way round.
    worst = _worst((found - known).abs(), OTHER + ROUNDINGS * rounding * known.abs().exp())
    if worst is None:
        return
    kind, at = type(schedule), float(time[worst])
    method = "scale" if kind.alpha_sigma is Schedule.alpha_sigma else "alpha_sigma"
    raise ValueError(
        f"{method}() of {kind.__name__} must return alpha and sigma whose log(alpha^2 / sigma^2) is its log_snr(), "
        f"got alpha {float(alpha[worst]):.4g} and sigma {float(sigma[worst]):.4g} at time {at:.6g}, of which that is "
        f"{float(found[worst]):.4g}, and log_snr({at:.6g}) = {float(known[worst]):.4g}; mend one of the two (neither "
        "the squares of alpha and sigma, nor log(alpha / sigma)), or override both"
    )


def _refuse_other_slopes(schedule: Schedule, time: Tensor) -> None:
    """Raise ValueError where derivatives() are not those of alpha_sigma(), by differences."""
    time = as_float64(time)
    gaps = time.diff().abs()
    step = STEP * torch.minimum(torch.cat([gaps[:1], gaps]), torch.cat([gaps, gaps[-1:]]))
    (ahead, behind), given = (schedule.alpha_sigma(time + sign * step) for sign in (1, -1)), schedule.derivatives(time)
    rounding = max(map(_rounding, ahead))
    ahead, behind, given = (
        torch.stack([as_float64(each).expand_as(time) for each in pair]) for pair in (ahead, behind, given)
    )
    at = torch.stack([as_float64(each).expand_as(time) for each in schedule.alpha_sigma(time)])
    expected = (ahead - behind) / (2 * step)
    tolerance = OTHER_SLOPE * expected.abs().amax(0) + ROUNDINGS * rounding * ahead.abs().amax(0) / step
    slopes = expected, (ahead - at) / step, (at - behind) / step  # either side of a kink is right
    worst = _worst(torch.stack([(given - slope).abs().amax(0) for slope in slopes]).amin(0), tolerance)
    if worst is None:
        return
    (d_alpha, d_sigma), (of_alpha, of_sigma) = given[:, worst].tolist(), expected[:, worst].tolist()
    raise ValueError(
        f"derivatives() of {type(schedule).__name__} must be those of its alpha_sigma(), got {d_alpha:.4g} and "
        f"{d_sigma:.4g} at time {float(time[worst]):.6g}, where differences say {of_alpha:.4g} and {of_sigma:.4g}; "
        "mend it, or leave it out: autograd takes them of alpha_sigma()"
    )


def _warn_if_multiplied(schedule: Schedule, time: Tensor) -> None:
    """Warn of a subclass whose log-SNR is a multiple of that of our class, and whose alpha and sigma are made of it."""
    kind = type(schedule)
    base = next(each for each in kind.__mro__ if is_ours(each))
    if kind is base or base in (Schedule, LogSNR) or (kind.scale, kind.alpha_sigma) != (base.scale, base.alpha_sigma):
        return  # LogSNR's time is a log-SNR itself, which may be counted in any unit
    try:
        share = as_float64(schedule.log_snr(time)) / as_float64(base.log_snr(schedule, time))
    except (AttributeError, TypeError, ValueError):  # it has not what the formula of our class needs
        return
    factor = float(share.median())
    if factor > 0 and abs(factor - 1) > OTHER and bool(((share - factor).abs() <= OTHER * abs(factor)).all()):
        warn(
            f"log_snr() of {kind.__name__} must be log(alpha^2 / sigma^2), got {factor:.4g} times that of "
            f"{base.__name__} at every time, so that alpha and sigma, which are made of it, are another process's; "
            "return log(alpha^2 / sigma^2), unless the network was trained on that process"
        )


def _worst(off: Tensor, tolerance: Tensor | float) -> int | None:
    """Return the place that is off by most, None where all are within what is tolerated; NaN is not."""
    return None if bool((off <= tolerance).all()) else int((off / tolerance).nan_to_num(nan=math.inf).argmax())


def _rounding(value: object) -> float:
    """Return how much of a number its dtype rounds away; of Python's numbers as much as float64.

    Numbers of float64 that float32 holds exactly were computed in it.
    """
    dtype = value.dtype if isinstance(value, Tensor) and value.is_floating_point() else torch.float64
    if dtype == torch.float64 and isinstance(value, Tensor) and torch.equal(value.float().double(), value):
        dtype = torch.float32
    return torch.finfo(dtype).eps
