r"""The fused kernel for layers that are too wide for the other: weights in panels, activations through memory.

.. math:: f_{br} = c_r^2\,\|a_r\epsilon + b_r x - F(\alpha_r x + \sigma_r\epsilon)\|^2 - \|\epsilon - \epsilon_q\|^2

`density_mlp.py` multiplies a tile by a whole weight, which has to fit shared memory, and keeps saved tiles in
registers. Here the operand of a product is written to memory of the program's own, from where a loop takes PANEL
columns at a time beside PANEL rows of the weight; saved tiles wait in memory too. What a program writes it reads again
soon, so that it stays in the L2 cache as long as few programs run: as many as the device holds at once share all pairs
of a tile and a row. Each f is written once, so the result does not depend on their number.

The reference in the same pass is none or one along the axes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .control import control_residual
from .density_mlp import ACT, ADD, AFFINE, LINEAR, NORM, SAVE, constants, load_x, make_eps, pack, residual
from .launch import Config, Device, Work
from .occupancy import registers_of, remember
from .packing import Layout, Reference
from .panels import Panels
from .tile_ops import advance, affine, layer_norm, matmul, operand, tile


@triton.jit
def _place(memory, BLOCK_B: tl.constexpr, W: tl.constexpr):
    return memory + tl.arange(0, BLOCK_B)[:, None] * W + tl.arange(0, W)[None, :]


@triton.jit
def _put(memory, h):
    """Store a tile: what lay there has been read by all threads, and what is stored may be read by all."""
    tl.debug_barrier()
    tl.store(_place(memory, h.shape[0], h.shape[1]), h)
    tl.debug_barrier()


@triton.jit
def _multiply(
    memory, w_ptr, c, BLOCK_B: tl.constexpr, N: tl.constexpr, WEIGHTS: tl.constexpr, KEY: tl.constexpr,
    PANEL: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the product of an operand in memory, [BB, K], and N columns of weight KEY from column c on."""
    K: tl.constexpr = WEIGHTS[KEY][1]
    STRIDE: tl.constexpr = WEIGHTS[KEY][2]
    P: tl.constexpr = PANEL if PANEL < K else K
    w = w_ptr + WEIGHTS[KEY][0] + c
    total = tl.zeros((BLOCK_B, N), tl.float32)
    for k in tl.range(0, K, P, num_stages=STAGES):
        part = tl.load(memory + k + tl.arange(0, BLOCK_B)[:, None] * K + tl.arange(0, P)[None, :])
        total += matmul(part, tile(w + k * STRIDE, P, N, STRIDE), PRECISION)
    return total


@triton.jit
def _block(
    h, operands, saved, w_ptr, tables, i_b, i_r, FIRST: tl.constexpr, END: tl.constexpr, CODE: tl.constexpr,
    WEIGHTS: tl.constexpr, REFS: tl.constexpr, WIDTH: tl.constexpr, PANEL: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Run straight-line code on h, [BB, H] in float32, as `density_mlp._block` does."""
    for i in tl.static_range(FIRST, END):
        if CODE[i][0] == LINEAR:
            _put(operands, operand(h, PRECISION))
            h = _multiply(
                operands, w_ptr, 0, h.shape[0], WEIGHTS[CODE[i][1]][2], WEIGHTS, CODE[i][1], PANEL, STAGES, PRECISION
            )
        elif CODE[i][0] == AFFINE:
            h = affine(h, tables, i_b, i_r, 0, REFS, CODE[i][1], CODE[i][2])
        elif CODE[i][0] == ACT:
            h = activate(h, CODE[i][1], FAST)
        elif CODE[i][0] == NORM:
            h = layer_norm(h, CODE[i][1], CODE[i][2])
        elif CODE[i][0] == SAVE:
            _put(saved + CODE[i][1] * (h.shape[0] * WIDTH), h)
        else:
            tl.static_assert(CODE[i][0] == ADD, "unknown instruction")
            part = tl.load(_place(saved + CODE[i][1] * (h.shape[0] * WIDTH), h.shape[0], h.shape[1]))
            h = h + affine(part, tables, i_b, i_r, 0, REFS, CODE[i][2], -1)
    return h


@triton.jit
def density_mlp_wide_kernel(
    x_ptr, keys_ptr, points_ptr, rows_ptr, w_ptr, r_ptr, b_ptr, br_ptr, q_ptr, y_ptr,
    f_ptr,  # out; all these as density_mlp_fwd_kernel takes them
    operands_ptr,  # (programs, BLOCK_B, WIDTH), in what the products take
    saved_ptr,  # (programs, SLOTS, BLOCK_B, WIDTH), float32
    B, R, PAIRS_PER_PROGRAM, r_stride, b_stride, br_stride,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGHTS: tl.constexpr,
    REFS: tl.constexpr,
    PRE: tl.constexpr,
    BLOCKS: tl.constexpr,
    CODE: tl.constexpr,
    POST: tl.constexpr,
    KIND: tl.constexpr,
    CONTROL: tl.constexpr,
    WIDTH: tl.constexpr,  # the widest tile
    SLOTS: tl.constexpr,
    PANEL: tl.constexpr,
    STAGES: tl.constexpr,  # panels in flight
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    operands = operands_ptr + program * (BLOCK_B * WIDTH)
    saved = saved_ptr + program * (SLOTS * BLOCK_B * WIDTH)
    tables = (r_ptr, b_ptr, br_ptr, r_stride, b_stride, br_stride, B, R)
    first, pairs = program * PAIRS_PER_PROGRAM, tl.cdiv(B, BLOCK_B).to(tl.int64) * R
    LAST: tl.constexpr = len(WEIGHTS) - 1
    H: tl.constexpr = WEIGHTS[0][2]

    for n in tl.range(0, tl.minimum(PAIRS_PER_PROGRAM, pairs - first), num_stages=1):
        i_r = (first + n) % R
        i_b = (first + n) // R * BLOCK_B + tl.arange(0, BLOCK_B)
        p = rows_ptr + i_r * 6
        sign, alpha, sigma = tl.load(p), tl.load(p + 1), tl.load(p + 2)
        a, b, c = tl.load(p + 3), tl.load(p + 4), tl.load(p + 5)
        h = tl.zeros((BLOCK_B, H), tl.float32)
        for k in tl.range(0, D, BLOCK_D, num_stages=1):
            eps = make_eps(keys_ptr, points_ptr, i_b, i_r, sign, k, B, D, BLOCK_D)
            x = load_x(x_ptr, i_b, k, B, D, BLOCK_D, "")
            y = affine(alpha * x + sigma * eps, tables, i_b, i_r, k, REFS, PRE[0], PRE[1])
            h += matmul(y, tile(w_ptr + WEIGHTS[0][0] + k * H, BLOCK_D, H, H), PRECISION)
        for k in tl.static_range(len(BLOCKS)):
            if BLOCKS[k][0] == 1:  # no loop: its tile may change its width
                h = _block(
                    h, operands, saved, w_ptr, tables, i_b, i_r,
                    BLOCKS[k][1], BLOCKS[k][2], CODE, WEIGHTS, REFS, WIDTH, PANEL, STAGES, PRECISION, FAST,
                )  # fmt: skip
            else:
                for m in tl.range(0, BLOCKS[k][0], num_stages=1):
                    h = _block(
                        h, operands, saved, w_ptr + m * BLOCKS[k][3], advance(tables, m, BLOCKS, k), i_b, i_r,
                        BLOCKS[k][1], BLOCKS[k][2], CODE, WEIGHTS, REFS, WIDTH, PANEL, STAGES, PRECISION, FAST,
                    )  # fmt: skip
        _put(operands, operand(h, PRECISION))
        error = tl.zeros((BLOCK_B,), tl.float32)
        control = tl.zeros((BLOCK_B,), tl.float32)
        for k in tl.range(0, D, BLOCK_D, num_stages=1):
            F = _multiply(operands, w_ptr, k, BLOCK_B, BLOCK_D, WEIGHTS, LAST, PANEL, STAGES, PRECISION)
            eps = make_eps(keys_ptr, points_ptr, i_b, i_r, sign, k, B, D, BLOCK_D)
            x = load_x(x_ptr, i_b, k, B, D, BLOCK_D, "")
            x_t = alpha * x + sigma * eps
            error += residual(F, x, eps, x_t, a, b, tables, i_b, i_r, k, REFS, POST)
            control += control_residual(x, eps, x_t, sigma, tables, q_ptr, y_ptr, i_b, i_r, k, D, REFS, KIND, CONTROL)
        tl.store(f_ptr + i_b * R + i_r, c * c * error - control, mask=i_b < B)


def density_mlp_wide(
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
) -> Tensor:
    """Launch the kernel; return f, float32, shape (B, R). Arguments as in `density_mlp.density_mlp`.

    Raises:
        NoRoom: if no launch fits the device.
    """
    (batch, d), count = x.shape, len(rows)
    layout, control, packed, q, y = pack(x, alpha, sigma, code, weights, tables, reference, precision)
    device, work = Device.of(x.device), Work(layout, d, control[0], 1, precision)
    panels = Panels.choose(work, device)
    key = work, panels, device.capability
    each, programs = panels.divide(work, device, batch, count, registers_of(key))
    f = torch.empty(batch, count, dtype=torch.float32, device=x.device)
    operands = torch.empty(programs, panels.block_b, work.layout.width, dtype=packed[0].dtype, device=x.device)
    slots = number_of_slots(layout)
    saved = torch.empty(programs, max(1, slots), panels.block_b if slots else 1, work.layout.width, device=x.device)
    compiled = density_mlp_wide_kernel[(programs,)](
        x, keys, points, rows, *packed, q, y, f, operands, saved,
        batch, count, each, *(table.shape[-1] for table in packed[1:]),
        **wide_constants(work, control, panels), num_warps=panels.num_warps, num_stages=1,
    )  # fmt: skip
    remember(key, compiled)
    return f


def number_of_slots(layout: Layout) -> int:
    """Return for how many saved tiles a program has a place: a slot's number is its place."""
    return 1 + max(layout.saved, default=-1)


def wide_constants(work: Work, control: tuple, panels: Panels) -> dict:
    """Return the kernel's compile-time arguments."""
    found = constants(work.layout, control, work.d, work.precision, Config(panels.block_b, panels.num_warps, False, 1))
    del found["RESIDENT"]
    found |= {"BLOCK_D": panels.block_d, "WIDTH": work.layout.width, "SLOTS": number_of_slots(work.layout)}
    return found | {"PANEL": panels.panel, "STAGES": panels.stages}
