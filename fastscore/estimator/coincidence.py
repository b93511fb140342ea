"""Conditions that have as many entries as there are samples by chance: what the sizes cannot tell, a call can.

A network that wants one entry a row does not take a condition of another length. One that takes it whole with any
number of rows, and answers otherwise than for each sample's own entry, or not at all for that, may well mean a graph or
a table that all share. Several samples are asked at several times: one of them may point at an entry of its own. A
single sample is asked in three rows, once, with one entry for all of them and with one each: a network that adds up a
set of one entry answers otherwise.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..process.conditions import Conditions
from ..process.network import predict
from ..support.untouched import uncompiled, undisturbed
from .samples import Samples

ROWS = 12  # at most, that a condition is tried with

# By network: paths and shapes of an entry that were looked at.
_SEEN: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()


def refuse_coincidences(
    model: nn.Module, samples: Samples, times: Callable[[], Tensor], time_dtype: torch.dtype | None
) -> None:
    """Call the network for every condition that nobody marked, until one call has told what it is.

    Arguments:
        times: gives some of the schedule's, shape (n,).

    Raises:
        ValueError: for a condition that the network takes in both ways, with different answers.
    """
    seen = _SEEN.setdefault(model, set())
    for cond in samples.conds:
        for path in cond.guessed:
            several = len(samples) > 1
            key = path, tuple(cond.per_sample[path].shape[1:]), several
            if key not in seen:
                both = _means_both(model, samples, cond, path, times(), time_dtype)
                if both:
                    raise ValueError(
                        f"condition {path!r} has as many entries as there are samples, {len(samples)}, and the network "
                        "takes all of them, or one a sample, with different answers; mark it with fs.shared(...) or "
                        "fs.per_sample(...)"
                    )
                if both is not None or not several:
                    seen.add(key)


@torch.no_grad()
def _means_both(
    model: nn.Module, samples: Samples, cond: Conditions, path: str, times: Tensor, time_dtype: torch.dtype | None
) -> bool | None:
    """Return whether the network takes a condition in both ways; None where it answers the same, for now."""
    # Fewer rows than entries where possible, since a loop over the entries takes more; and no sample in its own place.
    rows = min(ROWS, len(samples) - 1) if len(samples) > 2 else 3
    asked = (torch.arange(rows, device=samples.device) + 1) % min(rows, len(samples))
    own = {name: value[asked] for name, value in cond.per_sample.items()}
    times = times.to(samples.device).repeat(-(-rows // len(times)))[:rows]

    def answer(leaves: dict[str, object], rows: int = rows) -> Tensor:
        given = Conditions({}, cond.shared | leaves, cond.structure)
        return predict(model, samples.x[asked[:rows]][None], times[:rows], given, samples.shape, time_dtype)

    with uncompiled(), undisturbed(model):
        try:
            if rows > len(samples) > 1:  # of two samples: one row is fewer, but too few to compare
                answer({name: value[:1] for name, value in own.items()} | {path: cond.per_sample[path]}, 1)
            whole = answer(own | {path: cond.per_sample[path]})
        except Exception:  # whatever the network raises: it wants one entry a row
            return False
        if not torch.equal(whole, answer(own | {path: cond.per_sample[path]})):
            return None  # random
        try:
            return True if not torch.allclose(whole, answer(own), rtol=1e-4, atol=1e-6) else None
        except ValueError:
            return True
