"""Arrays, and conditions of a network, from the words of a command line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..process.conditions import shared
from .words import first_line, number

ARRAY = re.compile(r"(?P<path>.+\.(?P<kind>npy|npz|pt|safetensors))(?::(?P<key>.+))?")


def load_array(spec: str) -> np.ndarray | Tensor:
    """Return the array of a .npy, .npz, .pt or .safetensors file; "FILE:key" chooses one of several.

    .npy and .pt files are mapped into memory, so they may be larger than it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for another kind of file, an unreadable one, or a key that is missing or needed.
        ModuleNotFoundError: for .safetensors without that package.
    """
    match = ARRAY.fullmatch(spec)
    if match is None:
        raise ValueError(
            f"data must be a .npy, .npz, .pt or .safetensors file, with :key for one of several; got {spec!r}"
        )
    path, kind, key = match["path"], match["kind"], match["key"]
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no data file {path!r} in {os.getcwd()}; check the path")
    try:
        return _READERS[kind](path, key)
    except (_KeyProblem, ModuleNotFoundError):
        raise
    except Exception as error:
        reason = first_line(error)
        if "pickle" in reason:  # which numpy goes on to recommend
            reason = "it holds Python objects, or is none of these"
        raise ValueError(f"{path} cannot be read as a .{kind} file of plain numbers: {reason}") from error


def load_conditions(own: Sequence[str], all_share: Sequence[str]) -> dict[str, object]:
    """Return keyword arguments of the network from texts such as "y=labels.npy", "added.size=sizes.npz:px" or "w=1.5".

    Arguments:
        own: with one entry a sample; a number is shared in any case.
        all_share: shared by all samples.

    Raises:
        ValueError: for a text of another form, or a name that is given twice; and as `load_array`.
    """
    found: dict[str, object] = {}
    for text, is_shared in (*((text, False) for text in own), *((text, True) for text in all_share)):
        name, equals, value = text.partition("=")
        parts = name.split(".")
        if not equals or not all(part.isidentifier() for part in parts):
            raise ValueError(f"a condition must be NAME=FILE or NAME=NUMBER, such as y=labels.npy; got {text!r}")
        inside = found
        for part in parts[:-1]:
            inside = inside.setdefault(part, {})
        if not isinstance(inside, dict) or parts[-1] in inside:
            raise ValueError(f"condition {name!r} is given twice; give it once")
        if ARRAY.fullmatch(value):
            array = load_array(value)
            if not isinstance(array, Tensor) and array.dtype.kind not in "biufc":
                raise ValueError(
                    f"condition {name!r} must hold numbers, got {array.dtype} in {value}; convert them first"
                )
            inside[parts[-1]] = shared(array) if is_shared else array
            continue
        try:
            inside[parts[-1]] = number(value)
        except ValueError:
            raise ValueError(
                f"condition {name!r} must be a .npy, .npz, .pt or .safetensors file or a number, got {value!r}"
            ) from None
    return found


class _KeyProblem(ValueError):
    """A key that is missing, needed or not possible."""


def _pick(path: str, keys: list[str], key: str | None) -> str:
    listed = ", ".join(sorted(keys))
    if key is None and len(keys) == 1:
        return keys[0]
    if key is None:
        raise _KeyProblem(f"{path} holds {len(keys)} arrays ({listed}); choose one as {path}:NAME")
    if key not in keys:
        raise _KeyProblem(f"{path} has no {key!r}; it holds {listed}")
    return key


def _only(path: str, value: np.ndarray | Tensor, key: str | None) -> np.ndarray | Tensor:
    if key is not None:
        raise _KeyProblem(f"{path} holds one array without a name, got the key {key!r}; drop :{key}")
    return value


def _read_npy(path: str, key: str | None) -> np.ndarray:
    return _only(path, np.load(path, mmap_mode="c"), key)  # copy-on-write: torch wants arrays that it may write to


def _read_npz(path: str, key: str | None) -> np.ndarray:
    with np.load(path) as arrays:
        return arrays[_pick(path, arrays.files, key)]


def _read_pt(path: str, key: str | None) -> Tensor:
    stored = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if isinstance(stored, Tensor):
        return _only(path, stored.detach(), key)
    if not isinstance(stored, dict):
        raise ValueError(f"it holds a {type(stored).__name__}, expected a tensor or a dictionary of tensors")
    return stored[_pick(path, [name for name, value in stored.items() if isinstance(value, Tensor)], key)].detach()


def _read_safetensors(path: str, key: str | None) -> Tensor:
    try:
        from safetensors import safe_open
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"reading {path} needs the package safetensors; pip install safetensors") from None
    with safe_open(path, framework="pt") as tensors:
        return tensors.get_tensor(_pick(path, list(tensors.keys()), key))


_READERS = {"npy": _read_npy, "npz": _read_npz, "pt": _read_pt, "safetensors": _read_safetensors}
