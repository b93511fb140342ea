"""The gradient of the fused kernel's f with respect to the data alone: guidance, attribution, Langevin steps.

`density_mlp_grad.py` computes it, with the tape in registers.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .density_mlp import pack
from .density_mlp_grad import NUM_WARPS, density_mlp_grad_kernel, grad_constants
from .launch import REDUCTION_BYTES, Device, NoRoom, Work
from .occupancy import Multiprocessors, best_splits
from .packing import MAX_BLOCK_D, Reference

BLOCK_B = 32
ALONE = (True, False, False)  # what wants a gradient
MAX_TAPE = 512  # columns of activations that a tile keeps: 64 registers a thread


def why_not(code: tuple, widths: list[tuple[int, int]], d: int, mixture: bool, full: bool) -> str | None:
    """Return why the kernel cannot differentiate code that the forward kernel runs, or None."""
    if d > MAX_BLOCK_D:
        return f"gradients go up to {MAX_BLOCK_D} dimensions in a kernel, got {d}"
    if mixture or full:
        return "gradients in a kernel need a reference along the axes"
    width, tape = d, 0
    for op in code:
        width = widths[op[1]][0] if op[0] == "linear" else width
        tape += width * (op[0] in ("act", "norm"))
    return f"the network keeps {tape} activations a row, a tile holds {MAX_TAPE}" if tape > MAX_TAPE else None


def shared_bytes(work: Work) -> int:
    """Return a bound of the shared memory that the compiled kernel takes: weights come one by one, in both ways."""
    return max(work.product_bytes(BLOCK_B, both_ways=True), work.data_bytes(BLOCK_B)) + REDUCTION_BYTES


def check_room(work: Work, device: Device) -> None:
    """Raise NoRoom if the kernel does not fit a device."""
    needs = shared_bytes(work)
    if needs > device.shared:
        raise NoRoom(f"the gradient takes {needs:,} bytes of shared memory, the device grants {device.shared:,}")


def density_mlp_dx(
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
    splits: int | None,
) -> Tensor:
    """Return the gradient with respect to x, float32, shape (B, d); grad (B, R), the others as in `density_mlp`."""
    (batch, d), count = x.shape, len(rows)
    layout, control, packed, _, _ = pack(x, alpha, sigma, code, weights, tables, reference, precision)
    if splits is None:
        splits = 1
        if (processors := Multiprocessors.of(x.device)) is not None:
            work = Work(layout, d, control[0], 1 if reference is None else len(reference[0]), precision)
            at_once = processors.at_once(32 * NUM_WARPS, shared_bytes(work))
            splits = best_splits(triton.cdiv(batch, BLOCK_B), count, at_once)
    parts, error = torch.empty(splits, batch, d, device=x.device), torch.empty(batch, count, device=x.device)
    density_mlp_grad_kernel[(triton.cdiv(batch, BLOCK_B), splits)](
        grad, x, keys, points, rows, *packed, parts, error, packed[0], packed[0], *(error,) * 4,
        batch, count, triton.cdiv(count, splits), *(table.shape[-1] for table in packed[1:]), 0, 0, 0,
        **grad_constants(layout, control, d, precision, ALONE, ((0, 0),), BLOCK_B), num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return parts.sum(0)
