"""The levels that bits per dimension are by: `bins` of one width in [low, high), and data outside of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..process.masks import broadcast_mask
from ..support.host import whole
from ..support.warn import warn

ROUNDED = 2.0**-23  # of the highest level's entries, at most, that are rounded up to its end in float32


def log_width(bins: int | None, low: float, high: float) -> float:
    """Return the logarithm of a level's width, 0 without bins; raise ValueError where there is none."""
    if bins is None:
        return 0.0
    if whole("bins", bins) < 2 or not high > low:
        raise ValueError(f"bits_per_dim needs bins >= 2 and high > low, got bins={bins}, low={low}, high={high}")
    return math.log((high - low) / bins)


def count_outside(x: Tensor, mask: Tensor | None, low: float, high: float) -> Tensor:
    """Return how many entries lie outside [low, high), and how many there are, of those that count: int64, (2,)."""
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else broadcast_mask(mask, x)
    return torch.stack([(((x < low) | (x >= high)) & counted).sum(), counted.sum()])


def warn_if_outside(counts: Tensor, bins: int, low: float, high: float) -> bool:
    """Warn, and return True, where `count_outside` found entries to which no level belongs."""
    outside, entries = counts.tolist()
    found = outside > ROUNDED * bins * entries
    if found:
        warn(
            f"{outside} of {entries} entries of the data lie outside [low, high) = [{low:g}, {high:g}), where the "
            f"{bins} levels are, and bits per dimension are by these; give low= and high= (--low, --high) of the "
            "dequantized data, which are levels.low and levels.high where levels.dequantize of a fastscore.Levels made "
            "them"
        )
    return found
