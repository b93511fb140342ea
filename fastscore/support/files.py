"""Files that are whole or not there, and arrays in them without pickle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np


def write_whole(path: Path, write: Callable[[BinaryIO], object], folder: Path | None = None) -> None:
    """Let `write(file)` fill a file that appears at `path` when it is whole and on the disk.

    It is written under another name, synced and renamed, so that neither `kill -9` nor a power cut leaves half of one.

    Arguments:
        folder: where it lies until then, on the same file system; beside `path` by default.
    """
    temporary = (folder or path.parent) / f"{path.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be synced
        parent = os.open(path.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], folder: Path | None = None) -> None:
    """Write named arrays to a .npz file, whole or not at all."""
    write_whole(path, lambda file: np.savez(file, **arrays), folder)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a .npz file by name; nothing in it is executed.

    Raises:
        FileNotFoundError: if there is none.
        Exception: of a dozen kinds, for a file that is damaged or another one, by zip, zlib and numpy.
    """
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
