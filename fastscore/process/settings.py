"""What a schedule's answers come from, so that a change of it can be seen."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .schedules import Cut, Schedule

NUMBERS = frozenset((int, float, Cut))


def settings_of(schedule: Schedule) -> tuple | None:
    """Return all that the answers of one of our own schedules come from, to be compared with those of another time.

    None for a class of a user's, which may read anything, and where an attribute is neither a number nor a table.
    """
    kind = type(schedule)
    if not is_ours(kind):
        return None
    found = [kind, getattr(kind, "time_range", None), kind.time, kind.log_snr, kind.scale, kind.alpha_sigma]
    for name, value in vars(schedule).items():
        if isinstance(value, Tensor) and not value.requires_grad and value.device.type == "cpu":
            raw = value.contiguous().reshape(-1).view(torch.uint8)  # numpy does not know all dtypes
            value = value.dtype, value.shape, raw.numpy().tobytes()
        elif type(value) not in NUMBERS and not (type(value) is tuple and all(type(each) in NUMBERS for each in value)):
            return None
        # An end and a cut may be the same number.
        found += [name, value, tuple(map(type, value)) if type(value) is tuple else type(value)]
    return tuple(found)


class Seen(NamedTuple):
    """What a schedule was when something was made of it: its settings, or where it has none what it told.

    Arguments:
        settings: as `settings_of` returned them.
        log_snr, time: where it was asked; of a table at its times.
        told: its range of time, the times, their log-SNRs, alpha and sigma.
    """

    settings: tuple | None
    log_snr: Tensor | None = None
    time: Tensor | None = None
    told: tuple = ()

    @classmethod
    def of(cls, schedule: Schedule, log_snr: Tensor, time: Tensor | None) -> Seen:
        settings = settings_of(schedule)
        return cls(settings) if settings is not None else cls(None, log_snr, time, _tell(schedule, log_snr, time))

    def holds(self, schedule: Schedule) -> bool:
        """Return whether a schedule is still what it was."""
        if self.log_snr is None:
            return self.settings == settings_of(schedule)
        (before, *told), (now, *telling) = self.told, _tell(schedule, self.log_snr, self.time)
        return before == now and all(map(torch.equal, told, telling))


def _tell(schedule: Schedule, log_snr: Tensor, time: Tensor | None) -> tuple:
    time = schedule.time(log_snr) if time is None else time
    return schedule.time_range, time, schedule.log_snr(time), *schedule.alpha_sigma(time)


@cache
def is_ours(kind: type) -> bool:
    """Return whether a class is one of this package's."""
    return kind.__module__.partition(".")[0] == __package__.partition(".")[0]
