"""Experiments with micro-kernels: the clock under load, what a ring is filled with, and what products alone reach.

The blocks time themselves, in cycles and nanoseconds; a number is the median over blocks and launches. What a launch
computes is compared with the same in whole numbers or in float64 before another is timed.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from experiment_device import micro, stream
from measuring import DEVICE, REHEARSING, Row, below, synchronize
from torch import Tensor

from fastscore.ops.weight_image import image, rings

TABLE = "experiments"
MOST_BLOCKS = 1024  # more than a device runs at once
LAUNCHES = 1 if REHEARSING else 5
WORDS = 1 << 32
FIRST_ROUNDS, ROUNDS = 2, 3 if REHEARSING else 400  # of products: those that are compared, those that are timed


@dataclass(frozen=True)
class Ring:
    """What streams through a ring for one row of an adaLN network of three blocks, and what of it waits there."""

    width: int
    kilobytes: int  # of all weights
    vectors: int  # floats of a row's vectors
    vector_stages: int

    @property
    def rows(self) -> int:
        return 2 if REHEARSING else 30 * 3200 // self.kilobytes  # milliseconds


RINGS = (Ring(512, 3200, 7504, 1), Ring(256, 832, 3920, 2))
IN_FLIGHT = 128  # KB of a ring


def stage_bytes(kilobytes: int, cluster: int) -> int:
    """Return the bytes of a stage: of three blocks each copies a third, a multiple of 16 bytes, into 128-byte lines."""
    return (kilobytes << 10) // (128 * 3) * 128 * 3 if cluster == 3 else kilobytes << 10


def fill(ring: Ring, kilobytes: int, cluster: int) -> Row:
    """Bytes that arrive in a block's shared memory in a cycle, and need not be multiplied by anything."""
    size, stages = stage_bytes(kilobytes, cluster), IN_FLIGHT // kilobytes
    tiles = 11 if REHEARSING else ring.kilobytes // kilobytes
    name = f"H={ring.width}, {stages} stages of {size} bytes, clusters of {cluster}"
    row = Row(TABLE, name, experiment="E2", what="fill only", variant=name)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(1 << 31), 1 << 31, (tiles, size // 4), dtype=torch.int32, generator=generator).to(DEVICE)
    vectors = torch.zeros(ring.rows, ring.vectors, device=DEVICE)
    sums = torch.zeros(MOST_BLOCKS, 256, dtype=torch.int32, device=DEVICE)
    sizes = (tiles, stages, size, ring.rows, ring.vectors, ring.vector_stages, cluster)

    def launch() -> Tensor:
        def call(spans: Tensor, blocks: ctypes.c_int32) -> bytes:
            addresses = _addresses(weights, vectors, sums, spans)
            return micro().micro_fill(addresses, (ctypes.c_int32 * 7)(*sizes), ctypes.byref(blocks), stream())

        return _launched(call)

    def wrong() -> int:
        blocks = len(launch())
        words = weights[:, :128].cpu().long().sum(0).repeat(2) * ring.rows % WORDS
        return int((sums[:blocks].cpu().long() % WORDS != words).sum())

    def rate(spans: Tensor) -> None:
        row["bytes / cycle and SM"] = ring.rows * tiles * size / float(spans[:, 0].median())

    return _timed(row, launch, lambda: below(wrong(), 1, "the number of wrong sums"), rate)


@dataclass(frozen=True)
class Products:
    """The products of a width: a block's operand (samples, width), and the tensor cores' cycles for one of them."""

    width: int
    samples: int
    inputs: int  # of the weights that lie in shared memory, which stand for all
    cycles: int  # N / 2 for each instruction of 64 samples, N outputs and 16 inputs
    how: str

    def image(self, w: Tensor) -> Tensor:
        """Return the weights as they lie in eight stages of 16 KB."""
        shapes = (tuple(w.shape),)
        return rings([w], shapes, 1 << 14) if self.width == 512 else image([w], shapes, 1 << 14, by_outputs=True)


PRODUCTS = (
    Products(256, 128, 256, 2 * 16 * 2 * 64, "operand in registers, 128 outputs an instruction"),
    Products(512, 64, 128, 2 * 32 * 128, "operand in shared memory, 256 outputs an instruction"),
)


def products(experiment: str, which: Products, epilogue: bool, blocks: int = 0) -> Row:
    """The share of the tensor cores' rate at which products run whose weights are there already."""
    name = f"H={which.width}, {which.how}, {'bias, SiLU, rounding' if epilogue else 'no epilogue'}"
    name += f", {blocks} block" if blocks else ""
    row = Row(TABLE, name, experiment=experiment, what="math only", variant=name)
    w, bias, x = _network(which)
    laid, half = which.image(w), 0.5 * bias
    h = torch.empty(MOST_BLOCKS, which.samples, which.width, device=DEVICE)

    def launch(rounds: int = ROUNDS) -> Tensor:
        def call(spans: Tensor, count: ctypes.c_int32) -> bytes:
            count.value = blocks
            addresses = _addresses(laid, x, half, h, spans)
            function = getattr(micro(), f"micro_products_{which.width}")
            return function(addresses, 0.5, rounds, epilogue, ctypes.byref(count), stream())

        h.fill_(float("nan"))
        return _launched(call)

    def error() -> float:
        count, want = len(launch(FIRST_ROUNDS)), _want(which, epilogue)
        return float((h[:count].double() - want).abs().max() / want.square().mean().sqrt())

    def rate(spans: Tensor) -> None:
        row["of the tensor rate"] = ROUNDS * which.cycles / float(spans[:, 0].median())

    # Rounding an operand to bfloat16 the other way moves one of hundreds of terms by 2^-9, hence four times its root.
    tolerance = 4 * FIRST_ROUNDS**0.5 * 2.0**-9 if epilogue else 1e-4
    return _timed(row, launch, lambda: below(error(), tolerance, "the error"), rate)


@cache
def _network(which: Products) -> tuple[Tensor, Tensor, Tensor]:
    """Return W, the bias, whose size keeps the values of any number of rounds away from zero, and x."""
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(which.width, which.inputs, generator=generator) / which.width**0.5
    bias, x = (torch.randn(shape, generator=generator) for shape in ((which.width,), (which.samples, which.width)))
    return w.bfloat16().to(DEVICE), bias.to(DEVICE), x.to(DEVICE)


def _want(which: Products, epilogue: bool) -> Tensor:
    """Return what the first rounds have to leave, in float64 with operands rounded to bfloat16."""
    w, bias, x = _network(which)
    whole = w.double().repeat(1, which.width // which.inputs).T
    h = x
    for _ in range(FIRST_ROUNDS if epilogue else 1):
        h = h.float().bfloat16().double() @ whole
        h = torch.nn.functional.silu(h + bias.double()) if epilogue else h
    return h


def _timed(row: Row, launch, check, rate) -> Row:
    """Check a launch; time others only if it was right."""
    row.measure("error", check)
    if row["error"] is None:
        return row
    spans = torch.cat([launch() for _ in range(LAUNCHES)])
    row["blocks"] = len(spans) // LAUNCHES
    rate(spans)
    row["GHz"] = float((spans[:, 0] / spans[:, 1]).median())
    row.measure("ms", lambda: 1e-6 * float(spans[:, 1].median()))
    return row


def _launched(call) -> Tensor:
    """Launch on as many blocks as run at once; return their cycles and nanoseconds."""
    spans, blocks = torch.zeros(MOST_BLOCKS, 2, dtype=torch.int64, device=DEVICE), ctypes.c_int32(0)
    if message := call(spans, blocks).decode():
        raise RuntimeError(message)
    synchronize()
    return spans[: blocks.value].cpu().double()


def _stated() -> str:
    """Return the clocks and the power that nvidia-smi states, or nothing where there is none."""
    asked, program = ("clocks.sm", "clocks.max.sm", "clocks.max.mem", "power.limit"), shutil.which("nvidia-smi")
    if program is None:
        return ""
    command = [program, f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return ", ".join(f"{name} {value.strip()}" for name, value in zip(asked, said[0].split(","))) if said else ""


def _addresses(*tensors: Tensor) -> ctypes.Array:
    return (ctypes.c_uint64 * len(tensors))(*(t.data_ptr() for t in tensors))


def clocks() -> Iterator[Row]:
    """What the driver says of clocks; that of a multiprocessor while one block multiplies, and while all do."""
    if said := _stated():
        row = Row(TABLE, "stated clocks", experiment="E0", what="nvidia-smi", variant=said)
        row.tell()
        yield row
    for blocks in (1, 0):
        yield products("E0", PRODUCTS[0], True, blocks)


def fills() -> Iterator[Row]:
    """Every ring with both sizes of a stage and every cluster."""
    for ring in RINGS:
        for kilobytes in (16, 32):
            for cluster in (1, 2, 3, 4):
                yield fill(ring, kilobytes, cluster)


def maths() -> Iterator[Row]:
    """Every product without and with what follows it."""
    for which in PRODUCTS:
        for epilogue in (False, True):
            yield products("E3", which, epilogue)
