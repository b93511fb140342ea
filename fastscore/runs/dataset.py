"""A data set in memory or mapped from a file: checks, rows by index, and digests that tell one from another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..estimator.samples import refuse_not_finite_at
from ..support.host import refuse_not_dense

Array = Tensor | np.ndarray
FLOATS = ("float64", "float32", "float16", "bfloat16")


def check_data(name: str, data: Array, shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError unless the data are floating point of shape (N, *shape), N >= 1; `name` is for the message."""
    refuse_not_dense(name, data)
    if not isinstance(data, Tensor | np.ndarray):
        raise ValueError(
            f"{name} must be one tensor or array of numpy (N, *shape), mapped from a file or in memory, got "
            f"{type(data).__name__}; torch.stack of the samples of a Dataset makes one"
        )
    kind = kind_of_numbers(data)
    if "int" in kind:
        raise ValueError(
            f"{name} holds integers ({kind}), expected float32 or float64: a density needs continuous data; "
            "dequantize it first with fastscore.Levels(bins).dequantize(data)"
        )
    if kind not in FLOATS:  # numpy has wider ones, and torch narrower ones
        raise ValueError(f"{name} must be float32 or float64, got {kind}; convert it first")
    if data.ndim < 2 or 0 in data.shape:
        raise ValueError(
            f"{name} must have the shape (N, *shape) with N >= 1, got {tuple(data.shape)}; "
            "numbers in a row are samples after data[:, None]"
        )
    if shape is not None and tuple(data.shape[1:]) != shape:
        raise ValueError(f"{name} has samples of shape {tuple(data.shape[1:])}, expected {shape} as in data")


def kind_of_numbers(data: Array) -> str:
    """Return the name of a dtype, the same for numpy's and torch's."""
    return data.dtype.name if isinstance(data, np.ndarray) else str(data.dtype).removeprefix("torch.")


def refuse_no_numbers(name: str, array: Array) -> None:
    """Raise ValueError for an array of numpy that no tensor holds: of texts, objects, dates or wider floats."""
    if not isinstance(array, np.ndarray):
        return
    try:
        torch.from_numpy(np.empty(0, array.dtype.newbyteorder("=")))
    except TypeError:
        raise ValueError(
            f"{name} must be an array of numbers that torch has, got {array.dtype.name or array.dtype}; convert it "
            "first, texts to labels or embeddings"
        ) from None


def take(data: Array, index: Tensor | slice) -> Tensor:
    """Return the rows of these indices in native byte order."""
    if isinstance(data, Tensor):
        return data[index]
    rows = data[index if isinstance(index, slice) else index.numpy()]
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=rows.dtype.newbyteorder("=")))


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of names, types, shapes and bytes.

    Weights that a network holds elsewhere while it does not run, on the meta device, count by the others.
    """
    sha = hashlib.sha256()
    for name, value in tensors.items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(b"" if value.is_meta else _bytes(value))
    return sha.hexdigest()[:16]


def digest_rows(name: str, data: Array, index: Tensor) -> str:
    """Return the digest of the rows of these indices; raise ValueError if one has NaN or inf."""
    rows = take(data, index)
    refuse_not_finite_at(name, rows, index)
    return hashlib.sha256(_bytes(rows)).hexdigest()[:16]


def digest_of(digests: Sequence[str]) -> str:
    """Return one digest of many, in their order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16]


def _bytes(value: Tensor) -> np.ndarray:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
