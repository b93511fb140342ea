"""How many rows fit into a memory budget: measured on the network itself, not guessed.

One short forward pass runs under a dispatch mode that counts the bytes of every storage that is alive; the peak,
divided by its rows, is what a row costs. The same number bounds CPU and GPU runs.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .host import positive

# On a CPU a chunk that stays near the caches is faster than a large one; the tables of benchmarks/ show it.
CPU_WORKING_SET = 36 << 20
# The network's own activations want to be nearer still, while the chunk's other passes want few, long operations.
CPU_CALL = 5 << 20
# Yet an operator has to write this much, or calling it takes as long: small layers at many resolutions want more rows.
CPU_OPERATOR = 384 << 10
# What the allocator and a library's scratch take beside tensors, as a share of the caller's budget.
HEADROOM = 0.15
HEAP_HINT = (32 << 20) - (64 << 10)
CPU_BUDGET = 1 << 30
MIN_AUTO_ROWS = 32
SHARING_SAMPLES = 64  # beyond, what a draw costs once is lost among its rows
RULE_BYTES = 336  # of a draw: its time, weights and coefficients, the sums at both ends, and the curve's
MOST_GROUPS = 16  # whose tables are evaluated together
SHARES = 128  # of the budget: one plan keeps no more than one, so that eight of them stay within the headroom
SUM_BYTES = 36  # of an f while it is summed over draws and over samples, in float64
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class _LiveBytes(TorchDispatchMode):
    """Track the bytes of storages created inside the block; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.made = self.written = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):  # weights and inputs were there before
            self._seen.add(storage)
        out = func(*args, **kwargs)
        for storage in _storages(out):
            if storage not in self._seen:
                self._watch(storage)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        self._seen.add(storage)
        size = storage.nbytes()
        self.made += 1
        self.written += size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            yield leaf.untyped_storage()


class Footprint(NamedTuple):
    """Bytes in the tensors that something creates: of all that live at once, at most, and of one, in the mean."""

    peak: int
    each: int


def footprint(run: Callable[[], object]) -> Footprint:
    """Return the footprint of `run()`."""
    with _LiveBytes() as mode:
        kept = run()  # saved activations live as long as the result
        found = Footprint(mode.peak, mode.written // max(1, mode.made))
    del kept
    return found


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the peak number of bytes in tensors that `run()` creates."""
    return footprint(run).peak


class RowCost(NamedTuple):
    """What an estimate keeps in memory, in bytes.

    Arguments:
        row: peak of one row's tensors, its noise and the network's activations among them.
        each: mean size of these tensors: what an operator writes for one row.
        draw: what is there of one draw for all samples.
        kept: of one draw of one sample, until the sample's last draw.
        work: what a sample's end takes beside that.
        sums: of one draw of one sample, while it is summed.
    """

    row: int
    each: int
    draw: int
    kept: int = 0
    work: int = 0
    sums: int = SUM_BYTES


def parse_bytes(memory: int | str) -> int:
    """Return a number of bytes from 1e9, "512MB" or "2 GB".

    Raises:
        ValueError: for anything else.
    """
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMG]?)B?\s*", memory.upper())
        if match is None:
            raise ValueError(f"memory must be a number of bytes or a text like '512MB', got {memory!r}")
        return int(float(match[1]) * _UNITS[match[2]])
    return int(positive("memory", memory, "bytes"))


@cache
def steady_heap() -> None:
    """Keep the C library from returning a chunk's memory to the system after every chunk.

    glibc raises its mmap and trim thresholds to the size of the largest block it has seen freed, up to 32 MiB. One
    such block, never touched, spares the page faults that otherwise cost an estimate a third of its time.
    """
    torch.empty(HEAP_HINT, dtype=torch.uint8, device="cpu")


class Chunks(NamedTuple):
    """How much is evaluated at once, and kept.

    Arguments:
        rows: network evaluations at once.
        per_call: of these, how many the network gets in one call, if a whole sample is not more.
        groups: for how many groups of nodes what row programs evaluate once per draw is there at once, and stays from
            one chunk of samples to the next; 0 if not even that of one fits.
        samples: how many to take through some draws at once in that case, so that they share it.
        kept: bytes that may stay between two calls.
    """

    rows: int
    per_call: int
    groups: int = 1
    samples: int = 1
    kept: int = 0


def even(count: int, most: int) -> int:
    """Return the length of the parts when `count` is cut into as few, equal ones of at most `most` as possible."""
    return math.ceil(count / math.ceil(count / most))


def plan_chunks(
    cost: RowCost, bytes_of_noise: int, draws: int, memory: int | str | None, device: torch.device
) -> Chunks:
    """Return how to cut an estimate of `draws` draws per sample; tables stay if a quarter of the budget holds them.

    Those of further groups are there together as far as a sixteenth of it holds them.

    Arguments:
        cost: as measured on the network.
        bytes_of_noise: of a draw's points, if those of all draws are there at once, as Sobol's are.
        memory: as in `chunk_rows`.

    Raises:
        ValueError: as `chunk_rows`; if the budget does not hold what is kept of one sample.
    """
    fixed = draws * (RULE_BYTES + bytes_of_noise + cost.kept) + cost.work
    budget, tables, sums = budget_bytes(memory, device) - fixed, draws * cost.draw, cost.sums * draws
    keep = 4 * tables <= budget
    groups = max(1, min(MOST_GROUPS, budget // max(1, 16 * tables))) if keep else 0
    samples = 1 if keep else max(1, min(SHARING_SAMPLES, budget // (3 * sums)))  # whose values wait to be summed
    row = cost.row + cost.kept + cost.sums + (0 if keep else cost.draw // samples)
    if cost.kept and budget < row:
        given = "the default budget" if memory is None else f"memory={memory!r}"
        raise ValueError(
            f"{given} does not hold one sample's residuals, {cost.kept:,} bytes in each of {draws} draws, and "
            f"{fixed - draws * cost.kept + row:,} to evaluate them; give memory >= {fixed + row}, "
            'a smaller nfe or control="reference"'
        )
    rows = chunk_rows(row, memory, device, fixed + (groups * tables if keep else samples * sums))
    near = max(CPU_CALL // row, CPU_OPERATOR // max(1, cost.each), MIN_AUTO_ROWS)
    per_call = min(rows, near) if device.type == "cpu" else rows
    return Chunks(rows, per_call, groups, min(samples, rows), max(0, budget) // SHARES)


def chunk_rows(bytes_per_row: int, memory: int | str | None, device: torch.device, kept: int = 0) -> int:
    """Return how many rows to evaluate at once.

    Arguments:
        bytes_per_row: as `peak_bytes` measured.
        memory: the caller's budget, or None for half of the free memory of a GPU, 1 GiB of a CPU.
        kept: bytes of the budget that are taken already.

    Raises:
        ValueError: if not even one row fits the caller's budget.
    """
    bytes_per_row = max(1, bytes_per_row)
    budget = budget_bytes(memory, device) - kept
    if memory is not None and budget < bytes_per_row:
        raise ValueError(
            f"memory={memory!r} does not hold one row of this network, which takes {bytes_per_row:,} bytes"
            + (f", and {kept:,} bytes that the draws take" if kept else "")
            + f"; give memory >= {bytes_per_row + kept}"
            + (" or a smaller nfe" if kept else "")
        )
    rows = int((1 - HEADROOM) * budget) // bytes_per_row
    if device.type == "cpu":
        steady_heap()
        rows = min(rows, max(CPU_WORKING_SET // bytes_per_row, MIN_AUTO_ROWS))
    return max(1, rows)


def budget_bytes(memory: int | str | None, device: torch.device) -> int:
    """Return the caller's budget in bytes, or the default: half of a GPU's free memory, 1 GiB of a CPU's."""
    if memory is not None:
        return parse_bytes(memory)
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else CPU_BUDGET
