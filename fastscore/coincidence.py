"""Conditions that have as many entries as there are samples by chance: what the sizes cannot tell, a call can.

A network that wants one entry a row does not take a condition of another length. One that takes it whole with any
number of rows, and answers otherwise than for a sample's own entry, may well mean a graph or a table that all share.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .conditions import Conditions
from .network import predict
from .samples import Samples
from .untouched import uncompiled, undisturbed

# By network: paths and shapes of an entry that were looked at.
_SEEN: weakref.WeakKeyDictionary[nn.Module, set[tuple]] = weakref.WeakKeyDictionary()


def refuse_coincidences(
    model: nn.Module, samples: Samples, time: Callable[[], Tensor], time_dtype: torch.dtype | None
) -> None:
    """Call the network once for every condition that nobody marked, at its first sight.

    Arguments:
        time: gives one of the schedule's, shape (1,).

    Raises:
        ValueError: for a condition that the network takes in both ways, with different answers.
    """
    seen = _SEEN.setdefault(model, set())
    for cond in samples.conds:
        for path in cond.guessed:
            key = path, tuple(cond.per_sample[path].shape[1:])
            if len(samples) > 1 and key not in seen:
                if _means_both(model, samples, cond, path, time(), time_dtype):
                    raise ValueError(
                        f"condition {path!r} has as many entries as there are samples, {len(samples)}, and the network "
                        "also takes all of them with another number of rows, with another answer; say fs.shared(...) "
                        "around it if all samples share it, or fs.per_sample(...) if each has its own"
                    )
                seen.add(key)


@torch.no_grad()
def _means_both(model, samples: Samples, cond: Conditions, path: str, time: Tensor, time_dtype) -> bool:
    rows = 3 if len(samples) != 3 else 2
    own = {name: value[:1].repeat_interleave(rows, 0) for name, value in cond.per_sample.items()}
    x_t, times = samples.x[:1].expand(rows, -1)[None], time.to(samples.x.device).expand(rows)

    def answer(leaves: dict[str, object]) -> Tensor:
        given = Conditions({}, cond.shared | leaves, cond.structure)
        return predict(model, x_t, times, given, samples.shape, time_dtype)

    with uncompiled(), undisturbed(model):
        try:
            whole = answer(own | {path: cond.per_sample[path]})
        except Exception:  # whatever the network raises: it wants one entry a row
            return False
        random = not torch.equal(whole, answer(own | {path: cond.per_sample[path]}))
        return not random and not torch.allclose(whole, answer(own), rtol=1e-4, atol=1e-6)
