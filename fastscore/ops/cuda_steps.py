"""Steps as the compiled kernels of Hopper read them: which networks fit, and the layout of all that a launch reads.

The kernels cover programs of steps (`fastscore.ops.steps`) with bfloat16 weights, vectors that all samples share,
hidden widths up to 1,024 and d up to 64, as far as shared memory goes: at width 64 all weights have to fit, elsewhere
the vectors of a row beside a ring. Everything else up to width 512 is run by the kernels that interpret instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels import packing
from ..kernels.names import ACTIVATIONS
from .step_tables import Folded, Vector, fold
from .steps import Residual, Steps, cut
from .weight_image import image, rings, rings_of_halves

WIDTHS, DATA = (64, 128, 256, 512, 1024), (16, 64)
DEEP = 512  # from here on d is padded to 64
HALVED = 1024  # here two blocks have half of the outputs each
MAX_STEPS = 96  # between the first and the last
HEAD = 16  # floats of a record before P
KINDS = {"residual": 0, "first": 1, "dense": 1, "last": 1}  # numbers of csrc/steps.h; 2: dense with a scale


class Shape(NamedTuple):
    """What a kernel is compiled for, and what decides how it divides shared memory."""

    hidden: int  # padded width
    data: int  # padded dimensions
    padded: bool  # whether a norm is narrower
    linears: int
    record: int  # floats of a row's record, of one block where two divide the outputs

    @property
    def parts(self) -> int:
        """Blocks that divide the outputs."""
        return 2 if self.hidden == HALVED else 1


def shape_of(steps: Steps, shapes: Sequence[tuple[int, int]], d: int) -> Shape | str:
    """Return the padded shape of a program of steps with weights (out, in), or why no kernel has it."""
    if d > DATA[-1]:
        return f"steps run at d up to {DATA[-1]}, got {d}"
    if len(steps.middle) > MAX_STEPS:
        return f"steps are up to {MAX_STEPS} between the first and the last layer, got {len(steps.middle)}"
    order = steps.weights
    widest = max(shapes[k][0] for k in order[:-1])
    if widest > WIDTHS[-1]:
        return f"steps run at widths up to {WIDTHS[-1]}, the network has {widest}"
    hidden = next(w for w in WIDTHS if w >= widest)
    data = DATA[-1] if hidden >= DEEP else next(n for n in DATA if n >= d)
    normed = [shapes[s.first][1] for s in steps.middle if isinstance(s, Residual) and s.eps is not None]
    normed += [shapes[steps.last.weight][1]] * (steps.last.eps is not None)
    scaled = [any(by >= 0 for by, _ in a) for a in (steps.after, *(s.after for s in steps.middle))]
    vectors = 1 + scaled[0] + (steps.last.eps is not None)
    vectors += sum(4 if isinstance(s, Residual) else 1 + by for s, by in zip(steps.middle, scaled[1:]))
    ends = 5 + _scales(steps.pre) + 2 * _scales(steps.post)  # P, four of the comparison; a scale and a skip at most
    record = HEAD + vectors * hidden // (2 if hidden == HALVED else 1) + ends * data
    return Shape(hidden, data, any(w < hidden for w in normed), len(order), record)


def _scales(code: tuple) -> bool:
    """Return whether instructions around the linear maps do more than shift."""
    return any(op[0] == "add" or (op[0] == "affine" and op[1] >= 0) for op in code)


def fitting(
    code: tuple[tuple, ...],
    shapes: Sequence[tuple[int, int]],
    levels: Sequence[str],
    d: int,
    module: ModuleType,
    limits: tuple[int, int],
) -> Steps | str:
    """Return the steps of a program that a kernel runs on a device, or why none does.

    Arguments:
        code, shapes, levels, d: see `fastscore.ops.task.Task`; a program that `packing.why_not` has no objection to.
        module: `fastscore._C` or what stands in for it.
        limits: the device's compute capability, 90 for 9.0, and the bytes of shared memory that a block may have.
    """
    steps = cut(code, tuple(levels))
    if isinstance(steps, str):
        return steps
    shape = shape_of(steps, shapes, d)
    if isinstance(shape, str):
        return shape
    found = module.steps_plan(*shape, *limits)
    return found if isinstance(found, str) else steps


@dataclass(frozen=True)
class PackedSteps:
    """A launch's arguments on the device, and the steps as the bytes of csrc/steps.h's structures."""

    shape: Shape
    x: Tensor  # (B, D)
    keys: Tensor  # (B, 2, D)
    weights: Tensor  # bytes of the tiles
    records: Tensor  # (R, record), one of every part behind another
    columns: tuple[int, ...]  # in a record: scales of x_t and of the prediction, multiple of x_t, comparison
    steps: bytes


def pack(
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    rows: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    steps: Steps,
    weights: list[Tensor],
    tables: list[Tensor],
    reference: list[Tensor],
) -> PackedSteps:
    """Lay out all that a kernel reads; plain torch, on any device."""
    d = x.shape[1]
    shape = shape_of(steps, [tuple(w.shape) for w in weights], d)
    if isinstance(shape, str):
        raise ValueError(f"no compiled kernel runs these steps: {shape}")
    folded, ends = fold(steps, weights, tables)
    hidden, data = shape.hidden, shape.data
    records = _Records(len(rows), shape.parts)
    records.append(_head(rows, x), HEAD)
    records.append(points.view(torch.float32), data)
    records.divided_from = records.end
    described = [_described(step, weights, records, hidden) for step in folded]
    records.divided_to = records.end
    around = ends.pre_scale, ends.post_scale, ends.skip
    columns = [-1 if v is None else records.place(records.add(v, data, weights)) for v in around]
    columns.append(records.place(records.add(ends.post_shift, data, weights)))
    for vector in _control(x, rows[:, :1], alpha, sigma, reference):
        records.append(vector, data)
    missing = shape.record - records.place(records.end)
    if missing:  # a scale that is there before a skip, or none behind it
        records.append(_constant(0.0, torch.float64, x.device), missing)
    shapes = ((hidden, data), *((hidden, hidden),) * (shape.linears - 2), (data, hidden))
    return PackedSteps(
        shape=shape,
        x=aligned(x, data - d),
        keys=aligned(keys, data - d),
        weights=_image([weights[k] for k in steps.weights], shapes, hidden),
        records=records.finish(weights),
        columns=tuple(columns),
        steps=b"".join([described[0], described[-1], *described[1:-1]]),
    )


def _image(weights: list[Tensor], shapes: tuple[tuple[int, int], ...], hidden: int) -> Tensor:
    """Return the weights' tiles in the order in which the kernel of a width reads them."""
    if hidden == HALVED:
        return rings_of_halves(weights, shapes, 2 * 256 * 16)
    if hidden == DEEP:
        return rings(weights, shapes, 2 * 256 * 32)
    return image(weights, shapes, 128 * min(128, hidden), by_outputs=True)


def _control(x: Tensor, sign: Tensor, alpha: Tensor, sigma: Tensor, reference: list[Tensor]) -> list[Tensor]:
    """Return keep, pull and offset of the reference along the axes, zeros where there is none."""
    if not reference:
        return [_constant(0.0, torch.float64, x.device)] * 3
    into = packing.Tables(len(x), len(alpha))
    packing.pack_control((reference[0], reference[1], reference[2], reference[3]), x, alpha, sigma, into)
    keep, pull, offset = into.columns["r"]
    return [sign * keep, pull, offset]


def _head(rows: Tensor, x: Tensor) -> Tensor:
    """Return alpha, sigma, a, b and c^2 of rows of sign, alpha, sigma, a, b and c, whose sign sigma and a take."""
    sign, c, one = rows[:, 0], rows[:, 5], _one(x.device).expand(len(rows))
    return rows[:, 1:] * torch.stack([one, sign, sign, one, c], 1)


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)


@lru_cache(maxsize=16)
def _factors(factors: tuple[tuple[int, int, float], ...], columns: int, device: torch.device) -> Tensor:
    """Return a vector of ones but for some columns, (first, width, factor) each."""
    found = torch.ones(columns, device="cpu")
    for first, width, factor in factors:
        found[first : first + width] = factor
    return found.to(device)


@lru_cache(maxsize=16)
def _columns(firsts: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Return the numbers of `width` columns from each of some on."""
    return (torch.tensor(firsts, device="cpu")[:, None] + torch.arange(width, device="cpu")).reshape(-1).to(device)


@lru_cache(maxsize=16)
def _of_parts(first: int, last: int, end: int, parts: int, device: torch.device) -> Tensor:
    """Return the numbers of the columns of every part's record, where those from first to last are divided."""
    columns, block = torch.arange(end, device="cpu"), WIDTHS[-1]
    between = columns[first:last].reshape(-1, parts, block // parts)
    return torch.cat([torch.cat([columns[:first], own.reshape(-1), columns[last:]]) for own in between.unbind(1)]).to(
        device
    )


class _Records:
    """Records while they grow: every operation is a launch, and every call packs anew, so few make all of them.

    Vectors of hidden layers, which lie between others, are divided in the end where blocks have parts of the outputs.
    """

    def __init__(self, rows: int, parts: int) -> None:
        self.rows, self.parts, self.end = rows, parts, 0
        self.divided_from, self.divided_to = 0, 1 << 30  # columns
        self.into = packing.Tables(1, rows)
        self.factors: list[tuple[int, int, float]] = []
        self.shifted: dict[tuple[int, ...], list[tuple[int, Vector]]] = {}  # by the weight's shape

    def append(self, values: Tensor, width: int) -> int:
        """Append values (1 or R, up to width) and zeros up to `width` columns; return the first of them."""
        start, self.end = self.end, self.end + width
        self.into.add(values[None], values.shape[1], width)
        return start

    def place(self, column: int) -> int:
        """Return where a column is in the record of a part: the first of it, if it is a hidden vector's first."""
        divided = min(column, self.divided_to) - self.divided_from
        return column - max(0, divided) // self.parts * (self.parts - 1)

    def add(self, vector: Vector, width: int, weights: list[Tensor]) -> int:
        """Append a vector; what it has beside its base is added in the end, for all vectors at once."""
        base = vector.base
        if not isinstance(base, Tensor):
            base = _constant(base, weights[0].dtype, weights[0].device).expand(1, vector.width)
        start = self.append(base, width)
        if vector.factor != 1.0:
            self.factors.append((start, vector.width, vector.factor))
        if vector.shift is not None:
            self.shifted.setdefault(tuple(weights[vector.weight].shape), []).append((start, vector))
        return start

    def finish(self, weights: list[Tensor]) -> Tensor:
        """Return the records, float32; products with weights in float64, since TF32 may be on."""
        found = self.into.matrix("r", weights[0])
        for (width, inputs), vectors in self.shifted.items():
            shifts = torch.stack([v.shift.expand(self.rows, inputs) for _, v in vectors if v.shift is not None])
            matrices = torch.stack([weights[v.weight] for _, v in vectors])
            through = torch.bmm(shifts.double(), matrices.double().transpose(1, 2)).to(torch.float32)
            columns = _columns(tuple(start for start, _ in vectors), width, found.device)
            found.index_add_(1, columns, through.transpose(0, 1).reshape(self.rows, -1))
        if self.factors:
            found *= _factors(tuple(self.factors), self.end, found.device)
        if self.parts == 1:
            return found
        return found[:, _of_parts(self.divided_from, self.divided_to, self.end, self.parts, found.device)]


@lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((1, 1), value, dtype=dtype, device=device)


def _described(step: Folded, weights: list[Tensor], records: _Records, hidden: int) -> bytes:
    """Write a step's vectors, and return its bytes, those of csrc/steps.h's structure."""
    at = records.place(records.end)
    for vector in step.vectors:
        records.add(vector, hidden, weights)
    activation = -1 if step.activation is None else ACTIVATIONS.index(step.activation)
    width = 0 if step.eps is None else weights[step.weights[0]].shape[1]
    kind = KINDS[step.kind] + step.scaled
    norm = width, 1 / width if width else 0.0, step.eps or 0.0
    return struct.pack("<iiiiffff", kind, activation, at, *norm, step.before, step.factor)


def launch(
    module: ModuleType, packed: PackedSteps, f: Tensor, device: int, stream: int, config: tuple[int, int, int]
) -> None:
    """Launch the kernel of packed steps.

    Arguments:
        config: blocks of a cluster, clusters, and the most bytes of shared memory, as `cuda.Config` has them.
    """
    module.steps(
        *packed.shape,
        [t.data_ptr() for t in (packed.x, packed.keys, packed.weights, packed.records, f)],
        [len(packed.x), len(packed.records)],
        list(packed.columns),
        packed.steps,
        device,
        stream,
        *config,
    )


def aligned(t: Tensor, beyond: int) -> Tensor:
    """Return t, contiguous and at a multiple of 16 bytes, as its loads are, with `beyond` zeros behind every line.

    The same tensor where it is so already.
    """
    t = pad(t, (0, beyond)) if beyond > 0 else t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()
