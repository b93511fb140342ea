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

from .both_ways import backward, forward, give, put_rows
from .density_mlp import ACT, ADD, AFFINE, LINEAR, NORM, SAVE, constants
from .launch import Config
from .noise import load_normals
from .packing import Layout, block_d
from .tile_ops import advance, affine, matmul, matrix, vector

NUM_WARPS = 8


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
    BLOCKS: tl.constexpr,
    STEPS: tl.constexpr,  # of every block: columns of the tape, and of A and G; whether each saved tile's gradient is 0
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
            put_rows(inputs_ptr, h, i_b, i_r, B, R, PLACES[0][0], PRECISION)
        h = matmul(h, matrix(w_ptr, WEIGHTS, 0), PRECISION)
        saved_0 = h
        saved_1 = h
        tape = ()
        for k in tl.static_range(len(BLOCKS)):
            if BLOCKS[k][0] == 1:
                h, saved_0, saved_1, tape = forward(
                    h, saved_0, saved_1, tape, memory, w_ptr, inputs_ptr, tables, i_b, i_r, 0,
                    BLOCKS[k][1], BLOCKS[k][2], CODE, BACK, WEIGHTS, REFS, PLACES, OF_WEIGHTS, TAPE > 0, PRECISION,
                    FAST,
                )  # fmt: skip
            else:
                # A tile that the loop saves before it reads one has no old value, and needs the loop's shape.
                if BLOCKS[k][7]:
                    saved_0 = h
                if BLOCKS[k][8]:
                    saved_1 = h
                for m in tl.range(0, BLOCKS[k][0], num_stages=1):
                    h, saved_0, saved_1, _ = forward(
                        h, saved_0, saved_1, (), memory + m * (STEPS[k][0] * BLOCK_B), w_ptr + m * BLOCKS[k][3],
                        inputs_ptr, advance(tables, m, BLOCKS, k), i_b, i_r, m * STEPS[k][1],
                        BLOCKS[k][1], BLOCKS[k][2], CODE, BACK, WEIGHTS, REFS, PLACES, OF_WEIGHTS, True, PRECISION,
                        FAST,
                    )  # fmt: skip
        if OF_WEIGHTS:
            put_rows(inputs_ptr, h, i_b, i_r, B, R, PLACES[LAST][0], PRECISION)
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
                give(-d_error * raw, grads, i_b, i_r, n, REFS, POST[0])
            if POST[1] >= 0:
                give(-d_error, grads, i_b, i_r, n, REFS, POST[1])
            if POST[2] >= 0:
                give(-d_error * x_t, grads, i_b, i_r, n, REFS, POST[2])
        d_h = affine(-d_error, tables, i_b, i_r, 0, REFS, POST[0], -1)
        if OF_WEIGHTS:
            put_rows(outputs_ptr, d_h, i_b, i_r, B, R, PLACES[LAST][1], PRECISION)
        d_h = matmul(d_h, tl.trans(matrix(w_ptr, WEIGHTS, LAST)), PRECISION)
        d_saved_0 = d_h
        d_saved_1 = d_h
        for k in tl.static_range(len(BLOCKS) - 1, -1, -1):
            if BLOCKS[k][0] == 1:
                d_h, d_saved_0, d_saved_1 = backward(
                    d_h, d_saved_0, d_saved_1, tape, memory, w_ptr, outputs_ptr, tables, grads, i_b, i_r, n, 0,
                    BLOCKS[k][1], BLOCKS[k][2], CODE, BACK, WEIGHTS, REFS, PLACES, OF_WEIGHTS, OF_TABLES, TAPE > 0,
                    False, PRECISION, FAST,
                )  # fmt: skip
            else:
                if STEPS[k][2]:
                    d_saved_0 = tl.zeros_like(d_h)
                if STEPS[k][3]:
                    d_saved_1 = tl.zeros_like(d_h)
                for j in tl.range(0, BLOCKS[k][0], num_stages=1):
                    m = BLOCKS[k][0] - 1 - j
                    d_h, d_saved_0, d_saved_1 = backward(
                        d_h, d_saved_0, d_saved_1, (), memory + m * (STEPS[k][0] * BLOCK_B),
                        w_ptr + m * BLOCKS[k][3], outputs_ptr, advance(tables, m, BLOCKS, k),
                        advance(grads, m, BLOCKS, k), i_b, i_r, n, m * STEPS[k][1],
                        BLOCKS[k][1], BLOCKS[k][2], CODE, BACK, WEIGHTS, REFS, PLACES, OF_WEIGHTS, OF_TABLES, True,
                        True, PRECISION, FAST,
                    )  # fmt: skip
        if OF_WEIGHTS:
            put_rows(outputs_ptr, d_h, i_b, i_r, B, R, PLACES[0][1], PRECISION)
        if OF_X or (OF_TABLES and (PRE[0] >= 0 or PRE[1] >= 0)):
            d_y = matmul(d_h, tl.trans(matrix(w_ptr, WEIGHTS, 0)), PRECISION)
            if OF_TABLES:
                if PRE[0] >= 0:
                    give(d_y * x_t, grads, i_b, i_r, n, REFS, PRE[0])
                if PRE[1] >= 0:
                    give(d_y, grads, i_b, i_r, n, REFS, PRE[1])
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
    # Equal layers are a loop where the tape is in memory; in registers they are one straight block of code.
    in_memory = any(wanted[1:])
    found = constants(layout, control, d, precision, Config(samples, NUM_WARPS, resident=not in_memory, stages=1))
    code, blocks = found["CODE"], found["BLOCKS"]
    places_in_tape, columns, taped = _tape(code, blocks, layout.weights, wanted[2], in_memory)
    flags, resets = _reached(code, blocks)
    maps = [sum(code[i][0] == LINEAR.value for i in range(first, end)) for _, first, end, *_ in blocks]
    steps = zip(columns, (n * _width(code, blocks[k], layout.weights) for k, n in enumerate(maps)), resets, strict=True)
    for name in ("RESIDENT", "STAGES"):
        del found[name]
    more = {
        "STEPS": tuple((tape, step, *reset) for tape, step, reset in steps),
        "BACK": tuple(zip(places_in_tape, flags, strict=True)),
        "PLACES": places,
        "TAPE": max(16, taped) if in_memory else 0,
        "BLOCK_D": block_d(d),
    }
    return found | dict(zip(("OF_X", "OF_WEIGHTS", "OF_TABLES"), wanted, strict=True)) | more


def _width(code: tuple, block: tuple, weights: tuple) -> int:
    """Return the width of the tiles in a loop, whose linear maps are square; 0 of straight code."""
    times, first, end, *_ = block
    return next((weights[op[1]][2] for op in code[first:end] if times > 1 and op[0] == LINEAR.value), 0)


def _tape(code: tuple, blocks: tuple, weights: tuple, of_tables: bool, in_memory: bool) -> tuple[list, list, int]:
    """Return the place in the tape of what each instruction keeps or -1, each block's columns, and those of all.

    In registers a place is a number of a tile, in memory a column.
    """
    found, columns, begin, width = [], [], 0, weights[0][2]
    for times, first, end, *_ in blocks:
        kept = 0
        for op in code[first:end]:
            width = weights[op[1]][2] if op[0] == LINEAR.value else width
            scaled = (op[0] == AFFINE.value and op[1] >= 0) or (op[0] == ADD.value and op[2] >= 0)
            taped = op[0] in (ACT.value, NORM.value) or (of_tables and scaled)
            found.append(begin + kept if taped else -1)
            kept += taped * (width if in_memory else 1)
        columns.append(kept)
        begin += times * kept
    return found, columns, begin


def _reached(code: tuple, blocks: tuple) -> tuple[list[int], list[tuple[int, int]]]:
    """Return what the way back needs to know of saved tiles, and for every block which gradients start at zero.

    Of an add whether it is the first that reaches its slot, of a save whether an add has. A loop is gone through with
    what its first and its later turns have in common.
    """
    flags, resets, reached = [0] * len(code), [], set()
    for times, first, end, *_ in reversed(blocks):
        own = [(i, code[i]) for i in range(first, end) if code[i][0] in (ADD.value, SAVE.value)]
        begins = {op[1]: op[0] for _, op in reversed(own)}  # with what a slot's part begins
        reset = {slot for slot in begins if slot not in reached} if times > 1 else set()
        reached |= {slot for slot in reset if begins[slot] == ADD.value}
        for i, op in reversed(own):
            if op[0] == ADD.value:
                flags[i] = int(op[1] not in reached)
                reached.add(op[1])
            else:
                flags[i] = int(op[1] in reached)
                reached.discard(op[1])
        resets.append((int(0 in reset), int(1 in reset)))
    return flags, resets[::-1]
