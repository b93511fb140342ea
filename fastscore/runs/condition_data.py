"""Conditions of a data set: arrays with one entry a sample, taken block by block, and what all samples share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..process.conditions import per_sample, shared
from ..support.host import as_tensor, refuse_not_dense
from ..support.structure import Structure, flatten, is_plain
from .dataset import Array, digest, digest_of, refuse_no_numbers, take


@dataclass(frozen=True)
class DataConditions:
    """Keyword arguments of the network for a data set, nested as those of a call; arrays may be mapped from files."""

    own: dict[str, Array]
    shared: dict[str, object]
    structure: Structure

    @classmethod
    def of(cls, what: str, given: Mapping[str, object] | None, count: int) -> DataConditions:
        """Tell the conditions of `count` samples apart: an array has an entry for each, or is marked as shared.

        Arguments:
            what: what they are called, for the message.

        Raises:
            ValueError: for an array of another length that is not in `fastscore.shared`, or what is no array, number or
                text.
        """
        if not isinstance(given, Mapping | None):
            raise ValueError(f"{what} must be a dict of the network's keyword arguments, got {type(given).__name__}")
        leaves, structure = flatten(given or {})
        own = {}
        for path, length in structure.lists.items():
            if length == count > 1:
                raise ValueError(
                    f"{what} {path!r} is a list or tuple of {length} entries and there are {count} samples; give one "
                    "array, or mark what all samples share with fastscore.shared(...)"
                )
        for path, leaf in leaves.items():
            refuse_no_numbers(f"{what} {path!r}", leaf.value)
            if leaf.per_sample is False or is_plain(leaf.value):
                continue
            refuse_not_dense(f"{what} {path!r}", leaf.value)
            if not isinstance(leaf.value, Tensor | np.ndarray) or leaf.value.ndim == 0 or len(leaf.value) != count:
                shape = getattr(leaf.value, "shape", None)
                kind, right = type(leaf.value).__name__, isinstance(leaf.value, Tensor | np.ndarray)
                got = f"shape {tuple(shape)}" if right else kind if shape is None else f"{kind} of shape {tuple(shape)}"
                array = "an array" if right else "a tensor or an array of numpy"
                raise ValueError(
                    f"{what} {path!r} must be {array} of shape ({count}, ...), one entry a sample of the data, got "
                    f"{got}; what all samples share goes into fastscore.shared(...), or --shared"
                )
            own[path] = leaf.value
        return cls(own, {k: leaf.value for k, leaf in leaves.items() if k not in own}, structure)

    def __bool__(self) -> bool:
        return bool(self.own or self.shared)

    def at(self, index: Tensor | slice, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
        """Return the keyword arguments of some samples on a device, marked; arrays of fractions in a dtype."""
        own = {path: per_sample(_tensor(take(rows, index), device, dtype)) for path, rows in self.own.items()}
        rest = {path: shared(_tensor(value, device, dtype)) for path, value in self.shared.items()}
        return self.structure.build(own | rest)

    def digest_rows(self, index: Tensor) -> str:
        """Return the digest of what these samples have of their own."""
        return digest({path: take(rows, index) for path, rows in self.own.items()})

    def setting(self) -> str:
        """Return what tells the conditions of one run from another's, but for each sample's own."""
        arrays = {k: as_tensor(v) for k, v in self.shared.items() if isinstance(v, Tensor | np.ndarray)}
        plain = {k: v for k, v in self.shared.items() if k not in arrays}
        return digest_of([repr(sorted(self.own)), digest(arrays), repr(sorted(plain.items(), key=str))])


def _tensor(value: object, device: torch.device, dtype: torch.dtype) -> object:
    if not isinstance(value, Tensor | np.ndarray):
        return value
    tensor = as_tensor(value)
    return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
