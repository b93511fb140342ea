"""A network's code forward, keeping a tape, and back: what the kernel of the gradients runs between two products.

The tape holds what the way back needs of the way there: the inputs of activations and norms, and what vector operands
multiply where these want a gradient. It is a tuple of tiles in registers, or columns of memory; BACK says where.
"""

import triton
import triton.language as tl

from .activations import activate, derivative
from .density_mlp import ACT, AFFINE, LINEAR, NORM, SAVE
from .tile_ops import PER_ROW, PER_SAMPLE, affine, layer_norm, layer_norm_backward, matmul, matrix, operand


@triton.jit
def _place(tape, C: tl.constexpr, W: tl.constexpr, BLOCK_B: tl.constexpr):
    """Return where a tile of W columns lies in a tape, C columns behind its begin."""
    return tape + C * BLOCK_B + tl.arange(0, BLOCK_B)[:, None] * W + tl.arange(0, W)[None, :]


@triton.jit
def put_rows(ptr, h, i_b, i_r, B, R, c, PRECISION: tl.constexpr):
    """Store an operand of a product: row (i_r, i_b) of the matrix (R B, width) that lies behind c R B numbers."""
    p = ptr + (c * R + i_r * h.shape[1]) * B + i_b[:, None] * h.shape[1] + tl.arange(0, h.shape[1])[None, :]
    tl.store(p, operand(h, PRECISION), mask=(i_b < B)[:, None])


@triton.jit
def give(g, grads, i_b, i_r, n, REFS: tl.constexpr, K: tl.constexpr):
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


@triton.jit
def forward(
    h, saved_0, saved_1, tape, memory, w_ptr, inputs_ptr, tables, i_b, i_r, c,
    FIRST: tl.constexpr, END: tl.constexpr, CODE: tl.constexpr, BACK: tl.constexpr, WEIGHTS: tl.constexpr,
    REFS: tl.constexpr, PLACES: tl.constexpr, OF_WEIGHTS: tl.constexpr, IN_MEMORY: tl.constexpr,
    PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Run straight-line code as `density_mlp._block` does, and keep what the way back needs; c: columns before A."""
    for i in tl.static_range(FIRST, END):
        if CODE[i][0] == ACT or CODE[i][0] == NORM or (CODE[i][0] == AFFINE and BACK[i][0] >= 0):
            if IN_MEMORY:
                tl.store(_place(memory, BACK[i][0], h.shape[1], h.shape[0]), h)
            else:
                tape = tape + (h,)
        if CODE[i][0] == LINEAR:
            if OF_WEIGHTS:
                put_rows(inputs_ptr, h, i_b, i_r, tables[6], tables[7], c + PLACES[CODE[i][1]][0], PRECISION)
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
                tl.store(_place(memory, BACK[i][0], h.shape[1], h.shape[0]), part)
            h = h + affine(part, tables, i_b, i_r, 0, REFS, CODE[i][2], -1)
    return h, saved_0, saved_1, tape


@triton.jit
def backward(
    d_h, d_saved_0, d_saved_1, tape, memory, w_ptr, outputs_ptr, tables, grads, i_b, i_r, row, c,
    FIRST: tl.constexpr, END: tl.constexpr, CODE: tl.constexpr, BACK: tl.constexpr, WEIGHTS: tl.constexpr,
    REFS: tl.constexpr, PLACES: tl.constexpr, OF_WEIGHTS: tl.constexpr, OF_TABLES: tl.constexpr,
    IN_MEMORY: tl.constexpr, AGAIN: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Go back through straight-line code.

    row: of this program; c: columns before G; AGAIN: whether a loop comes here once more, with nothing saved yet.
    """
    for i in tl.static_range(END - 1, FIRST - 1, -1):
        if BACK[i][0] >= 0:
            if IN_MEMORY:
                kept = tl.load(_place(memory, BACK[i][0], d_h.shape[1], d_h.shape[0]))
            else:
                kept = tape[BACK[i][0]]
        if CODE[i][0] == LINEAR:
            if OF_WEIGHTS:
                put_rows(outputs_ptr, d_h, i_b, i_r, tables[6], tables[7], c + PLACES[CODE[i][1]][1], PRECISION)
            d_h = matmul(d_h, tl.trans(matrix(w_ptr, WEIGHTS, CODE[i][1])), PRECISION)
        elif CODE[i][0] == AFFINE:
            if OF_TABLES:
                if CODE[i][1] >= 0:
                    give(d_h * kept, grads, i_b, i_r, row, REFS, CODE[i][1])
                if CODE[i][2] >= 0:
                    give(d_h, grads, i_b, i_r, row, REFS, CODE[i][2])
            d_h = affine(d_h, tables, i_b, i_r, 0, REFS, CODE[i][1], -1)
        elif CODE[i][0] == ACT:
            d_h = d_h * derivative(kept, CODE[i][1], FAST)
        elif CODE[i][0] == NORM:
            d_h = layer_norm_backward(d_h, kept, CODE[i][1], CODE[i][2])
        elif CODE[i][0] == SAVE:
            if BACK[i][1]:
                if CODE[i][1] == 0:
                    d_h = d_h + d_saved_0
                    if AGAIN:
                        d_saved_0 = tl.zeros_like(d_h)
                else:
                    d_h = d_h + d_saved_1
                    if AGAIN:
                        d_saved_1 = tl.zeros_like(d_h)
        else:
            if OF_TABLES:
                if CODE[i][2] >= 0:
                    give(d_h * kept, grads, i_b, i_r, row, REFS, CODE[i][2])
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
    return d_h, d_saved_0, d_saved_1
