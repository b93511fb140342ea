"""How the kernel of wide layers is launched (`density_mlp_wide.py`): tile, warps, rows of a weight in flight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from .launch import REDUCTION_BYTES, Device, NoRoom, Work
from .packing import block_d

MAX_WIDTH = 512  # beyond, a tile of float32 sums takes more registers than a program has
PANEL_BYTES = 32 << 10  # of a weight, that a loop takes at a time
DATA_BLOCK = 64  # dimensions of a chunk, at most
FEW_PROGRAMS = 3  # where rows need no splitting: in the interpreter, to cut a launch in odd places


@dataclass(frozen=True)
class Panels:
    """Samples a tile, warps, rows of a weight that are multiplied at a time, how many such panels are in flight."""

    block_b: int
    num_warps: int
    panel: int
    block_d: int  # dimensions of a chunk
    stages: int

    @classmethod
    def choose(cls, work: Work, device: Device) -> Panels:
        """Return the first of `candidates` that fits a device.

        Raises:
            NoRoom: if none does.
        """
        return _first_that_fits(work, device)

    @classmethod
    def candidates(cls, work: Work) -> Iterator[Panels]:
        """Yield launches, best first by what spills least as compiled (docs/kernels.md), each lighter than before."""
        panel = max(16, min(work.layout.width, PANEL_BYTES // (work.itemsize * work.layout.width)))
        chunk = min(block_d(work.d), DATA_BLOCK, panel)
        for stages in (3, 2, 1):
            yield cls(32, 8, panel, chunk, stages)
        yield cls(16, 8, 16, min(chunk, 16), 1)

    def shared_bytes(self, work: Work, capability: int = 0) -> int:
        """Return a bound of the shared memory that the compiled kernel takes.

        Panels of operand and weight, all in flight but the one that is multiplied; or a tile on its way to memory, or
        into the first product, which is rearranged, with a vector that differs among samples. The same on every device.
        """
        width = work.layout.width
        panels = max(1, self.stages - 1) * work.itemsize * self.panel * (self.block_b + width)
        first = work.itemsize * self.block_d * width + work.operand_bytes(self.block_b, self.block_d)
        moved = 4 * self.block_b * width + work.vector_bytes(self.block_b)
        return max(panels, first, moved) + REDUCTION_BYTES

    def divide(self, work: Work, device: Device, batch: int, rows: int, registers: int) -> tuple[int, int]:
        """Return how many pairs of a tile and a row a program takes, and how many programs there are."""
        pairs, processors = -(-batch // self.block_b) * rows, device.multiprocessors
        at_once = FEW_PROGRAMS
        if processors is not None:
            at_once = processors.at_once(32 * self.num_warps, self.shared_bytes(work), registers)
        each = max(1, -(-pairs // at_once))
        return each, max(1, -(-pairs // each))


def why_not(width: int) -> str | None:
    """Return why the kernel cannot run layers of a width, or None."""
    return f"hidden widths go up to {MAX_WIDTH}, the network has {width}" if width > MAX_WIDTH else None


@lru_cache(maxsize=256)  # every chunk asks
def _first_that_fits(work: Work, device: Device) -> Panels:
    needs = []
    for panels in Panels.candidates(work):
        needs.append(panels.shared_bytes(work))
        if needs[-1] <= device.shared:
            return panels
    raise NoRoom(f"it takes {min(needs):,} bytes of shared memory at least, the device grants {device.shared:,}")
