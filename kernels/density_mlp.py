r"""The fused kernel: noise, x_t, a whole MLP score network, control variate and residual of every row, in one pass.

.. math:: f_{br} = c_r^2\,\|a_r\epsilon + b_r x - F(\alpha_r x + \sigma_r\epsilon)\|^2 - \|\epsilon - \epsilon_q\|^2

A program instance owns BLOCK_B samples and walks over its share of the rows r (a draw, or one sign of an antithetic
pair), which all samples share: whatever depends on time alone is a vector per row, read once a tile. The accumulator h
stays in registers through all layers; weights are either loaded before the walk (resident, in shared memory) or from L2
layer by layer. Only f, one float32 a row, is written: nothing of size B x R x d or B x R x H reaches device memory.

The network is data: BODY holds instructions of the row machine between the first and the last linear map, with every
vector operand a reference (level, offset, width) into a table: per draw ("r"), per sample ("b"), or both ("br").

Source: A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .control import control_residual
from .noise import load_normals
from .packing import MAX_BLOCK_D, Layout, Tables, block_d, pack_control, pack_network
from .tile_ops import affine, layer_norm, matmul, matrix, operand, scaled, tile


@triton.jit
def _chunk(x_ptr, keys_ptr, points_ptr, i_b, i_r, sign, c, B, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load x and make eps for dimensions c .. c + BLOCK_D; both are zero outside the data."""  # [BB, BD]
    i_d = c + tl.arange(0, BLOCK_D)[None, :]
    mask = (i_b < B)[:, None] & (i_d < D)
    x = tl.load(x_ptr + i_b[:, None] * D + i_d, mask=mask, other=0.0)
    eps = load_normals(keys_ptr, points_ptr, i_b[:, None], i_r, i_d, mask, D)
    return x, tl.where(mask, sign * eps, 0.0)


@triton.jit
def _body(h, ws, w_ptr, tables, i_b, i_r, BODY: tl.constexpr, WEIGHTS: tl.constexpr, RESIDENT: tl.constexpr,
          PRECISION: tl.constexpr, FAST: tl.constexpr):  # fmt: skip
    """Run the instructions between the first and the last linear map; h [BB, H] in float32."""
    saved_0 = h
    saved_1 = h
    for i in tl.static_range(len(BODY)):
        if BODY[i][0] == "linear":
            if RESIDENT:
                h = matmul(h, ws[BODY[i][1]], PRECISION)
            else:
                h = matmul(h, matrix(w_ptr, WEIGHTS[BODY[i][1]]), PRECISION)
        elif BODY[i][0] == "affine":
            h = affine(h, tables, i_b, i_r, 0, BODY[i][1], BODY[i][2])
        elif BODY[i][0] == "act":
            h = activate(h, BODY[i][1], FAST)
        elif BODY[i][0] == "norm":
            h = layer_norm(h, BODY[i][1], BODY[i][2])
        elif BODY[i][0] == "save":
            if BODY[i][1] == 0:
                saved_0 = h
            else:
                saved_1 = h
        else:
            tl.static_assert(BODY[i][0] == "add", "unknown instruction")
            if BODY[i][1] == 0:
                h = h + scaled(saved_0, tables, i_b, i_r, 0, BODY[i][2])
            else:
                h = h + scaled(saved_1, tables, i_b, i_r, 0, BODY[i][2])
    return h


@triton.jit
def _residual(F, x, eps, x_t, a, b, tables, i_b, i_r, c, POST: tl.constexpr):
    """Sum (target - prediction)^2 over one chunk of dimensions, where everything outside the data is zero."""  # [BB]
    F = affine(F, tables, i_b, i_r, c, POST[0], POST[1])
    if len(POST[2]):
        F = F + scaled(x_t, tables, i_b, i_r, c, POST[2])
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
    PRE: tl.constexpr,  # (scale, shift) of x_t before the first linear map
    BODY: tl.constexpr,
    POST: tl.constexpr,  # (scale, shift, skip): prediction = F scale + shift + x_t skip
    CONTROL: tl.constexpr,  # (kind, ...) of the reference
    RESIDENT: tl.constexpr,
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
            ws = ws + (matrix(w_ptr, WEIGHTS[k]),)

    for n in tl.range(0, tl.minimum(ROWS_PER_PROGRAM, R - first), num_stages=1):
        i_r = first + n
        p = rows_ptr + i_r * 6
        sign, alpha, sigma = tl.load(p), tl.load(p + 1), tl.load(p + 2)
        a, b, c = tl.load(p + 3), tl.load(p + 4), tl.load(p + 5)
        if CHUNKS == 1:
            x, eps = _chunk(x_ptr, keys_ptr, points_ptr, i_b, i_r, sign, 0, B, D, BLOCK_D)
            x_t = alpha * x + sigma * eps
            y = affine(x_t, tables, i_b, i_r, 0, PRE[0], PRE[1])
            if RESIDENT:
                h = matmul(y, ws[0], PRECISION)
            else:
                h = matmul(y, matrix(w_ptr, WEIGHTS[0]), PRECISION)
            h = _body(h, ws, w_ptr, tables, i_b, i_r, BODY, WEIGHTS, RESIDENT, PRECISION, FAST)
            if RESIDENT:
                F = matmul(h, ws[LAST], PRECISION)
            else:
                F = matmul(h, matrix(w_ptr, WEIGHTS[LAST]), PRECISION)
            error = _residual(F, x, eps, x_t, a, b, tables, i_b, i_r, 0, POST)
            control = control_residual(x, eps, x_t, alpha, sigma, tables, q_ptr, y_ptr, i_b, i_r, 0, D, CONTROL)
        else:
            # Two sweeps over the dimensions: into the first layer, and out of the last; x and eps are made twice.
            h = tl.zeros((BLOCK_B, H), tl.float32)
            for k in tl.range(0, CHUNKS * BLOCK_D, BLOCK_D):
                x, eps = _chunk(x_ptr, keys_ptr, points_ptr, i_b, i_r, sign, k, B, D, BLOCK_D)
                y = affine(alpha * x + sigma * eps, tables, i_b, i_r, k, PRE[0], PRE[1])
                h += matmul(y, tile(w_ptr + WEIGHTS[0][0] + k * H, BLOCK_D, H, H), PRECISION)
            h = _body(h, ws, w_ptr, tables, i_b, i_r, BODY, WEIGHTS, RESIDENT, PRECISION, FAST)
            h = operand(h, PRECISION)
            error = tl.zeros((BLOCK_B,), tl.float32)
            control = tl.zeros((BLOCK_B,), tl.float32)
            for k in tl.range(0, CHUNKS * BLOCK_D, BLOCK_D):
                x, eps = _chunk(x_ptr, keys_ptr, points_ptr, i_b, i_r, sign, k, B, D, BLOCK_D)
                x_t = alpha * x + sigma * eps
                w = tile(w_ptr + WEIGHTS[LAST][0] + k, WEIGHTS[LAST][1], BLOCK_D, WEIGHTS[LAST][2])
                error += _residual(matmul(h, w, PRECISION), x, eps, x_t, a, b, tables, i_b, i_r, k, POST)
                control += control_residual(x, eps, x_t, alpha, sigma, tables, q_ptr, y_ptr, i_b, i_r, k, D, CONTROL)
        tl.store(f_ptr + i_b * R + i_r, c * c * error - control, mask=i_b < B)


@dataclass(frozen=True)
class Config:
    """How the kernel is launched: samples a tile, warps, whether weights stay in shared memory, parts of the rows."""

    block_b: int
    num_warps: int
    resident: bool
    splits: int

    @classmethod
    def from_heuristic(cls, layout: Layout, d: int, batch: int, rows: int, itemsize: int, multiprocessors: int):
        """Choose by what ahead-of-time compilation shows (docs/kernels.md); no GPU has measured it yet.

        Sixteen samples a warp is what a warpgroup's matrix product takes. Above width 128 the accumulator of 128
        samples would spill. Weights stay while they fit beside the tiles. The rows are split until every
        multiprocessor has two programs to hide each other's latency.
        """
        wide = layout.width > 128 or block_d(d) > 128
        block_b = 64 if wide or layout.width <= 64 else 128
        num_warps = 8 if layout.width > 64 else 4
        size = itemsize * sum(k * n for _, k, n in layout.weights)
        resident = d <= MAX_BLOCK_D and size <= RESIDENT_BYTES
        tiles = triton.cdiv(batch, block_b)
        splits = max(1, min(rows, triton.cdiv(2 * multiprocessors, tiles)))
        return cls(block_b, num_warps, resident, splits)


OPERANDS = {"tf32x3": torch.float32, "tf32": torch.float32, "ieee": torch.float32}
OPERANDS |= {"bf16": torch.bfloat16, "fp16": torch.float16, "emulated bf16": torch.float32}
RESIDENT_BYTES = 96 << 10  # of 227 KB; the tiles of a matrix product take the rest


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
    reference: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    precision: str = "tf32x3",
    config: Config | None = None,
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
        config: launch configuration, chosen by `Config.from_heuristic` if None.
    """
    (batch, d), count = x.shape, len(rows)
    into = Tables(batch, count)
    dtype = OPERANDS[precision]
    layout, packed = pack_network(code, weights, tables, d, into, dtype)
    if precision == "emulated bf16":
        packed = packed.to(torch.bfloat16).float()
    control, q, y = pack_control(reference, x, alpha, sigma, into)
    r, b, br = (into.matrix(level, x) for level in ("r", "b", "br"))
    if config is None:
        cores = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
        config = Config.from_heuristic(layout, d, batch, count, packed.element_size(), cores)
    f = torch.empty(batch, count, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(batch, config.block_b), config.splits)
    density_mlp_fwd_kernel[grid](
        x, keys, points, rows, packed, r, b, br, q, y, f,
        batch, count, triton.cdiv(count, config.splits), r.shape[-1], b.shape[-1], br.shape[-1],
        D=d, BLOCK_B=config.block_b, BLOCK_D=block_d(d),
        WEIGHTS=layout.weights, PRE=layout.pre, BODY=layout.body, POST=layout.post, CONTROL=control,
        RESIDENT=config.resident, PRECISION=precision, FAST=precision in ("bf16", "fp16"),
        num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip
    return f
