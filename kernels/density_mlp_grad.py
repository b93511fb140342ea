r"""The gradient of the fused kernel's f, with respect to the data and to a network's parameters, in one pass.

.. math:: g_b = \sum_r v_{br} \frac{\partial f_{br}}{\partial x_b}, \qquad
    G_l = v \frac{\partial f}{\partial (A_l W_l)}, \qquad \frac{\partial}{\partial W_l} \sum v f = A_l^T G_l

A program owns BLOCK_B samples and walks over its rows: forward as `density_mlp.py` does, keeping what the way back
needs (the tape: inputs of activations and norms), then back through the same code. Each part of the rows writes its own
sum of g, and the parts are added in a fixed order.

Of a linear map it stores the input A_l and the gradient G_l of the output, whose product the library makes. The
gradient of a vector operand is summed over what shares it as far as a program sees: a vector of a row over the
program's samples, one of a sample over the program's rows, by adding to what the row before has left. No atomics: the
same numbers every time.

The tape stays in registers where the data alone want a gradient. Parameters want more of it (what is multiplied by a
vector operand), and it goes to memory of the program's own, used again by every row, so that it stays in the caches.

Source: A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, derivative
from .density_mlp import ACT, ADD, AFFINE, LINEAR, NORM, SAVE, constants
from .launch import Config
from .noise import load_normals
from .packing import Layout, block_d
from .tile_ops import PER_ROW, PER_SAMPLE, affine, layer_norm, layer_norm_backward, matmul, matrix, operand, vector

NUM_WARPS = 8


@triton.jit
def _place(tape, C: tl.constexpr, W: tl.constexpr, BLOCK_B: tl.constexpr):
    """Return where a tile of W columns lies in a tape, C columns behind its begin."""
    return tape + C * BLOCK_B + tl.arange(0, BLOCK_B)[:, None] * W + tl.arange(0, W)[None, :]


@triton.jit
def _put(ptr, h, i_b, i_r, B, R, C: tl.constexpr, PRECISION: tl.constexpr):
    """Store an operand of a product: row (i_r, i_b) of the matrix (R B, width) that lies behind C R B numbers."""
    p = ptr + (C * R + i_r * h.shape[1]) * B + i_b[:, None] * h.shape[1] + tl.arange(0, h.shape[1])[None, :]
    tl.store(p, operand(h, PRECISION), mask=(i_b < B)[:, None])


@triton.jit
def _give(g, grads, i_b, i_r, n, REFS: tl.constexpr, K: tl.constexpr):
    """Store the gradient of operand K, given that of every sample, [BB, width]; rows of this program before: n."""
    r_ptr, b_ptr, br_ptr, r_stride, b_stride, br_stride, B, R = grads
    i_d = tl.arange(0, g.shape[1])
    if REFS[K][0] == PER_ROW:
        p = r_ptr + (tl.program_id(0) * R + i_r) * r_stride + REFS[K][1] + i_d
        tl.store(p, tl.sum(g, 0), mask=i_d < REFS[K][2])
    else:
        mask = (i_b < B)[:, None] & (i_d < REFS[K][2])[None, :]
        if REFS[K][0] == PER_SAMPLE:
            i_part = tl.program_id(1).to(tl.int64) * B + i_b
            p = b_ptr + i_part[:, None] * b_stride + REFS[K][1] + i_d[None, :]
            g += tl.load(p, mask=mask & (n > 0), other=0.0)
        else:
            p = br_ptr + (i_b[:, None] * R + i_r) * br_stride + REFS[K][1] + i_d[None, :]
        tl.store(p, g, mask=mask)


@triton.jit(do_not_specialize=["B", "R", "ROWS_PER_PROGRAM"])  # one long compilation for all sizes of chunks
def density_mlp_grad_kernel(
    grad_ptr,  # v, float32 (B, R)
    x_ptr, keys_ptr, points_ptr, rows_ptr, w_ptr, r_ptr, b_ptr, br_ptr,  # as density_mlp_fwd_kernel takes them
    grad_x_ptr,  # out: float32 (SPLITS, B, D)
    error_ptr,  # out: c^2 |a eps + b x - F|^2, float32 (B, R)
    inputs_ptr, outputs_ptr,  # out: A and G of the linear maps, matrices (R B, width) one after the other
    grad_r_ptr, grad_b_ptr, grad_br_ptr,  # out: of vector operands, float32 (TILES, R, .), (SPLITS, B, .), (B, R, .)
    tape_ptr,  # float32 (SPLITS, TILES, TAPE BLOCK_B)
    B, R, ROWS_PER_PROGRAM, r_stride, b_stride, br_stride, grad_r_stride, grad_b_stride, grad_br_stride,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGHTS: tl.constexpr,
    REFS: tl.constexpr,
    PRE: tl.constexpr,
    CODE: tl.constexpr,
    BACK: tl.constexpr,  # (place in the tape or -1, whether an add is the first to reach its slot) of every instruction
    POST: tl.constexpr,
    KIND: tl.constexpr,
    CONTROL: tl.constexpr,
    PLACES: tl.constexpr,  # columns before A and G of every linear map
    OF_X: tl.constexpr,  # what wants a gradient
    OF_WEIGHTS: tl.constexpr,
    OF_TABLES: tl.constexpr,
    TAPE: tl.constexpr,  # columns of a tape in memory; 0 for one in registers
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    first = tl.program_id(1).to(tl.int64) * ROWS_PER_PROGRAM
    tables = (r_ptr, b_ptr, br_ptr, r_stride, b_stride, br_stride, B, R)
    grads = (grad_r_ptr, grad_b_ptr, grad_br_ptr, grad_r_stride, grad_b_stride, grad_br_stride, B, R)
    memory = tape_ptr + (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * (TAPE * BLOCK_B)
    LAST: tl.constexpr = len(WEIGHTS) - 1
    i_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (i_b < B)[:, None] & (i_d < D)
    x = tl.load(x_ptr + i_b[:, None] * D + i_d, mask=mask, other=0.0)
    if OF_X:
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

        h = affine(x_t, tables, i_b, i_r, 0, REFS, PRE[0], PRE[1])
        if OF_WEIGHTS:
            _put(inputs_ptr, h, i_b, i_r, B, R, PLACES[0][0], PRECISION)
        h = matmul(h, matrix(w_ptr, WEIGHTS, 0), PRECISION)
        saved_0 = h
        saved_1 = h
        tape = ()
        for i in tl.static_range(len(CODE)):
            if CODE[i][0] == ACT or CODE[i][0] == NORM or (CODE[i][0] == AFFINE and BACK[i][0] >= 0):
                if TAPE:
                    tl.store(_place(memory, BACK[i][0], h.shape[1], BLOCK_B), h)
                else:
                    tape = tape + (h,)
            if CODE[i][0] == LINEAR:
                if OF_WEIGHTS:
                    _put(inputs_ptr, h, i_b, i_r, B, R, PLACES[CODE[i][1]][0], PRECISION)
                h = matmul(h, matrix(w_ptr, WEIGHTS, CODE[i][1]), PRECISION)
            elif CODE[i][0] == AFFINE:
                h = affine(h, tables, i_b, i_r, 0, REFS, CODE[i][1], CODE[i][2])
            elif CODE[i][0] == ACT:
                h = activate(h, CODE[i][1], FAST)
            elif CODE[i][0] == NORM:
                h = layer_norm(h, CODE[i][1], CODE[i][2])
            elif CODE[i][0] == SAVE:
                if CODE[i][1] == 0:
                    saved_0 = h
                else:
                    saved_1 = h
            else:
                if CODE[i][1] == 0:
                    part = saved_0
                else:
                    part = saved_1
                if BACK[i][0] >= 0:
                    tl.store(_place(memory, BACK[i][0], h.shape[1], BLOCK_B), part)
                h = h + affine(part, tables, i_b, i_r, 0, REFS, CODE[i][2], -1)
        if OF_WEIGHTS:
            _put(inputs_ptr, h, i_b, i_r, B, R, PLACES[LAST][0], PRECISION)
        raw = matmul(h, matrix(w_ptr, WEIGHTS, LAST), PRECISION)
        F = affine(raw, tables, i_b, i_r, 0, REFS, POST[0], POST[1])
        if POST[2] >= 0:
            F = F + affine(x_t, tables, i_b, i_r, 0, REFS, POST[2], -1)
        if TAPE:
            tl.debug_barrier()  # a tile may come back to other threads than those that stored it

        # f = c^2 |a eps + b x - F|^2 - |eps - eps_q|^2, from here backwards.
        error = a * eps + b * x - F
        if not TAPE:
            # A by-product, without which nothing but registers would change in the loop: the compiler would then load
            # all weights before it, twice, and run out of shared memory.
            tl.store(error_ptr + i_b * R + i_r, c * c * tl.sum(error * error, 1), mask=i_b < B)
        d_error = 2.0 * c * c * v * error
        if OF_X:
            grad_x += b * d_error
            if POST[2] >= 0:
                grad_x -= alpha * affine(d_error, tables, i_b, i_r, 0, REFS, POST[2], -1)
        if OF_TABLES:
            if POST[0] >= 0:
                _give(-d_error * raw, grads, i_b, i_r, n, REFS, POST[0])
            if POST[1] >= 0:
                _give(-d_error, grads, i_b, i_r, n, REFS, POST[1])
            if POST[2] >= 0:
                _give(-d_error * x_t, grads, i_b, i_r, n, REFS, POST[2])
        d_h = affine(-d_error, tables, i_b, i_r, 0, REFS, POST[0], -1)
        if OF_WEIGHTS:
            _put(outputs_ptr, d_h, i_b, i_r, B, R, PLACES[LAST][1], PRECISION)
        d_h = matmul(d_h, tl.trans(matrix(w_ptr, WEIGHTS, LAST)), PRECISION)
        d_saved_0 = d_h
        d_saved_1 = d_h
        for i in tl.static_range(len(CODE) - 1, -1, -1):
            if BACK[i][0] >= 0:
                if TAPE:
                    kept = tl.load(_place(memory, BACK[i][0], d_h.shape[1], BLOCK_B))
                else:
                    kept = tape[BACK[i][0]]
            if CODE[i][0] == LINEAR:
                if OF_WEIGHTS:
                    _put(outputs_ptr, d_h, i_b, i_r, B, R, PLACES[CODE[i][1]][1], PRECISION)
                d_h = matmul(d_h, tl.trans(matrix(w_ptr, WEIGHTS, CODE[i][1])), PRECISION)
            elif CODE[i][0] == AFFINE:
                if OF_TABLES:
                    if CODE[i][1] >= 0:
                        _give(d_h * kept, grads, i_b, i_r, n, REFS, CODE[i][1])
                    if CODE[i][2] >= 0:
                        _give(d_h, grads, i_b, i_r, n, REFS, CODE[i][2])
                d_h = affine(d_h, tables, i_b, i_r, 0, REFS, CODE[i][1], -1)
            elif CODE[i][0] == ACT:
                d_h = d_h * derivative(kept, CODE[i][1], FAST)
            elif CODE[i][0] == NORM:
                d_h = layer_norm_backward(d_h, kept, CODE[i][1], CODE[i][2])
            elif CODE[i][0] == SAVE:
                if BACK[i][1]:
                    if CODE[i][1] == 0:
                        d_h = d_h + d_saved_0
                    else:
                        d_h = d_h + d_saved_1
            else:
                if OF_TABLES:
                    if CODE[i][2] >= 0:
                        _give(d_h * kept, grads, i_b, i_r, n, REFS, CODE[i][2])
                part = affine(d_h, tables, i_b, i_r, 0, REFS, CODE[i][2], -1)
                if CODE[i][1] == 0:
                    if BACK[i][1]:
                        d_saved_0 = part
                    else:
                        d_saved_0 = d_saved_0 + part
                else:
                    if BACK[i][1]:
                        d_saved_1 = part
                    else:
                        d_saved_1 = d_saved_1 + part
        if OF_WEIGHTS:
            _put(outputs_ptr, d_h, i_b, i_r, B, R, PLACES[0][1], PRECISION)
        if OF_X or (OF_TABLES and (PRE[0] >= 0 or PRE[1] >= 0)):
            d_y = matmul(d_h, tl.trans(matrix(w_ptr, WEIGHTS, 0)), PRECISION)
            if OF_TABLES:
                if PRE[0] >= 0:
                    _give(d_y * x_t, grads, i_b, i_r, n, REFS, PRE[0])
                if PRE[1] >= 0:
                    _give(d_y, grads, i_b, i_r, n, REFS, PRE[1])
            if OF_X:
                grad_x += alpha * affine(d_y, tables, i_b, i_r, 0, REFS, PRE[0], -1)
                if KIND == "diagonal":
                    pull = vector(x, tables, i_b, i_r, 0, REFS, CONTROL[1])
                    own = vector(x, tables, i_b, i_r, 0, REFS, CONTROL[0]) * eps - pull * x
                    grad_x += 2.0 * v * pull * (own + vector(x, tables, i_b, i_r, 0, REFS, CONTROL[2]))
        if TAPE:
            tl.debug_barrier()  # the next row writes where this one has read
    if OF_X:
        o = (tl.program_id(1).to(tl.int64) * B + i_b[:, None]) * D + i_d
        tl.store(grad_x_ptr + o, grad_x, mask=mask)


def grad_constants(
    layout: Layout,
    control: tuple,
    d: int,
    precision: str,
    wanted: tuple[bool, bool, bool],
    places: tuple[tuple[int, int], ...],
    samples: int,
) -> dict:
    """Return the kernel's compile-time arguments.

    Arguments:
        wanted: whether x, the weights and the vector operands want a gradient; x alone has its tape in registers.
        places: columns before A and G of every linear map.
        samples: of a program.
    """
    # Resident: one straight block of code.
    found = constants(layout, control, d, precision, Config(samples, NUM_WARPS, resident=True, stages=1))
    in_memory, shapes = any(wanted[1:]), layout.weights
    back, kept, width = [], 0, shapes[0][2]
    for op in found["CODE"]:
        width = shapes[op[1]][2] if op[0] == LINEAR.value else width
        scaled = (op[0] == AFFINE.value and op[1] >= 0) or (op[0] == ADD.value and op[2] >= 0)
        taped = op[0] in (ACT.value, NORM.value) or (wanted[2] and scaled)
        back.append([kept if taped else -1, 0])
        kept += taped * (width if in_memory else 1)
    reached = set()
    for i in reversed(range(len(back))):
        op = found["CODE"][i]
        if op[0] == ADD.value:
            back[i][1] = int(op[1] not in reached)
            reached.add(op[1])
        elif op[0] == SAVE.value:
            back[i][1] = int(op[1] in reached)
            reached.discard(op[1])
    for name in ("BLOCKS", "RESIDENT", "STAGES"):
        del found[name]
    switches = dict(zip(("OF_X", "OF_WEIGHTS", "OF_TABLES"), wanted, strict=True))
    more = {"BACK": tuple(map(tuple, back)), "PLACES": places, "TAPE": max(16, kept) if in_memory else 0}
    return found | switches | more | {"BLOCK_D": block_d(d)}
