"""Row programs for ahead-of-time compilation: networks of a given shape, and random ones over the whole grammar."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastscore.kernels import launch, packing
from fastscore.kernels.names import ACTIVATIONS
from torch import Tensor

WIDTHS = (1, 16, 20, 32, 48, 64, 96, 100, 128, 128, 160, 200, 256, 256, 256)
WIDE = (129, 200, 256, 257, 300, 512)
DIMENSIONS = (1, 2, 5, 13, 16, 31, 50, 64, 64, 100, 128, 150, 784)
REFERENCES = ("none", "diagonal", "diagonal", "full", "mixture", "full mixture")
COMPONENTS = (2, 5, 10, 33, 100)
PRECISIONS = ("bf16", "bf16", "bf16", "fp16", "tf32", "tf32x3")
ROWS = BATCH = 2


@dataclass(frozen=True)
class Problem:
    """A row program with its tensors, all zero, and the reference that goes with it."""

    name: str
    code: tuple
    weights: list[Tensor]
    tables: list[Tensor]
    d: int
    reference: tuple | None
    precision: str

    def packed(self) -> tuple[launch.Work, tuple]:
        """Return what decides the launch, and the reference's operands, by the functions that a launch uses."""
        into, dtype = packing.Tables(BATCH, ROWS), launch.OPERANDS[self.precision]
        layout, _ = packing.pack_network(self.code, self.weights, self.tables, self.d, into, dtype)
        x, ones = torch.zeros(BATCH, self.d), torch.ones(ROWS)
        operands = packing.pack_control(self.reference, x, ones, ones, into)[0]
        components = 1 if self.reference is None else len(self.reference[0])
        return launch.Work(layout, self.d, operands[0], components, self.precision), operands


class Code:
    """A row program while it is written; vectors depend on a row, a sample, a pair or nothing, drawn by `levels`."""

    def __init__(self, generator: random.Random, levels: tuple[tuple[int, int], ...]):
        self.generator, self.levels = generator, levels
        self.code: list[tuple] = []
        self.weights: list[Tensor] = []
        self.tables: list[Tensor] = []

    def linear(self, in_: int, out: int, bias: bool = True) -> None:
        self.weights.append(torch.zeros(out, in_))
        self.code.append(("linear", len(self.weights) - 1))
        if bias:
            self.code.append(("affine", -1, self.vector(out)))

    def vector(self, width: int) -> int:
        self.tables.append(torch.zeros(*self.generator.choice(self.levels), width))
        return len(self.tables) - 1

    def __call__(self, *op) -> None:
        self.code.append(op)


def problem(
    family: Callable[..., None], width: int, depth: int, d: int, reference: str, precision: str, act: str = "silu"
) -> Problem:
    """Return a network of given shape whose vectors depend on the row, and a reference of ten components if many."""
    into = Code(random.Random(0), ((1, ROWS),))
    family(into, d, width, depth, act)
    found = _reference(reference, 10 if "mixture" in reference else 1, d)
    name = f"{family.__name__} H={width} L={depth} d={d}, {reference}, {precision}"
    return Problem(name, tuple(into.code), into.weights, into.tables, d, found, precision)


def random_problem(generator: random.Random, wide: bool = False) -> Problem:
    """Draw a network, its widths, depth, dimensions, reference and precision.

    Arguments:
        wide: whether it is wider than the kernel takes whose weights come whole.
    """
    family = generator.choice(FAMILIES)
    width, depth = generator.choice(WIDE if wide else WIDTHS), generator.choice((0, 1, 2, 3, 3, 6, 12))
    d = generator.choice(DIMENSIONS)
    precision, kind = generator.choice(PRECISIONS), generator.choice(REFERENCES)
    if wide and launch.OPERANDS[precision].itemsize < 4:
        width = max(width, 300)
    elif not wide and packing.padded(width) > launch.MAX_WIDTH[launch.OPERANDS[precision].itemsize]:
        width //= 2
    if (wide or d > packing.MAX_BLOCK_D) and kind != "none":
        kind = "diagonal"
    level = generator.choice(("row", "row", "sample", "pair", "mixed"))
    per_row, per_sample, per_pair = (1, ROWS), (BATCH, 1), (BATCH, ROWS)
    levels = {"row": ((1, 1), per_row), "sample": (per_row, per_sample), "pair": (per_pair,)}
    into = Code(generator, levels.get(level, ((1, 1), per_row, per_sample, per_pair)))
    family(into, d, width, depth, generator.choice(ACTIVATIONS))
    components = generator.choice(COMPONENTS) if "mixture" in kind else 1
    name = f"{family.__name__} H={width} L={depth} d={d}, vectors per {level}, {kind} {components}, {precision}"
    reference = _reference(kind, components, d)
    return Problem(name, tuple(into.code), into.weights, into.tables, d, reference, precision)


def _reference(kind: str, k: int, d: int) -> tuple | None:
    if kind == "none":
        return None
    basis = torch.eye(d, dtype=torch.float64).expand(k, d, d) if "full" in kind else torch.empty(0)
    weight = torch.full((k,), 1 / k, dtype=torch.float64)
    return weight, torch.zeros(k, d, dtype=torch.float64), torch.ones(k, d, dtype=torch.float64), basis


def plain(into: Code, d: int, width: int, depth: int, act: str) -> None:
    into.linear(d, width)
    for _ in range(depth):
        into("act", act)
        into.linear(width, width)
    into("act", act)
    into.linear(width, d)


def bare(into: Code, d: int, width: int, depth: int, act: str) -> None:
    """Layers without biases, which read no vector."""
    into.linear(d, width, bias=False)
    for _ in range(depth):
        into("act", act)
        into.linear(width, width, bias=False)
    into("act", act)
    into.linear(width, d, bias=False)


def adaln(into: Code, d: int, width: int, depth: int, act: str) -> None:
    """Residual blocks of norm, modulation and two linear maps with a gate, as MAR's head has them."""
    into.linear(d, width)
    for _ in range(depth):
        into("save", 0)
        into("norm", 1e-6)
        into("affine", into.vector(width), into.vector(width))
        into.linear(width, width)
        into("act", act)
        into.linear(width, width, bias=False)
        into("affine", into.vector(width), into.vector(width))
        into("add", 0, -1)
    into("norm", 1e-6)
    into("affine", into.vector(width), into.vector(width))
    into.linear(width, d)


def single(into: Code, d: int, width: int, depth: int, act: str) -> None:
    """Residual blocks of norm, modulation, activation and one linear map."""
    into.linear(d, width)
    for _ in range(depth):
        into("save", 1)
        into("norm", 1e-5)
        into("affine", into.vector(width), into.vector(width))
        into("act", act)
        into.linear(width, width)
        into("add", 1, into.vector(width))
    into("act", act)
    into.linear(width, d)


def expanding(into: Code, d: int, width: int, depth: int, act: str) -> None:
    """Residual blocks whose inner layer is wider than the tile that they add to."""
    narrow = max(1, width // 4)
    into.linear(d, narrow)
    for _ in range(depth):
        into("save", 0)
        into("norm", 1e-6)
        into.linear(narrow, width)
        into("act", act)
        into.linear(width, narrow)
        into("add", 0, -1)
    into("act", act)
    into.linear(narrow, d)


def preconditioned(into: Code, d: int, width: int, depth: int, act: str) -> None:
    """Layers of unequal widths between c_in x_t and c_skip x_t + c_out F."""
    into("save", 0)
    into("affine", into.vector(d), -1)
    last = max(1, width - 5)
    into.linear(d, last)
    for layer in range(depth):
        wide = width if layer % 2 == 0 else max(1, width // 2 - 3)
        into("act", act)
        into.linear(last, wide)
        last = wide
    into("act", act)
    into.linear(last, d)
    into("affine", into.vector(d), -1)
    into("add", 0, into.vector(d))


def two_tiles(into: Code, d: int, width: int, depth: int, act: str) -> None:
    """Equal layers that read a tile saved before them and save another of their own."""
    into.linear(d, width)
    into("save", 0)
    for _ in range(depth):
        into("save", 1)
        into.linear(width, width)
        into("act", act)
        into("add", 0, into.vector(width))
        into("add", 1, -1)
    into.linear(width, d, bias=False)


def long_skip(into: Code, d: int, width: int, depth: int, act: str) -> None:
    """A tile that waits for all layers, which differ in their activations and so make no loop."""
    into.linear(d, width)
    into("save", 0)
    for layer in range(depth):
        into("act", ACTIVATIONS[layer % len(ACTIVATIONS)])
        into.linear(width, width)
    into("add", 0, -1)
    into("act", act)
    into.linear(width, d)


FAMILIES = (plain, adaln, adaln, single, expanding, preconditioned, two_tiles, long_skip)
