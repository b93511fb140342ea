"""What a schedule's answers come from, so that a change of it can be seen."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .schedules import Schedule

NUMBERS = frozenset((int, float))


def settings_of(schedule: Schedule) -> tuple | None:
    """Return all that the answers of one of our own schedules come from, to be compared with those of another time.

    None for a class of a user's, which may read anything, and where an attribute is neither a number nor a table.
    """
    kind = type(schedule)
    if not _is_ours(kind):
        return None
    found = [kind, getattr(kind, "time_range", None), kind.time, kind.log_snr, kind.scale, kind.alpha_sigma]
    for name, value in vars(schedule).items():
        if isinstance(value, Tensor) and not value.requires_grad and value.device.type == "cpu":
            raw = value.contiguous().reshape(-1).view(torch.uint8)  # numpy does not know all dtypes
            value = value.dtype, value.shape, raw.numpy().tobytes()
        elif type(value) not in NUMBERS and not (type(value) is tuple and all(type(each) in NUMBERS for each in value)):
            return None
        found += [name, value]
    return tuple(found)


@cache
def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __package__.partition(".")[0]
