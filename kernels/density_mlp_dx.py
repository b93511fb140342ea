r"""The gradient of the fused kernel's f with respect to the data, in one pass that stores no activation.

.. math:: g_b = \sum_r v_{br} \frac{\partial f_{br}}{\partial x_b}

A program owns BLOCK_B samples and walks over its rows: forward as `density_mlp.py` does, keeping the inputs of
activations and norms in registers (the tape), then back through the same code. Each part of the rows writes its own
sum, and the parts are added in a fixed order. It serves frozen networks: guidance, attribution, Langevin steps.

Source: A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, derivative
from .density_mlp import ACT, ADD, AFFINE, LINEAR, NORM, SAVE, constants, pack
from .launch import REDUCTION_BYTES, Config, Device, NoRoom, Work
from .noise import load_normals
from .occupancy import Multiprocessors, best_splits
from .packing import MAX_BLOCK_D, Reference, block_d
from .tile_ops import affine, layer_norm, layer_norm_backward, matmul, matrix, vector

BLOCK_B, NUM_WARPS = 32, 8
MAX_TAPE = 512  # columns of activations that a tile keeps: 64 registers a thread


@triton.jit
def density_mlp_dx_kernel(
    grad_ptr,  # v, float32 (B, R)
    x_ptr, keys_ptr, points_ptr, rows_ptr, w_ptr, r_ptr, b_ptr, br_ptr,  # as density_mlp_fwd_kernel takes them
    grad_x_ptr,  # out: float32 (SPLITS, B, D)
    error_ptr,  # out: c^2 |a eps + b x - F|^2, float32 (B, R)
    B, R, ROWS_PER_PROGRAM, r_stride, b_stride, br_stride,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGHTS: tl.constexpr,
    REFS: tl.constexpr,
    PRE: tl.constexpr,
    CODE: tl.constexpr,
    BACK: tl.constexpr,  # (tape position or -1, whether an add is the first to reach its slot) of every instruction
    POST: tl.constexpr,
    KIND: tl.constexpr,
    CONTROL: tl.constexpr,
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    first = tl.program_id(1).to(tl.int64) * ROWS_PER_PROGRAM
    tables = (r_ptr, b_ptr, br_ptr, r_stride, b_stride, br_stride, B, R)
    LAST: tl.constexpr = len(WEIGHTS) - 1
    i_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (i_b < B)[:, None] & (i_d < D)
    x = tl.load(x_ptr + i_b[:, None] * D + i_d, mask=mask, other=0.0)
    grad_x = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)

    for n in tl.range(0, tl.minimum(ROWS_PER_PROGRAM, R - first), num_stages=1):
        i_r = first + n
        p = rows_ptr + i_r * 6
        sign, alpha, sigma = tl.load(p), tl.load(p + 1), tl.load(p + 2)
        a, b, c = tl.load(p + 3), tl.load(p + 4), tl.load(p + 5)
        v = tl.load(grad_ptr + i_b * R + i_r, mask=i_b < B, other=0.0)[:, None]
        eps = sign * load_normals(keys_ptr, points_ptr, i_b[:, None], i_r, i_d, mask, D)
        eps = tl.where(mask, eps, 0.0)
        x_t = alpha * x + sigma * eps

        h = matmul(affine(x_t, tables, i_b, i_r, 0, REFS, PRE[0], PRE[1]), matrix(w_ptr, WEIGHTS, 0), PRECISION)
        saved_0 = h
        saved_1 = h
        tape = ()
        for i in tl.static_range(len(CODE)):
            if CODE[i][0] == LINEAR:
                h = matmul(h, matrix(w_ptr, WEIGHTS, CODE[i][1]), PRECISION)
            elif CODE[i][0] == AFFINE:
                h = affine(h, tables, i_b, i_r, 0, REFS, CODE[i][1], CODE[i][2])
            elif CODE[i][0] == ACT:
                tape = tape + (h,)
                h = activate(h, CODE[i][1], FAST)
            elif CODE[i][0] == NORM:
                tape = tape + (h,)
                h = layer_norm(h, CODE[i][1], CODE[i][2])
            elif CODE[i][0] == SAVE:
                if CODE[i][1] == 0:
                    saved_0 = h
                else:
                    saved_1 = h
            else:
                if CODE[i][1] == 0:
                    h = h + affine(saved_0, tables, i_b, i_r, 0, REFS, CODE[i][2], -1)
                else:
                    h = h + affine(saved_1, tables, i_b, i_r, 0, REFS, CODE[i][2], -1)
        F = matmul(h, matrix(w_ptr, WEIGHTS, LAST), PRECISION)
        F = affine(F, tables, i_b, i_r, 0, REFS, POST[0], POST[1])
        if POST[2] >= 0:
            F = F + affine(x_t, tables, i_b, i_r, 0, REFS, POST[2], -1)

        # f = c^2 |a eps + b x - F|^2 - |eps - eps_q|^2, from here backwards.
        error = a * eps + b * x - F
        # A by-product, without which nothing but registers would change in the loop: the compiler would then load all
        # weights before it, twice, and run out of shared memory.
        tl.store(error_ptr + i_b * R + i_r, c * c * tl.sum(error * error, 1), mask=i_b < B)
        d_error = 2.0 * c * c * v * error
        grad_x += b * d_error
        d_x_t = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
        if POST[2] >= 0:
            d_x_t -= affine(d_error, tables, i_b, i_r, 0, REFS, POST[2], -1)
        d_F = affine(-d_error, tables, i_b, i_r, 0, REFS, POST[0], -1)
        d_h = matmul(d_F, tl.trans(matrix(w_ptr, WEIGHTS, LAST)), PRECISION)
        d_saved_0 = d_h
        d_saved_1 = d_h
        for j in tl.static_range(len(CODE)):
            if CODE[len(CODE) - 1 - j][0] == LINEAR:
                w = matrix(w_ptr, WEIGHTS, CODE[len(CODE) - 1 - j][1])
                d_h = matmul(d_h, tl.trans(w), PRECISION)
            elif CODE[len(CODE) - 1 - j][0] == AFFINE:
                d_h = affine(d_h, tables, i_b, i_r, 0, REFS, CODE[len(CODE) - 1 - j][1], -1)
            elif CODE[len(CODE) - 1 - j][0] == ACT:
                d_h = d_h * derivative(tape[BACK[len(CODE) - 1 - j][0]], CODE[len(CODE) - 1 - j][1], FAST)
            elif CODE[len(CODE) - 1 - j][0] == NORM:
                kept = tape[BACK[len(CODE) - 1 - j][0]]
                d_h = layer_norm_backward(d_h, kept, CODE[len(CODE) - 1 - j][1], CODE[len(CODE) - 1 - j][2])
            elif CODE[len(CODE) - 1 - j][0] == SAVE:
                if BACK[len(CODE) - 1 - j][1]:
                    if CODE[len(CODE) - 1 - j][1] == 0:
                        d_h = d_h + d_saved_0
                    else:
                        d_h = d_h + d_saved_1
            else:
                part = affine(d_h, tables, i_b, i_r, 0, REFS, CODE[len(CODE) - 1 - j][2], -1)
                if CODE[len(CODE) - 1 - j][1] == 0:
                    if BACK[len(CODE) - 1 - j][1]:
                        d_saved_0 = part
                    else:
                        d_saved_0 = d_saved_0 + part
                else:
                    if BACK[len(CODE) - 1 - j][1]:
                        d_saved_1 = part
                    else:
                        d_saved_1 = d_saved_1 + part
        d_y = matmul(d_h, tl.trans(matrix(w_ptr, WEIGHTS, 0)), PRECISION)
        d_x_t += affine(d_y, tables, i_b, i_r, 0, REFS, PRE[0], -1)
        grad_x += alpha * d_x_t
        if KIND == "diagonal":
            pull = vector(x, tables, i_b, i_r, 0, REFS, CONTROL[1])
            own = vector(x, tables, i_b, i_r, 0, REFS, CONTROL[0]) * eps - pull * x
            grad_x += 2.0 * v * pull * (own + vector(x, tables, i_b, i_r, 0, REFS, CONTROL[2]))
    o = (tl.program_id(1).to(tl.int64) * B + i_b[:, None]) * D + i_d
    tl.store(grad_x_ptr + o, grad_x, mask=mask)


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
    config = Config(BLOCK_B, NUM_WARPS, resident=True, stages=1)  # resident: one straight block of code
    if splits is None:
        splits = 1
        if (processors := Multiprocessors.of(x.device)) is not None:
            work = Work(layout, d, control[0], 1 if reference is None else len(reference[0]), precision)
            at_once = processors.at_once(32 * NUM_WARPS, shared_bytes(work))
            splits = best_splits(triton.cdiv(batch, BLOCK_B), count, at_once)
    parts, error = torch.empty(splits, batch, d, device=x.device), torch.empty(batch, count, device=x.device)
    density_mlp_dx_kernel[(triton.cdiv(batch, BLOCK_B), splits)](
        grad, x, keys, points, rows, *packed, parts, error,
        batch, count, triton.cdiv(count, splits), *(table.shape[-1] for table in packed[1:]),
        **dx_constants(layout, control, d, precision, config), num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return parts.sum(0)


def dx_constants(layout, control: tuple, d: int, precision: str, config: Config) -> dict:
    """Return the kernel's compile-time arguments."""
    found = constants(layout, control, d, precision, config)
    back, kept, reached = [], 0, set()
    for op in found["CODE"]:
        taped = op[0] in (ACT.value, NORM.value)
        back.append([kept if taped else -1, 0])
        kept += taped
    for i in reversed(range(len(back))):
        op = found["CODE"][i]
        if op[0] == ADD.value:
            back[i][1] = int(op[1] not in reached)
            reached.add(op[1])
        elif op[0] == SAVE.value:
            back[i][1] = int(op[1] in reached)
            reached.discard(op[1])
    for name in ("BLOCKS", "RESIDENT", "STAGES", "BLOCK_D"):
        del found[name]
    return found | {"BACK": tuple(map(tuple, back)), "BLOCK_D": block_d(d)}
