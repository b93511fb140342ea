"""A network is asked about a few rows of some samples, beside an estimate: how it answers, not what."""

from __future__ import annotations

import torch
from torch import Tensor

from ..process.network import predict
from .network import Network
from .samples import Samples


def ask(network: Network, samples: Samples, x_t: Tensor, times: Tensor, most: int) -> Tensor:
    """Return the network's answers to rows, (B, R, d), at the times of each sample's, (R,).

    Arguments:
        most: rows that it gets in one call at most, as memory allows.
    """
    size, count = x_t.shape[:2]
    rows, together = max(1, min(most, count)), max(1, most // count)  # of a sample, and samples whose rows all fit
    several, found = together < size or rows < count, []
    for start in range(0, size, together):
        some = slice(start, start + together)
        cond = samples.conds[0].select(some)
        for first in range(0, count, rows):
            part = slice(first, first + rows)
            answer = predict(network.model, x_t[some, part], times[part], cond, samples.shape, network.time_dtype)
            # A network may write every answer into the same memory.
            found.append((answer.clone() if several else answer).flatten(0, 1))
    return found[0].reshape(x_t.shape) if len(found) == 1 else torch.cat(found).reshape(x_t.shape)
