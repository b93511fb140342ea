"""The mask of a data set: which entries count, one for each sample or one for all, taken block by block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..process.masks import shape_of_mask
from ..support.host import refuse_not_dense
from .dataset import Array, digest, refuse_no_numbers, take


@dataclass(frozen=True)
class DataMask:
    """True (or 1) for the entries of a data set that count; `values` has as many dimensions as the data.

    The first size of `values` is that of the data, or 1 where all samples share it.
    """

    what: str
    values: Array

    @classmethod
    def of(cls, what: str, mask: Array | None, shape: tuple[int, ...]) -> DataMask | None:
        """Give a mask the dimensions of the data (`shape_of_mask`).

        Arguments:
            what: what it is called, for the message.
            shape: of the data, (N, *shape).

        Raises:
            ValueError: if it is no array of bool, or of 0 and 1, or does not fit the data, or fits in two ways.
        """
        if mask is None:
            return None
        refuse_not_dense(what, mask)
        if not isinstance(mask, Tensor | np.ndarray) or "complex" in str(mask.dtype):
            raise ValueError(f"{what} must be an array of True and False (or 1 and 0), got {type(mask).__name__}")
        refuse_no_numbers(what, mask)
        return cls(what, mask.reshape(shape_of_mask(what, mask.shape, "data", shape)))

    @property
    def shared(self) -> bool:
        """Whether all samples have the same."""
        return len(self.values) == 1

    def at(self, index: Tensor | slice, device: torch.device) -> Tensor:
        """Return the mask of some samples, bool; with a first size of 1 where all share it."""
        rows = take(self.values, slice(None) if self.shared else index)
        return (rows if rows.dtype == torch.bool else rows != 0).to(device)

    def digest_rows(self, index: Tensor) -> str:
        """Return the digest of the mask of some samples.

        Raises:
            ValueError: for other numbers than 0 and 1, or a sample without an entry that counts.
        """
        rows = take(self.values, slice(None) if self.shared else index)
        if rows.dtype != torch.bool and not bool(((rows == 0) | (rows == 1)).all()):
            raise ValueError(f"{self.what} must be True (or 1) where an entry counts and False (or 0) elsewhere")
        empty = (~(rows != 0).flatten(1).any(1)).nonzero()
        if len(empty):
            where = "all samples" if self.shared else f"sample {int(index[int(empty[0])])}"
            raise ValueError(f"{self.what} must be True for at least one entry of every sample, got none in {where}")
        return digest({"mask": rows != 0})
