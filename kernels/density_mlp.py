r"""The fused kernel: noise, x_t, a whole MLP score network, control variate and residual of every row, in one pass.

.. math:: f_{br} = c_r^2\,\|a_r\epsilon + b_r x - F(\alpha_r x + \sigma_r\epsilon)\|^2 - \|\epsilon - \epsilon_q\|^2

A program instance owns BLOCK_B samples and walks over its share of the rows r (a draw, or one sign of an antithetic
pair), which all samples share: whatever depends on time alone is a vector per row, read once a tile. The accumulator h
stays in registers through all layers; weights are either loaded before the walk (resident, in shared memory) or from L2
layer by layer. Only f, one float32 a row, is written: nothing of size B x R x d or B x R x H reaches device memory.

The network is data: CODE holds instructions of the row machine between the first and the last linear map, with every
vector operand a reference (level, offset, width) into a table: per draw ("r"), per sample ("b"), or both ("br").

Source: A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources

from .activations import activate
from .blocks import LEVELS
from .control import control_residual
from .launch import OPERANDS, Config, Device, Work, refuse
from .names import ACTIVATIONS, INSTRUCTIONS
from .noise import load_normals
from .occupancy import remember
from .packing import Layout, Reference, Tables, block_d, number_references, pack_control, pack_network
from .tile_ops import advance, affine, layer_norm, matmul, matrix, operand, tile

LINEAR, AFFINE, ACT, NORM, SAVE, ADD = map(tl.constexpr, range(len(INSTRUCTIONS)))


@triton.jit
def load_x(x_ptr, i_b, c, B, D: tl.constexpr, BLOCK_D: tl.constexpr, POLICY: tl.constexpr):
    """Load x for dimensions c .. c + BLOCK_D, zero outside the data.

    The two loads of a row differ in their cache policy alone: so the compiler cannot make them one, which would keep x
    in registers through all layers.
    """  # [BB, BD]
    i_d = c + tl.arange(0, BLOCK_D)[None, :]
    mask = (i_b < B)[:, None] & (i_d < D)
    return tl.load(x_ptr + i_b[:, None] * D + i_d, mask=mask, other=0.0, eviction_policy=POLICY)


@triton.jit
def make_eps(keys_ptr, points_ptr, i_b, i_r, sign, c, B, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Make eps for dimensions c .. c + BLOCK_D, zero outside the data."""  # [BB, BD]
    i_d = c + tl.arange(0, BLOCK_D)[None, :]
    mask = (i_b < B)[:, None] & (i_d < D)
    return tl.where(mask, sign * load_normals(keys_ptr, points_ptr, i_b[:, None], i_r, i_d, mask, D), 0.0)


@triton.jit
def _block(
    h, saved_0, saved_1, ws, w_ptr, tables, i_b, i_r, FIRST: tl.constexpr, END: tl.constexpr, CODE: tl.constexpr,
    WEIGHTS: tl.constexpr, REFS: tl.constexpr, RESIDENT: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Run straight-line code on h and the two saved tiles, [BB, H] in float32."""
    for i in tl.static_range(FIRST, END):
        if CODE[i][0] == LINEAR:
            if RESIDENT:
                h = matmul(h, ws[CODE[i][1]], PRECISION)
            else:
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
            tl.static_assert(CODE[i][0] == ADD, "unknown instruction")
            if CODE[i][1] == 0:
                h = h + affine(saved_0, tables, i_b, i_r, 0, REFS, CODE[i][2], -1)
            else:
                h = h + affine(saved_1, tables, i_b, i_r, 0, REFS, CODE[i][2], -1)
    return h, saved_0, saved_1


@triton.jit
def _body(
    h, ws, w_ptr, tables, i_b, i_r, BLOCKS: tl.constexpr, CODE: tl.constexpr, WEIGHTS: tl.constexpr, REFS: tl.constexpr,
    RESIDENT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Run the layers between the first and the last linear map.

    BLOCKS holds (times, first and end in CODE, weight step, table steps, whether each saved tile starts anew): equal
    layers become one loop, whose next weights are fetched while this layer computes.
    """
    saved_0 = h
    saved_1 = h
    for k in tl.static_range(len(BLOCKS)):
        if BLOCKS[k][0] == 1:
            h, saved_0, saved_1 = _block(
                h, saved_0, saved_1, ws, w_ptr, tables, i_b, i_r,
                BLOCKS[k][1], BLOCKS[k][2], CODE, WEIGHTS, REFS, RESIDENT, PRECISION, FAST,
            )  # fmt: skip
        else:
            # A tile that the loop saves before it reads one has no old value, and needs the loop's shape.
            if BLOCKS[k][7]:
                saved_0 = h
            if BLOCKS[k][8]:
                saved_1 = h
            for n in tl.range(0, BLOCKS[k][0], num_stages=STAGES):
                h, saved_0, saved_1 = _block(
                    h, saved_0, saved_1, ws, w_ptr + n * BLOCKS[k][3], advance(tables, n, BLOCKS, k), i_b, i_r,
                    BLOCKS[k][1], BLOCKS[k][2], CODE, WEIGHTS, REFS, RESIDENT, PRECISION, FAST,
                )  # fmt: skip
    return h


@triton.jit
def residual(F, x, eps, x_t, a, b, tables, i_b, i_r, c, REFS: tl.constexpr, POST: tl.constexpr):
    """Sum (target - prediction)^2 over one chunk of dimensions, where everything outside the data is zero."""  # [BB]
    F = affine(F, tables, i_b, i_r, c, REFS, POST[0], POST[1])
    if POST[2] >= 0:
        F = F + affine(x_t, tables, i_b, i_r, c, REFS, POST[2], -1)
    error = a * eps + b * x - F
    return tl.sum(error * error, 1)


@triton.jit
def density_mlp_fwd_kernel(
    x_ptr,  # data, float32 (B, D)
    keys_ptr,  # each sample's noise words, int32 (B, 2, D)
    points_ptr,  # each row's noise words, int32 (R, D)
    rows_ptr,  # per row: sign, alpha, sigma, a, b, c, float32 (R, 6)
    w_ptr,  # packed weights, each (in, out), padded
    r_ptr, b_ptr, br_ptr,  # vector operands per draw (R, stride), per sample (B, stride), both (B, R, stride)
    q_ptr,  # the reference's eigenbasis, float32 (K, D, D), padded
    y_ptr,  # x - m in that eigenbasis, float32 (B, D)
    f_ptr,  # out: float32 (B, R)
    B, R, ROWS_PER_PROGRAM, r_stride, b_stride, br_stride,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGHTS: tl.constexpr,  # (offset, in, out) of every weight: first, body ..., last
    REFS: tl.constexpr,  # (level, offset, width) of every vector operand
    PRE: tl.constexpr,  # (scale, shift) of x_t before the first linear map
    BLOCKS: tl.constexpr,
    CODE: tl.constexpr,  # instructions of the row machine
    POST: tl.constexpr,  # (scale, shift, skip): prediction = F scale + shift + x_t skip
    KIND: tl.constexpr,  # of the reference
    CONTROL: tl.constexpr,  # its operands
    RESIDENT: tl.constexpr,
    STAGES: tl.constexpr,  # weights in flight in a loop over layers
    PRECISION: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    first = tl.program_id(1).to(tl.int64) * ROWS_PER_PROGRAM
    tables = (r_ptr, b_ptr, br_ptr, r_stride, b_stride, br_stride, B, R)
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    LAST: tl.constexpr = len(WEIGHTS) - 1
    H: tl.constexpr = WEIGHTS[0][2]
    ws = ()
    if RESIDENT:
        for k in tl.static_range(len(WEIGHTS)):
            ws = ws + (matrix(w_ptr, WEIGHTS, k),)

    for n in tl.range(0, tl.minimum(ROWS_PER_PROGRAM, R - first), num_stages=1):
        i_r = first + n
        p = rows_ptr + i_r * 6
        sign, alpha, sigma = tl.load(p), tl.load(p + 1), tl.load(p + 2)
        a, b, c = tl.load(p + 3), tl.load(p + 4), tl.load(p + 5)
        if CHUNKS == 1:
            eps = make_eps(keys_ptr, points_ptr, i_b, i_r, sign, 0, B, D, BLOCK_D)
            x = load_x(x_ptr, i_b, 0, B, D, BLOCK_D, "evict_last")
            y = affine(alpha * x + sigma * eps, tables, i_b, i_r, 0, REFS, PRE[0], PRE[1])
            if RESIDENT:
                h = matmul(y, ws[0], PRECISION)
            else:
                h = matmul(y, matrix(w_ptr, WEIGHTS, 0), PRECISION)
            h = _body(h, ws, w_ptr, tables, i_b, i_r, BLOCKS, CODE, WEIGHTS, REFS, RESIDENT, STAGES, PRECISION, FAST)
            if RESIDENT:
                F = matmul(h, ws[LAST], PRECISION)
            else:
                F = matmul(h, matrix(w_ptr, WEIGHTS, LAST), PRECISION)
            x = load_x(x_ptr, i_b, 0, B, D, BLOCK_D, "")
            x_t = alpha * x + sigma * eps
            error = residual(F, x, eps, x_t, a, b, tables, i_b, i_r, 0, REFS, POST)
            control = control_residual(x, eps, x_t, sigma, tables, q_ptr, y_ptr, i_b, i_r, 0, D, REFS, KIND, CONTROL)
        else:
            # Two sweeps over the dimensions: into the first layer, and out of the last; x and eps are made twice.
            h = tl.zeros((BLOCK_B, H), tl.float32)
            for k in tl.range(0, CHUNKS * BLOCK_D, BLOCK_D):
                eps = make_eps(keys_ptr, points_ptr, i_b, i_r, sign, k, B, D, BLOCK_D)
                x = load_x(x_ptr, i_b, k, B, D, BLOCK_D, "")
                y = affine(alpha * x + sigma * eps, tables, i_b, i_r, k, REFS, PRE[0], PRE[1])
                h += matmul(y, tile(w_ptr + WEIGHTS[0][0] + k * H, BLOCK_D, H, H), PRECISION)
            h = _body(h, ws, w_ptr, tables, i_b, i_r, BLOCKS, CODE, WEIGHTS, REFS, RESIDENT, STAGES, PRECISION, FAST)
            h = operand(h, PRECISION)
            error = tl.zeros((BLOCK_B,), tl.float32)
            control = tl.zeros((BLOCK_B,), tl.float32)
            for k in tl.range(0, CHUNKS * BLOCK_D, BLOCK_D):
                eps = make_eps(keys_ptr, points_ptr, i_b, i_r, sign, k, B, D, BLOCK_D)
                x = load_x(x_ptr, i_b, k, B, D, BLOCK_D, "")
                x_t = alpha * x + sigma * eps
                w = tile(w_ptr + WEIGHTS[LAST][0] + k, WEIGHTS[LAST][1], BLOCK_D, WEIGHTS[LAST][2])
                error += residual(matmul(h, w, PRECISION), x, eps, x_t, a, b, tables, i_b, i_r, k, REFS, POST)
                control += control_residual(
                    x, eps, x_t, sigma, tables, q_ptr, y_ptr, i_b, i_r, k, D, REFS, KIND, CONTROL
                )
        tl.store(f_ptr + i_b * R + i_r, c * c * error - control, mask=i_b < B)


def density_mlp(
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
    """Launch the fused kernel; return f, float32, shape (B, R).

    Arguments:
        x: data, float32, shape (B, d).
        keys, points: noise words, int32, shapes (B, 2, d) and (R, d).
        rows: sign, alpha, sigma, a, b, c of each row, float32, shape (R, 6).
        alpha, sigma: the same in float64, for the reference's tables.
        code, weights, tables: the network, see `packing`.
        reference: weight, mean, variance, basis of the control variate, or None.
        precision: of the matrix products, a key of `OPERANDS`.

    Raises:
        NoRoom: if no launch fits the device.
    """
    (batch, d), count = x.shape, len(rows)
    layout, control, packed, q, y = pack(x, alpha, sigma, code, weights, tables, reference, precision)
    f = torch.empty(batch, count, dtype=torch.float32, device=x.device)

    def launch(config: Config) -> Tensor:
        compiled = density_mlp_fwd_kernel[(triton.cdiv(batch, config.block_b), config.splits)](
            x, keys, points, rows, *packed, q, y, f,
            batch, count, triton.cdiv(count, config.splits), *(table.shape[-1] for table in packed[1:]),
            **constants(layout, control, d, precision, config), num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
        remember((work, config.kept, Device.of(x.device).capability), compiled)
        return f

    work = Work(layout, d, control[0], 1 if reference is None else len(reference[0]), precision)
    return launch_what_fits(launch, work, x.device, batch, count)


def pack(
    x: Tensor, alpha: Tensor, sigma: Tensor, code: tuple, weights: list[Tensor], tables: list[Tensor],
    reference: Reference | None, precision: str,
) -> tuple[Layout, tuple, tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]:  # fmt: skip
    """Return the layout, CONTROL, the tensors of the network (weights, and a table a level), and q and y of CONTROL."""
    into = Tables(len(x), len(alpha))
    layout, packed = pack_network(code, weights, tables, x.shape[1], into, OPERANDS[precision])
    if precision == "emulated bf16":
        packed = packed.to(torch.bfloat16).float()
    control, q, y = pack_control(reference, x, alpha, sigma, into)
    return layout, control, (packed, *(into.matrix(level, x) for level in LEVELS)), q, y


def launch_what_fits(
    launch: Callable[[Config], Tensor], work: Work, device: torch.device, batch: int, rows: int
) -> Tensor:
    """Launch by the first choice that fits, and by the next if the device refuses one, with a warning."""
    found = Device.of(device)
    while True:
        config = Config.from_heuristic(work, found)
        try:
            return launch(config.split(work, found, batch, rows))
        except OutOfResources as error:
            refuse(work, found, config, error)
            if Config.from_heuristic(work, found) == config:  # somebody else's choice
                raise


def constants(layout: Layout, control: tuple, d: int, precision: str, config: Config) -> dict:
    """Return the kernel's compile-time arguments."""
    blocks = layout.blocks(config.resident)
    straight = [op for _, code, _, _ in blocks for op in code]
    ends = list(accumulate(len(code) for _, code, _, _ in blocks))
    spans = zip(ends, blocks, strict=True)
    parts = {"PRE": layout.pre, "CODE": tuple(_numbered(op) for op in straight), "POST": layout.post}
    parts["CONTROL"] = control[1:]
    refs, *numbered = number_references(*parts.values())
    numbered = dict(zip(parts, numbered, strict=True))
    numbered["BLOCKS"] = tuple(
        (n, end - len(code), end, step, *steps, *(_starts_anew(code, slot) for slot in (0, 1)))
        for end, (n, code, step, steps) in spans
    )
    return {
        "D": d,
        "BLOCK_B": config.block_b,
        "BLOCK_D": block_d(d),
        "WEIGHTS": layout.weights,
        "REFS": refs,
        **numbered,
        "KIND": control[0],
        "RESIDENT": config.resident,
        "STAGES": config.stages,
        "PRECISION": precision,
        "FAST": precision in ("bf16", "fp16"),
    }


def _starts_anew(code: tuple, slot: int) -> bool:
    """Return whether code saves a slot before it reads it."""
    return next((op[0] == "save" for op in code if op[0] in ("save", "add") and op[1] == slot), False)


def _numbered(op: tuple) -> tuple:
    """Return an instruction with numbers for its name and its activation's."""
    arguments = (ACTIVATIONS.index(op[1]),) if op[0] == "act" else op[1:]
    return (INSTRUCTIONS.index(op[0]), *arguments)
