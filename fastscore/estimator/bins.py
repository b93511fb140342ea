"""The levels that bits per dimension are by: `bins` of one width in [low, high), and data outside of them."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ..process.masks import broadcast_mask
from ..support.host import finite, whole
from ..support.warn import warn

ROUNDED = 2.0**-23  # of the highest level's entries, at most, that are rounded up to its end in float32
MANY = 1000  # entries, of which some are in the lower half where an image uses all levels

LOW, HIGH = -1.0, 1.0  # where nobody says otherwise
MOST_BINS = 1 << 53  # integers that float64 tells apart


class HasLevels(Protocol):
    """What says by itself how many levels there are and where dequantized data end, as `fastscore.Levels` does."""

    @property
    def bins(self) -> int: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...


Bins = int | HasLevels | None


def in_numbers(bins: Bins, low: float, high: float) -> tuple[int | None, float, float]:
    """Return the number of levels and the ends of the dequantized data, where `bins` may be what has all three.

    Raises:
        ValueError: for levels and ends that are not theirs.
    """
    low, high = finite("low", low), finite("high", high)
    if bins is None or not all(hasattr(bins, name) for name in ("bins", "low", "high")):
        return bins, low, high
    own = bins.low, bins.high
    if (low, high) not in (own, (LOW, HIGH)):
        raise ValueError(
            f"bits_per_dim got the levels {bins}, whose dequantized data lie in [{own[0]:g}, {own[1]:g}), and besides "
            f"low={low}, high={high}; expected the levels alone, so leave low and high out"
        )
    return bins.bins, *own


def log_width(bins: Bins, low: float, high: float) -> float:
    """Return the logarithm of a level's width, 0 without bins; raise ValueError where there is none, or ends alone."""
    bins, low, high = in_numbers(bins, low, high)
    if bins is None:
        if (low, high) != (LOW, HIGH):
            raise ValueError(
                f"low and high say where the levels of discrete data lie, got low={low} and high={high} without bins; "
                "give bins= as well, or leave both out for continuous data"
            )
        return 0.0
    if not 2 <= whole("bins", bins) <= MOST_BINS or not high > low:
        raise ValueError(
            f"bits_per_dim needs bins >= 2 and high > low, 2^53 bins at most, got bins={bins}, low={low}, high={high}"
        )
    return math.log((high - low) / bins)


def refuse_of_a_probability(method: str, bins: Bins) -> None:
    """Raise ValueError for the width of levels where they are counted in already."""
    if method == "discrete_log_prob" and bins is not None:
        raise ValueError(
            "bits_per_dim of a result of discrete_log_prob must be called without bins, since log_prob is already the "
            f"log-probability of the levels and not a density, got bins={bins}; call bits_per_dim() or "
            "mean_bits_per_dim()"
        )


def count_outside(x: Tensor, mask: Tensor | None, low: float, high: float) -> Tensor:
    """Return how many entries that count lie outside [low, high), in the lower half, and how many there are: int64."""
    counted = torch.ones_like(x, dtype=torch.bool) if mask is None else broadcast_mask(mask, x)
    outside, lower = (x < low) | (x >= high), x < (low + high) / 2
    return torch.stack([(outside & counted).sum(), (lower & counted).sum(), counted.sum()])


def warn_if_outside(counts: Tensor, bins: int, low: float, high: float) -> bool:
    """Warn, and return True, where `count_outside` found entries to which no level belongs, or few of the levels."""
    outside, lower, entries = counts.tolist()
    found = outside > ROUNDED * bins * entries
    if not lower and not found and entries >= MANY:
        middle = (low + high) / 2
        warn(
            f"all {entries} entries of the data lie in the upper half of [low, high) = [{low:g}, {high:g}), where the "
            f"{bins} levels are: bits per dimension are 1 too few if all are in [{middle:g}, {high:g}); give low= "
            "and high= (--low, --high) of the dequantized data, or bins=levels of the fastscore.Levels that made them"
        )
        return True
    if found:
        warn(
            f"{outside} of {entries} entries of the data lie outside [low, high) = [{low:g}, {high:g}), where the "
            f"{bins} levels are, and bits per dimension are by these; give low= and high= (--low, --high) of the "
            "dequantized data, or, where levels.dequantize of a fastscore.Levels made them, bins=levels in place of "
            "all three (levels.low and levels.high on the command line)"
        )
    return found
