r"""The second thin kernel: reduce the network's answers to one number a row, and the way back.

.. math:: r^2_{br} = c_r^2\, \|a_r \epsilon_{br} + b_r x_b - F_{br}\|^2, \qquad
    \frac{\partial r^2}{\partial F} = -2 c^2 (a\,\epsilon + b\,x - F)

The noise is made again from its words, which costs less than reading it. A program owns BLOCK_N rows (forward), or all
rows of BLOCK_D dimensions of BLOCK_B samples (backward: the gradient of x is a sum in registers, in a fixed order).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import load_normals

TILE, NUM_WARPS = 1024, 4


@triton.jit
def residual_fwd_kernel(
    prediction_ptr,  # (B, R, D), any floating dtype
    x_ptr, keys_ptr, points_ptr,  # float32 (B, D), int32 (B, 2, D), int32 (R, D)
    sign_ptr, a_ptr, b_ptr, c_ptr,  # float32 (R,)
    error_ptr,  # out: float32 (B, R)
    N, R, D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_b, i_r, inside = i_n // R, i_n % R, i_n < N  # [BN, 1]
    sign = tl.load(sign_ptr + i_r, mask=inside, other=0.0)
    a = tl.load(a_ptr + i_r, mask=inside, other=0.0)
    b = tl.load(b_ptr + i_r, mask=inside, other=0.0)
    c = tl.load(c_ptr + i_r, mask=inside, other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)[None, :]
        mask = inside & (i_d < D)
        F = tl.load(prediction_ptr + i_n * D + i_d, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + i_b * D + i_d, mask=mask, other=0.0)
        eps = sign * load_normals(keys_ptr, points_ptr, i_b, i_r, i_d, mask, D)
        error = tl.where(mask, c * (a * eps + b * x - F), 0.0)
        total += error * error
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(error_ptr + i_n, tl.sum(total, 1), mask=i_n < N)


@triton.jit
def residual_bwd_kernel(
    grad_ptr,  # of the error, float32 (B, R)
    prediction_ptr, x_ptr, keys_ptr, points_ptr, sign_ptr, a_ptr, b_ptr, c_ptr,
    grad_prediction_ptr,  # out: (B, R, D), dtype of the prediction
    grad_x_ptr,  # out: float32 (B, D)
    B, R, D,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None]
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (i_b < B) & (i_d < D)
    x = tl.load(x_ptr + i_b * D + i_d, mask=mask, other=0.0)
    grad_x = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for i_r in tl.range(0, R):
        sign, a, b, c = tl.load(sign_ptr + i_r), tl.load(a_ptr + i_r), tl.load(b_ptr + i_r), tl.load(c_ptr + i_r)
        o = (i_b * R + i_r) * D + i_d
        F = tl.load(prediction_ptr + o, mask=mask, other=0.0).to(tl.float32)
        eps = sign * load_normals(keys_ptr, points_ptr, i_b, i_r, i_d, mask, D)
        grad = 2.0 * c * c * tl.load(grad_ptr + i_b * R + i_r, mask=i_b < B, other=0.0) * (a * eps + b * x - F)
        tl.store(grad_prediction_ptr + o, -grad, mask=mask)
        grad_x += b * grad
    tl.store(grad_x_ptr + i_b * D + i_d, grad_x, mask=mask)


def residual(
    prediction: Tensor, x: Tensor, keys: Tensor, points: Tensor, sign: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    """Return the squared residual of every row, float32, shape (B, R)."""
    batch, rows, d = prediction.shape
    error = torch.empty(batch, rows, device=x.device)
    block_n, block_d = tile(d)
    residual_fwd_kernel[(triton.cdiv(batch * rows, block_n),)](
        prediction, x, keys, points, sign, a, b, c, error, batch * rows, rows, d, block_n, block_d, num_warps=NUM_WARPS
    )
    return error


def residual_backward(
    grad: Tensor,
    prediction: Tensor,
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    sign: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to the prediction (B, R, d) and x (B, d)."""
    batch, rows, d = prediction.shape
    grad_prediction, grad_x = torch.empty_like(prediction), torch.empty_like(x)
    block_b, block_d = tile(d)
    residual_bwd_kernel[(triton.cdiv(batch, block_b), triton.cdiv(d, block_d))](
        grad, prediction, x, keys, points, sign, a, b, c, grad_prediction, grad_x, batch, rows, d, block_b, block_d,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_prediction, grad_x


def tile(d: int) -> tuple[int, int]:
    """Return the rows (or samples) and dimensions of a tile of 1,024 elements."""
    block_d = min(TILE, triton.next_power_of_2(d))
    return TILE // block_d, block_d
