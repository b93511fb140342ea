"""How a fused kernel is launched: tile, warps, where its weights lie; the first choice that fits shared memory.

`Config.shared_bytes` bounds from above what Triton's compiler allocates, so that no launch is refused for it. What a
formula cannot know (which of what lives at once shares its place) is on the safe side: of 667 launches of 243 random
networks, compiled by Triton 3.9, none took more; of the 150 that took over 80 KB, 120 took 0.9 to 1 of the bound and
the least 0.54. benchmarks/fits.py compiles others. Registers need no formula: a thread has 255 at most, and 256
threads, more than which no choice has, take 65,280 of the 65,536 that every GPU has.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .blocks import operands_in
from .occupancy import Multiprocessors, best_splits, registers_of
from .packing import MAX_BLOCK_D, Layout, block_d, padded

OPERANDS = {"tf32x3": torch.float32, "tf32": torch.float32, "ieee": torch.float32}
OPERANDS |= {"bf16": torch.bfloat16, "fp16": torch.float16, "emulated bf16": torch.float32}
# Widths above which the kernel would live in spilled registers.
MAX_WIDTH = {2: 256, 4: 128}
# What all weights may take and stay in shared memory, on Hopper and elsewhere.
RESIDENT_BYTES = {True: 144 << 10, False: 96 << 10}
REDUCTION_BYTES = 1024  # of sums over a row's columns


class NoRoom(ValueError):
    """No launch of a kernel fits the device; the message says how much the smallest takes."""


@dataclass(frozen=True)
class Device:
    """What of a device decides a launch.

    Compute capability, 90 for 9.0; bytes of shared memory a program; its multiprocessors, None where rows need no
    splitting.
    """

    capability: int
    shared: int
    multiprocessors: Multiprocessors | None = None

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """Return a GPU's; on a CPU, where Triton interprets, nothing is too large."""
        if device.type != "cuda":
            return cls(90, 1 << 40)
        properties = torch.cuda.get_device_properties(device)
        capability = 10 * properties.major + properties.minor
        return cls(capability, properties.shared_memory_per_block_optin, Multiprocessors.of(device))


@dataclass(frozen=True)
class Work:
    """What a fused kernel is to do, as far as it decides the launch."""

    layout: Layout
    d: int
    reference: str  # a kind of control.py
    components: int
    precision: str

    @property
    def itemsize(self) -> int:
        return OPERANDS[self.precision].itemsize

    @property
    def chunked(self) -> bool:
        return self.d > MAX_BLOCK_D

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of what a product multiplies by at once: of the first and last weight one chunk."""
        sizes = [(k, n) for _, k, n in self.layout.weights]
        if self.chunked:
            sizes[0], sizes[-1] = (block_d(self.d), sizes[0][1]), (sizes[-1][0], block_d(self.d))
        return tuple(sizes)

    @property
    def weight_bytes(self) -> int:
        return self.itemsize * sum(k * n for k, n in self.matrices)

    def operand_bytes(self, rows: int, width: int) -> int:
        """Of a tile on its way into a product; its three parts take turns, two at a time."""
        return rows * width * self.itemsize * (2 if self.precision == "tf32x3" else 1)

    def product_bytes(self, rows: int, both_ways: bool = False) -> int:
        """Of the largest product: weight, operand and a vector at once; `both_ways`: or by the weight's transpose."""
        together = max if self.precision == "tf32x3" else lambda *parts: sum(parts)
        products = (
            together(self.itemsize * k * n, self.operand_bytes(rows, max(k, n) if both_ways else k))
            for k, n in self.matrices
        )
        return max(products) + self.vector_bytes(rows)

    def data_bytes(self, rows: int) -> int:
        """Of a tile of data, an operand and a vector at once."""
        widest = max(k for k, _ in self.matrices)
        return 4 * rows * block_d(self.d) + self.operand_bytes(rows, widest) + self.vector_bytes(rows)

    def vector_bytes(self, rows: int) -> int:
        """Of the largest vector operand."""
        outside = [_vector_bytes(v, rows) for v in operands_in((self.layout.pre, self.layout.post))]
        inside = [_vector_bytes(v, rows) for v in operands_in(self.layout.body)]
        return max(*(min(v, 4 * rows * block_d(self.d)) for v in outside), *inside, 0, 0)

    @property
    def basis_bytes(self) -> int:
        """Of the eigenbasis of a full reference, an operand in float32."""
        return 4 * padded(self.d) ** 2 if "full" in self.reference else 0


@dataclass(frozen=True)
class Config:
    """How the kernel is launched: samples a tile, warps, weights in shared memory or streamed, parts of the rows."""

    block_b: int
    num_warps: int
    resident: bool
    stages: int  # of streamed weights: 2 fetches those of the next of equal layers ahead, 1 does not
    splits: int = 1

    @classmethod
    def from_heuristic(cls, work: Work, device: Device) -> Config:
        """Return the first of `candidates` that fits.

        Raises:
            NoRoom: if none does.
        """
        return _first_that_fits(work, device)

    @classmethod
    def candidates(cls, work: Work, capability: int) -> Iterator[Config]:
        """Yield launches, best first by what spills least as compiled (docs/kernels.md), each lighter than before.

        Half-precision products on Hopper take 64 rows a warpgroup, and weights stay in shared memory while they fit.
        Elsewhere, and for float32's three products a multiplication, smaller tiles on more warps keep the accumulator,
        the saved tile and eps in registers.
        """
        hopper, width, basis = capability == 90, work.layout.width, work.basis_bytes
        basis = basis if work.d > 64 else 0  # up to 64 dimensions it finds room beside the weights
        resident = not work.chunked and work.weight_bytes + basis <= RESIDENT_BYTES[hopper]
        small = cls(32, 8, resident=False, stages=2)
        if work.itemsize == 4:
            chosen = [replace(small, stages=2 if width <= 64 else 1)]
        elif width > 128 or "mixture" in work.reference or (work.reference == "full" and (basis or not hopper)):
            chosen = [replace(small, resident=resident)]
        elif width <= 64:
            chosen = [cls(64, 4, resident=resident, stages=2), cls(64, 4, resident=False, stages=2)]
        else:
            one_tile = len(work.layout.saved) < 2  # with two, 128 samples spill as compiled, 64 do not
            chosen = [cls(128, 8, resident=True, stages=2)] if hopper and resident and one_tile else []
            chosen.append(cls(64, 8, resident=False, stages=2))
        streamed = replace(chosen[-1], resident=False)
        lighter = [streamed, replace(streamed, stages=1)]
        if streamed.block_b > small.block_b:
            lighter += [small, replace(small, stages=1)]
        yield from dict.fromkeys((*chosen, *lighter, replace(small, block_b=16, stages=1)))

    def shared_bytes(self, work: Work, capability: int) -> int:
        """Return a bound of the shared memory that the compiled forward kernel takes.

        Weights stay, pass through buffers of a loop over equal layers (with the vectors of a layer), or come one by
        one. Between registers and matrix units an operand is rearranged there, and so is a vector that differs among
        samples. On Hopper products of 64 rows read their weights while the next ones arrive: two buffers.
        """
        rows, sizes, item = self.block_b, work.matrices, work.itemsize
        other = max(work.data_bytes(rows), reference_bytes(work.reference, work.components, work.d, rows))
        if self.resident:
            return work.weight_bytes + other + REDUCTION_BYTES
        buffers, loops = 2 if capability == 90 and rows >= 64 else 1, [0]
        for times, code, _, _ in work.layout.blocks(unrolled=False):
            if times > 1 and self.stages > 1:
                used = [sizes[op[1]] for op in code if op[0] == "linear"]
                layer = [_vector_bytes(v, rows) for v in operands_in(code)]
                moved = max([*layer, *(work.operand_bytes(rows, k) for k, _ in used)])
                loops.append(buffers * item * sum(k * n for k, n in used) + sum(layer) + moved)
        return max(max(other, work.product_bytes(rows)) + REDUCTION_BYTES, *loops)

    def split(self, work: Work, device: Device, batch: int, rows: int) -> Config:
        """Split the rows so that all programs run in as few waves, and as short ones, as the device can."""
        processors, splits = device.multiprocessors, 1
        if processors is not None:
            registers = registers_of((work, self.kept, device.capability))
            shared = self.shared_bytes(work, device.capability)
            at_once = processors.at_once(32 * self.num_warps, shared, registers)
            splits = best_splits(-(-batch // self.block_b), rows, at_once)
        return replace(self, splits=splits)

    @property
    def kept(self) -> Config:
        """The same without splits, which the compiled kernel does not depend on."""
        return replace(self, splits=1)


# What a device has refused though the bound says that it fits.
_REFUSED: set[tuple[Work, Device, Config]] = set()


@lru_cache(maxsize=256)  # every chunk asks
def _first_that_fits(work: Work, device: Device) -> Config:
    needs = []
    for config in Config.candidates(work, device.capability):
        needs.append(config.shared_bytes(work, device.capability))
        if needs[-1] <= device.shared and (work, device, config) not in _REFUSED:
            return config
    raise NoRoom(f"it takes {min(needs):,} bytes of shared memory at least, the device grants {device.shared:,}")


def refuse(work: Work, device: Device, config: Config, error: Exception) -> None:
    """Choose this launch no more, since the device refused it, and warn: the bound was wrong."""
    _REFUSED.add((work, device, config.kept))
    _first_that_fits.cache_clear()
    warnings.warn(
        f"a Triton kernel with tiles of {config.block_b} samples did not start ({error}); a smaller one takes its "
        "place. Please report the network's shape: it should not have been chosen",
        RuntimeWarning,
        stacklevel=2,
    )


def reference_bytes(kind: str, components: int, d: int, rows: int) -> int:
    """Return a bound of what a reference's products take of shared memory, in float32's three products.

    Hopper's products of 64 rows read both factors' three parts there, two at a time; others let them take turns.
    """
    width, rows = padded(d), max(32, rows)  # eight warps spread 16 rows over as much
    if kind == "mixture":
        k = padded(components)
        return 4 * max(k * width, 2 * rows * max(k, width))
    if kind == "full":
        return 4 * (max(width, 2 * rows) if rows < 64 else 2 * (width + rows)) * width
    return 4 * (width + 2 * rows + 4) * width if kind == "full mixture" else 0


def _vector_bytes(operand: tuple, rows: int) -> int:
    """Return the bytes of a vector operand in a tile: one for all samples, or each their own."""
    level, _, width = operand
    return 4 * padded(width) * (1 if level == "r" else rows)
