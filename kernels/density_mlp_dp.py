"""The gradient of the fused kernel's f with respect to a network's parameters, and to the data where they want one.

One sweep of `density_mlp_grad.py` stores what every linear map takes, A, and the gradient of what it gives, G, in the
precision of the products; A^T G is one product of the library for linear maps of one shape, in float32's sums.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from .blocks import LEVELS
from .density_mlp import pack
from .density_mlp_grad import NUM_WARPS, density_mlp_grad_kernel, grad_constants
from .launch import REDUCTION_BYTES, Device, NoRoom, Work
from .occupancy import Multiprocessors, best_splits
from .operand_gradients import columns_of
from .packing import MAX_BLOCK_D, Reference, padded
from .weights import weight_groups

MAX_CODE = 40  # instructions that are unrolled, both ways: those of a loop count once
# Parts of a product's rows, summed afterwards: for some layers of 64 x 64 alone it would keep few multiprocessors busy.
PARTS = 16


def samples_of(work: Work) -> int:
    """Return how many samples a program owns.

    Half as many of wide layers: with 32 of them the kernel spilled 280 bytes a thread at width 256 (in
    half precision) and 344 at width 128 (in float32), with 16 it spills none.
    """
    return 16 if work.itemsize * work.layout.width > 256 else 32


def why_not(d: int, of_x: bool, mixture: bool, full: bool) -> str | None:
    """Return why the kernel cannot differentiate code that the forward kernel runs, or None."""
    if d > MAX_BLOCK_D:
        return f"gradients go up to {MAX_BLOCK_D} dimensions in a kernel, got {d}"
    if of_x and (mixture or full):
        return "gradients of x in a kernel need a reference along the axes"
    return None


def shared_bytes(work: Work) -> int:
    """Return a bound of the shared memory that the compiled kernel takes.

    Weights come one by one, in both ways; a tile passes through on its way to memory.
    """
    samples, widest = samples_of(work), max(max(k, n) for k, n in work.matrices)
    stored = 4 * samples * widest + work.vector_bytes(samples)
    return max(work.product_bytes(samples, both_ways=True), work.data_bytes(samples), stored) + REDUCTION_BYTES


def check_room(work: Work, device: Device) -> None:
    """Raise NoRoom if the kernel does not fit a device, or takes too long to compile."""
    length = sum(len(code) for _, code, _, _ in work.layout.blocks(unrolled=False))
    if length > MAX_CODE:
        raise NoRoom(f"gradients go up to {MAX_CODE} instructions that are no loop of equal layers, got {length}")
    needs = shared_bytes(work)
    if needs > device.shared:
        raise NoRoom(f"the gradient takes {needs:,} bytes of shared memory, the device grants {device.shared:,}")


def row_bytes(code: tuple, shapes: list[tuple[int, int]], d: int, itemsize: int) -> int:
    """Return what the sweep takes of memory for one row, at most: A and G of every linear map, and a tape.

    Arguments:
        shapes: (out, in) of the weights.
        itemsize: of an operand of the products.
    """
    width, total = padded(d), 0
    for op in code:
        if op[0] == "linear":
            out, in_ = map(padded, shapes[op[1]])
            total, width = total + itemsize * (in_ + out), out
        elif op[0] in ("act", "norm", "affine", "add"):
            total += 4 * width * (1 + (op[0] == "affine"))  # the tape, and the gradients of vector operands
    return total


def density_mlp_dp(
    grad: Tensor,
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    rows: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    code: tuple,
    weights: list[Tensor],
    tables: list[Tensor],
    reference: Reference | None,
    precision: str,
    wanted: tuple[bool, bool, bool],
    splits: int | None = None,
) -> list[Tensor]:
    """Return the gradients of x (B, d), of tables by level, and of weights by shape; an empty tensor is not wanted.

    Arguments:
        grad: of f, float32, shape (B, R); the others as in `density_mlp`.
        wanted: whether x, the weights and the tables want one.
        splits: parts of the rows; as many as keep the device busy if None.

    Returns:
        x's in float32; those of vectors of a row (R, .), their sum over the rows (.,), of a sample (B, .) and of a pair
        (B, R, .) in the tables' dtype, in the columns of `Uses`; for each of `weight_groups` (n, out, in), padded, in
        the weights' dtype.
    """
    (batch, d), count = x.shape, len(rows)
    of_x, of_weights, of_tables = wanted
    reference = reference if of_x else None  # what is subtracted depends on x alone
    layout, control, packed, _, _ = pack(x, alpha, sigma, code, weights, tables, reference, precision)
    groups, places = weight_groups(layout.weights)
    work = Work(layout, d, control[0], 1, precision)
    samples = samples_of(work)
    splits = _splits(work, x, count) if splits is None else splits
    per_program, tiles = triton.cdiv(count, splits), triton.cdiv(batch, samples)
    splits = triton.cdiv(count, per_program)  # none without rows, who would not write
    constants = grad_constants(layout, control, d, precision, wanted, places, samples)

    def room(needed: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape if needed else (0,) * len(shape), dtype=dtype, device=x.device)

    columns = columns_of(layout)
    of_rows, of_samples, of_pairs = (of_tables and columns[level] > 0 for level in LEVELS)
    grad_x = room(of_x, splits, batch, d)
    inputs, outputs = (
        room(of_weights, batch * count * sum(shape[side] for shape in layout.weights), dtype=packed[0].dtype)
        for side in (1, 2)
    )
    grad_r = room(of_rows, tiles, count, columns["r"])
    grad_b = room(of_samples, splits, batch, columns["b"])
    grad_br = room(of_pairs, batch, count, columns["br"])
    tape = room(True, splits * tiles * constants["TAPE"] * samples)
    density_mlp_grad_kernel[(tiles, splits)](
        grad, x, keys, points, rows, *packed, grad_x, tape, inputs, outputs, grad_r, grad_b, grad_br, tape,
        batch, count, per_program, *(table.shape[-1] for table in packed[1:]), *columns.values(),
        **constants, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    by_row = _sum(grad_r, of_rows)
    alike = of_rows and any(table.shape[:2] == (1, 1) for table in tables)
    all_rows = by_row.sum(0) if alike else room(False, columns["r"])
    dtypes = {table.dtype for table in tables}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    vectors = (t.to(dtype) for t in (by_row, all_rows, _sum(grad_b, of_samples), grad_br))
    products = (
        _product(inputs, outputs, batch * count, group, places[group[2][0]], of_weights).to(weights[0].dtype)
        for group in groups
    )
    return [_sum(grad_x, of_x), *vectors, *products]


def _sum(parts: Tensor, needed: bool) -> Tensor:
    """Return the sum over the first dimension."""
    if not needed:
        return parts.new_empty(parts.shape[1:])
    return parts.sum(0) if len(parts) > 1 else parts[0]


def _product(inputs: Tensor, outputs: Tensor, rows: int, group: tuple, place: tuple[int, int], needed: bool) -> Tensor:
    """Return G^T A of all linear maps of a shape, float32, (n, out, in)."""
    in_, out, own = group
    if not needed:
        return inputs.new_empty(0, 0, 0)
    parts = math.gcd(rows, PARTS)
    a, g = (
        t[before * rows : (before + len(own) * width) * rows].view(len(own) * parts, rows // parts, width)
        for t, before, width in zip((inputs, outputs), place, (in_, out), strict=True)
    )
    # Half precision, which only a GPU gets, sums in float32 and is not rounded in between.
    options = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    found = torch.bmm(g.transpose(1, 2), a, **options)
    return found.view(len(own), parts, out, in_).sum(1) if parts > 1 else found


def _splits(work: Work, x: Tensor, rows: int) -> int:
    """Return into how many parts to split the rows so that the device is busy."""
    if (processors := Multiprocessors.of(x.device)) is None:
        return 1
    at_once = processors.at_once(32 * NUM_WARPS, shared_bytes(work))
    return best_splits(triton.cdiv(len(x), samples_of(work)), rows, at_once)
