"""The ops through the compiled kernels of `fastscore._C`, and through Triton's for all that they do not cover.

What they cover: row programs with bfloat16 weights, hidden widths up to 512 on Hopper (compute capability 9.0) and 128
on Ampere and later, d up to 128, one saved tile (two up to width 64), with a Gaussian reference along the axes in the
same pass; another reference is evaluated by itself, by Triton's kernel or PyTorch. `why_not_fused` says what stands in
the way. Of those programs Hopper runs some as steps (`cuda_steps.py`), and the others instruction by instruction;
`steps_of` says which. Wider programs, up to 1,024, run as steps or not at all.
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

from ..kernels import packing
from ..kernels.names import ACTIVATIONS, INSTRUCTIONS
from . import cuda_steps
from . import triton as through_triton
from .cuda_steps import PackedSteps, aligned
from .select import native
from .steps import Steps
from .task import Evaluation, Task
from .triton import (
    bytes_dp,
    control,
    density_mlp_dp,
    density_mlp_dx,
    loss_difference,
    loss_gradient,
    loss_rows,
    perturb,
    residual,
    residual_backward,
    why_not_control,
    why_not_dp,
    why_not_dx,
)  # fmt: skip
from .weight_image import image

__all__ = [
    "bytes_dp", "control", "density_mlp", "density_mlp_dp", "density_mlp_dx", "loss_difference", "loss_gradient",
    "loss_rows", "perturb", "residual", "residual_backward", "why_not_control", "why_not_dp", "why_not_dx",
    "why_not_fused",
]  # fmt: skip

WIDTHS = (64, 128, 256, 512)
DATA = (16, 64, 128)
MAX_INSTRUCTIONS = 160
LEVEL_SHIFT = 28


class Shape(NamedTuple):
    """What a kernel is compiled for, and what decides how it divides shared memory."""

    hidden: int  # padded width
    data: int  # padded dimensions
    linears: int


def shape_of(code: tuple, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, d: int) -> Shape | str:
    """Return the padded shape of a network with weights (out, in), or why no compiled kernel has it."""
    if dtype != torch.bfloat16:
        return f"weights are {dtype}, the compiled kernels take bfloat16"
    if d > DATA[-1]:
        return f"d goes up to {DATA[-1]}, got {d}"
    linear = [i for i, op in enumerate(code) if op[0] == "linear"]
    reason = packing.why_not(code, list(shapes), d, WIDTHS[-1])
    if reason is not None:
        return reason
    widest = max(shapes[code[i][1]][0] for i in linear[:-1])
    hidden = next(w for w in WIDTHS if w >= widest)
    body = code[linear[0] + 1 : linear[-1]]
    slots = len({op[1] for op in body if op[0] == "save"})
    if slots > (2 if hidden == 64 else 1):
        return f"{slots} tiles are saved at width {hidden}; one goes, two up to width 64"
    if len(body) > MAX_INSTRUCTIONS:
        return f"a program has up to {MAX_INSTRUCTIONS} instructions between its first and last layer, got {len(body)}"
    data = DATA[-1] if hidden == WIDTHS[-1] else next(n for n in DATA if n >= d)
    return Shape(hidden, data, len(linear))


@lru_cache(maxsize=256)
def why_not_fused(task: Task) -> str | None:
    """Return why no compiled kernel runs a row program on its device, or None."""
    steps = steps_of(task)
    if isinstance(steps, Steps):
        return None
    if task.dtype == torch.bfloat16 and _beyond_instructions(task):
        reason = packing.why_not(task.code, list(task.shapes), task.d, cuda_steps.WIDTHS[-1])
        return reason or f"networks wider than {WIDTHS[-1]} run as steps alone, and {steps}"
    shape = shape_of(task.code, task.shapes, task.dtype, task.d)
    if isinstance(shape, str):
        return shape
    if not shared_by_samples(task.code, task.levels):
        return "scales and shifts of x_t and of the prediction have to be the same for all samples"
    # Every vector counted as one a row: the most that shared memory would have to hold.
    vectors = sum(i >= 0 for op in task.code if op[0] in ("affine", "add") for i in op[-1 if op[0] == "add" else 1 :])
    stride = vectors * shape.hidden + 8 * shape.data
    found = native().plan(*shape, stride, *_device(task.device))
    return found if isinstance(found, str) else None


def why_not_unasked(task: Task) -> str | None:
    """Return why "auto" leaves a program to others that `why_not_fused` has no objection to, or None."""
    if not _beyond_instructions(task):
        return None
    return f"measurements end at width {WIDTHS[-1]}; backend='cuda' takes it"


def _beyond_instructions(task: Task) -> bool:
    """Return whether a hidden layer is wider than kernels that interpret instructions are."""
    linear = [op[1] for op in task.code if op[0] == "linear"]
    return max((task.shapes[k][0] for k in linear[:-1]), default=0) > WIDTHS[-1]


@lru_cache(maxsize=256)
def steps_of(task: Task) -> Steps | str:
    """Return the steps as which a program runs on its device, or why not; instructions may hold what steps do not."""
    if task.dtype != torch.bfloat16:
        return f"weights are {task.dtype}, steps take bfloat16"
    reason = packing.why_not(task.code, list(task.shapes), task.d, cuda_steps.WIDTHS[-1])
    if reason is not None:
        return reason
    return cuda_steps.fitting(task.code, task.shapes, task.levels, task.d, native(), _device(task.device))


def how(task: Task) -> str:
    """Return in words how a compiled kernel runs a program that `why_not_fused` has no objection to."""
    steps = steps_of(task)
    return f"by instructions, since {steps}" if isinstance(steps, str) else "as steps, which no GPU has timed yet"


def density_mlp(given: Evaluation) -> Tensor:
    task = given.task
    if why_not_fused(task) is not None:
        return through_triton.density_mlp(given)
    x, keys, points, rows, alpha, sigma, _, weights, tables, reference = given
    inside = not reference or in_the_same_pass(reference)
    steps = steps_of(task)
    arguments = x, keys, points, rows, alpha, sigma
    packed = pack(*arguments, task.code, weights, tables, reference if inside else [], steps)
    f = torch.empty(len(x), len(rows), dtype=torch.float32, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    launch(native(), packed, f, x.device.index, stream)
    return f if inside else f - control(x, keys, points, rows[:, 0], alpha, sigma, reference)


def in_the_same_pass(reference: list[Tensor]) -> bool:
    """Return whether a compiled kernel evaluates a reference itself: one Gaussian along the axes."""
    return len(reference[0]) == 1 and reference[3].numel() == 0


@dataclass(frozen=True)
class Packed:
    """A launch's arguments on the device, and the program as the bytes of csrc/density_mlp.h's structures."""

    shape: Shape
    x: Tensor  # (B, D)
    keys: Tensor  # (B, 2, D)
    points: Tensor  # (R, D)
    rows: Tensor  # (R, 8)
    weights: Tensor  # bytes of the tiles
    tables: tuple[Tensor, Tensor, Tensor]  # per row, sample and pair; an empty one has no columns
    operands: tuple[int, ...]  # PRE scale, shift; POST scale, shift, skip; the reference's keep, pull, offset
    program: bytes


def shared_by_samples(code: tuple, levels: Sequence[str]) -> bool:
    """Return whether all samples share the scales and shifts of input and output, which a compiled kernel asks for."""
    linear = [i for i, op in enumerate(code) if op[0] == "linear"]
    outside = code[: linear[0]] + code[linear[-1] + 1 :]
    used = [i for op in outside for i in {"affine": op[1:], "add": op[2:]}.get(op[0], ()) if i >= 0]
    return all(levels[i] == "r" for i in used)


def pack(
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    rows: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    code: tuple,
    weights: list[Tensor],
    tables: list[Tensor],
    reference: list[Tensor],
    steps: Steps | str = "asked for",
) -> Packed | PackedSteps:
    """Lay out all that a compiled kernel reads; plain torch, on any device.

    Every call packs anew, since parameters can change unseen (docs/architecture.md); so few operations matter.

    Arguments:
        steps: of the program, as `steps_of` or `cuda_steps.fitting` returns them; a text, whatever it says, is for the
            kernels that interpret instructions.
    """
    if isinstance(steps, Steps):
        return cuda_steps.pack(x, keys, points, rows, alpha, sigma, steps, weights, tables, reference)
    (batch, d), count = x.shape, len(rows)
    shape = shape_of(code, [tuple(w.shape) for w in weights], weights[0].dtype, d)
    if isinstance(shape, str):
        raise ValueError(f"no compiled kernel runs this network: {shape}")
    into = packing.Tables(batch, count, shape.hidden, shape.data)
    pre, body, post, order = packing.split_network(code, weights, tables, d, into)
    control, _, _ = packing.pack_control(tuple(reference) or None, x, alpha, sigma, into)
    missing = ((),) * 3 if control[0] == "none" else control[1:]
    slots = sorted({op[1] for op in body if op[0] == "save"})
    hidden, data = shape.hidden, shape.data
    shapes = ((hidden, data), *((hidden, hidden),) * (shape.linears - 2), (data, hidden))
    beyond, stage = data - d, 128 * min(128, max(hidden, data))  # of dimensions; bytes of a tile of weights
    none = x.new_empty(count, 4)  # nobody reads it, but a row's copy is 16 bytes at least
    return Packed(
        shape=shape,
        x=aligned(x, beyond),
        keys=aligned(keys, beyond),
        points=aligned(points, beyond),
        rows=aligned(rows, 2),
        weights=image([weights[k] for k in order], shapes, stage),
        tables=tuple(into.matrix(level, x) if into.columns[level] else none for level in packing.LEVELS),
        operands=tuple(_operand(o) for o in (*pre, *post, *missing)),
        program=b"".join(_instruction(op, slots) for op in body),
    )


@dataclass(frozen=True)
class Config:
    """How a launch's blocks share the work, which changes no result; 0: the launch chooses (csrc/density_mlp.cpp)."""

    cluster: int = 0  # blocks that share the weights they stream; chosen: as many as read 256 samples, so that a
    # weight is loaded once for 256 rows of a product
    splits: int = 0  # parts of the rows; chosen: those that leave multiprocessors idle least
    clusters: int = 0  # where steps run, that share the pairs of a tile and a row; chosen: as many as run at once
    shared_limit: int = 0  # where steps run, the most bytes of shared memory a block may take: fewer make the ring
    # shorter, or leave keys and x outside; chosen: what the device grants


def launch(
    module: ModuleType,
    packed: Packed | PackedSteps,
    f: Tensor,
    device: int,
    stream: int,
    config: Config = Config(),
) -> None:
    """Launch the kernel that a packed network asks for; `module` is `fastscore._C` or what stands in for it."""
    if isinstance(packed, PackedSteps):
        return cuda_steps.launch(
            module, packed, f, device, stream, (config.cluster, config.clusters, config.shared_limit)
        )
    module.density_mlp(
        *packed.shape,
        [t.data_ptr() for t in (packed.x, packed.keys, packed.points, packed.rows, packed.weights, *packed.tables, f)],
        [len(packed.x), len(packed.rows), *(t.shape[-1] for t in packed.tables)],
        list(packed.operands),
        packed.program,
        device,
        stream,
        config.cluster,
        config.splits,
    )


def _operand(reference: tuple) -> int:
    """Number a reference (level, offset, width): the level above bit 28, -1 for none."""
    return (packing.LEVELS.index(reference[0]) << LEVEL_SHIFT) | reference[1] if reference else -1


def _instruction(op: tuple, slots: list[int]) -> bytes:
    """Return the bytes of an instruction: code, argument, scale, shift, value."""
    name, *arguments = op
    argument, scale, shift, value = 0, -1, -1, 0.0
    if name == "affine":
        scale, shift = (_operand(o) for o in arguments)
    elif name == "act":
        argument = ACTIVATIONS.index(arguments[0])
    elif name == "norm":
        argument, value = arguments
    elif name == "save":
        argument = slots.index(arguments[0])
    elif name == "add":
        argument, scale = slots.index(arguments[0]), _operand(arguments[1])
    return struct.pack("<iiiif", INSTRUCTIONS.index(name), argument, scale, shift, value)


@cache
def _device(device: torch.device) -> tuple[int, int]:
    """Return a device's compute capability, 90 for 9.0, and the bytes of shared memory that it grants a block."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_properties(device).shared_memory_per_block_optin
