"""Samples that have the same noise, of which the error of their mean would know nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..support.warn import warn


def refuse_common_noise(*keys: Sequence[Tensor]) -> None:
    """Raise ValueError where samples of several batches have the same keys: of every batch the index, and the seed."""
    joined = [torch.cat(list(each)) for each in keys]
    if again := _repeated(*joined):
        raise ValueError(
            f"{again} of {len(joined[0])} samples have the seed and the sample_index of another one, and so the same "
            "noise, of which the error of their mean would know nothing; give every batch its place among all samples, "
            "sample_index=torch.arange(start, start + len(x))"
        )


def warn_of_common_noise(*keys: Tensor) -> None:
    """Warn where samples whose mean is asked for have the same keys of their noise: index, and seed if they differ."""
    if again := _repeated(*keys):
        warn(
            f"{again} of {len(keys[0])} samples have the sample_index of another one, and so the same noise, of which "
            "the error of the mean knows nothing: it may be several times too small; give every sample its own "
            "sample_index"
        )


def _repeated(*keys: Tensor) -> int:
    """Return how many samples have the same keys as another one, and so the same noise."""
    return len(keys[0]) - torch.stack(keys).unique(dim=1).shape[1]
