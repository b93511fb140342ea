"""The folder of an unfinished run: whole files or none, one process at a time, and a manifest that says whose it is.

The lock is the operating system's: it ends with its process, however that ends.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from ..support.files import read_arrays, write_arrays, write_whole
from .answers import alike, in_words

# A digest is of the parts in which a run reads: where one of these differs, it differs with them, and tells nothing.
READ_BY = {
    "data": ("batch", "indices"),
    "conditions": ("batch", "indices"),
    "mask": ("batch", "indices"),
    "transform": ("data", "mask"),
    "reference and nodes": ("fit data", "schedule"),
    "network's answer": (
        *("network", "data", "indices", "conditions", "mask", "transform", "schedule", "time dtype", "device"),
        *("fastscore", "torch"),
    ),
}
CHANGES_NOTHING = ("memory",)  # but the rounding: a run that ran out of it goes on with less


class RunFolder:
    """The folder `out.partial` beside the result `out` of a run.

    It holds ``manifest.json`` with the fingerprint of the run, named arrays in .npz files, and ``lock`` with ``pid``
    while a process works on it; of several processes with one run, rank 0 owns it.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.folder = out, out.with_name(out.name + ".partial")
        self._manifest = self.folder / "manifest.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Own the folder inside the block; afterwards it stays only if it holds something to resume.

        Raises:
            BlockingIOError: if another process does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        pid, lock = self.folder / "pid", FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            owner = pid.read_text() if pid.exists() else "of another user"
            raise BlockingIOError(
                f"process {owner} is working on {self.out}; wait until it ends, or give another out"
            ) from None
        try:
            pid.write_text(str(os.getpid()))
            yield
        finally:
            if not any(self.folder.glob("*.npz")):
                self._remove()
            lock.release()

    @property
    def fingerprint(self) -> dict:
        """What the unfinished run's numbers depend on; empty if there is no unfinished run."""
        try:
            return json.loads(self._manifest.read_text())
        except (OSError, ValueError):
            return {}

    def open(self, fingerprint: dict, restart: bool) -> str:
        """Go on with the unfinished run of this fingerprint, or begin one; return a key that its blocks carry.

        A process of an earlier run that has not ended yet may still write a block: its key tells it apart.

        Raises:
            ValueError: if finished blocks of another fingerprint are there, naming what differs.
            FileExistsError: if there is no unfinished run, but a result.
        """
        fingerprint, stored = json.loads(json.dumps(fingerprint)), self.fingerprint
        keys = [key for key in {**stored, **fingerprint} if key not in CHANGES_NOTHING]
        differs = [key for key in keys if not alike(stored.get(key), fingerprint.get(key))]
        if not restart and not stored and self.out.exists():
            raise FileExistsError(
                f"{self.out} is there already; give another out, or replace it with restart (--restart)"
            )
        if not restart and stored and differs and self.blocks():
            told = [key for key in differs if not set(READ_BY.get(key, ())) & set(differs)]
            listed = "; ".join(
                f"{key} is {in_words(stored.get(key))} there and {in_words(fingerprint.get(key))} here" for key in told
            )
            raise ValueError(
                f"{self.folder} holds {len(self.blocks())} finished blocks of another run: {listed}. "
                "Give another out, or discard them with restart (--restart)"
            )
        if restart or differs:
            self.clear()
            self.write(self._manifest, lambda file: file.write(json.dumps(fingerprint, indent=1).encode()))
        else:
            fingerprint = stored  # whose numbers the finished blocks carry
        return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]

    def blocks(self) -> list[Path]:
        """Return the files of the finished blocks."""
        return sorted(self.folder.glob("block-*.npz"))

    @property
    def fitted(self) -> Path:
        """The file of what the run fitted."""
        return self.folder / "fitted.npz"

    def block(self, number: int) -> Path:
        return self.folder / f"block-{number:06d}.npz"

    def write(self, path: Path, write: Callable[[BinaryIO], object]) -> None:
        """Let `write(file)` fill a file that appears at `path` when it is whole and on the disk."""
        write_whole(path, write, self.folder)

    def write_arrays(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        write_arrays(path, arrays, self.folder)

    def read_arrays(self, path: Path) -> dict[str, np.ndarray] | None:
        """Return the arrays of a file, or None if it is missing or damaged."""
        try:
            return read_arrays(path)
        except Exception:  # the remedy for all kinds is to compute it again
            return None

    def clear(self) -> None:
        """Remove what this run or an earlier one wrote; foreign files stay."""
        # The manifest first: without it no remaining block can be mistaken for a finished one of another run.
        self._manifest.unlink(missing_ok=True)
        for path in [*self.folder.glob("*.npz"), *self.folder.glob("*.tmp")]:
            path.unlink()

    def _remove(self) -> None:
        self.clear()
        for name in ("pid", "lock"):
            (self.folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            self.folder.rmdir()
