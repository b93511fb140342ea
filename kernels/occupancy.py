"""How many programs of a kernel a GPU runs at once, and into how many parts a launch's rows are split for that.

A launch of 320 programs on a GPU that runs 264 at once takes two waves, the second nearly empty: 256 programs with more
rows each would take one. Registers and shared memory decide how many run at once; until a kernel has run for the first
time its registers are not known, and the most that a thread can have stands for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

REGISTERS, MOST_REGISTERS = 65_536, 255  # of a multiprocessor, and of a thread: the same on all supported GPUs
RESERVED_BYTES = 1024  # of shared memory, that a program takes beside its own


@dataclass(frozen=True)
class Multiprocessors:
    """How many a GPU has, and of each the bytes of shared memory and the threads."""

    count: int
    shared: int
    threads: int = 2048

    @classmethod
    def of(cls, device: torch.device) -> Multiprocessors | None:
        """Return a GPU's, or None for a CPU."""
        if device.type != "cuda":
            return None
        found = torch.cuda.get_device_properties(device)
        return cls(
            found.multi_processor_count, found.shared_memory_per_multiprocessor, found.max_threads_per_multi_processor
        )

    def at_once(self, threads: int, shared: int, registers: int = MOST_REGISTERS) -> int:
        """Return how many programs of so many threads, bytes of shared memory and registers a thread run at once."""
        of_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
        of_shared = self.shared // (shared + RESERVED_BYTES)
        return self.count * max(1, min(of_registers, of_shared, self.threads // threads))


@lru_cache(maxsize=256)  # every chunk asks
def best_splits(tiles: int, rows: int, at_once: int) -> int:
    """Return into how many parts to split the rows of every tile so that the last program ends first.

    Waves times the rows of a program, plus one row that a program costs to start: what `division` of
    csrc/density_mlp.cpp minimizes. The fewest parts of those that are equally good.
    """

    def work(splits: int) -> int:
        return -(-tiles * splits // at_once) * (-(-rows // splits) + 1)

    return min(range(1, max(1, min(rows, 2 * at_once)) + 1), key=work)


_KNOWN: dict[tuple, int] = {}


def registers_of(key: tuple) -> int:
    """Return the registers a thread of a compiled kernel, or the most there can be while it has not run."""
    return _KNOWN.get(key, MOST_REGISTERS)


def remember(key: tuple, compiled) -> None:
    """Keep the registers of what a launch returned; Triton's interpreter returns nothing."""
    registers = getattr(compiled, "n_regs", None)
    if isinstance(registers, int) and registers > 0:
        _KNOWN[key] = registers
