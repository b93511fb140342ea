r"""The second thin kernel: reduce the network's answers to one number a row, and the way back.

.. math:: r^2_{br} = c_r^2\, \|a_r \epsilon_{br} + b_r x_b - F_{br}\|^2, \qquad
    \frac{\partial r^2}{\partial F} = -2 c^2 (a\,\epsilon + b\,x - F)

The noise is made again from its words, which costs less than reading it. A program owns one row (forward) or all rows
of BLOCK_D dimensions of one sample (backward, so that the gradient of x is a sum in registers, in a fixed order).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import load_normals

BLOCK_D, NUM_WARPS = 1024, 4


@triton.jit
def residual_fwd_kernel(
    prediction_ptr,  # (B, R, D), any floating dtype
    x_ptr, keys_ptr, points_ptr,  # float32 (B, D), int32 (B, 2, D), int32 (R, D)
    sign_ptr, a_ptr, b_ptr, c_ptr,  # float32 (R,)
    error_ptr,  # out: float32 (B, R)
    R, D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    sign, a, b, c = tl.load(sign_ptr + i_r), tl.load(a_ptr + i_r), tl.load(b_ptr + i_r), tl.load(c_ptr + i_r)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        i_d = first + tl.arange(0, BLOCK_D)
        mask = i_d < D
        F = tl.load(prediction_ptr + (i_b * R + i_r) * D + i_d, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + i_b * D + i_d, mask=mask, other=0.0)
        eps = sign * load_normals(keys_ptr, points_ptr, i_b, i_r, i_d, mask, D)
        error = tl.where(mask, a * eps + b * x - F, 0.0)
        total += error * error
    tl.store(error_ptr + i_b * R + i_r, c * c * tl.sum(total, 0))


@triton.jit
def residual_bwd_kernel(
    grad_ptr,  # of the error, float32 (B, R)
    prediction_ptr, x_ptr, keys_ptr, points_ptr, sign_ptr, a_ptr, b_ptr, c_ptr,
    grad_prediction_ptr,  # out: (B, R, D), dtype of the prediction
    grad_x_ptr,  # out: float32 (B, D)
    R, D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_b = tl.program_id(0).to(tl.int64)
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = i_d < D
    x = tl.load(x_ptr + i_b * D + i_d, mask=mask, other=0.0)
    grad_x = tl.zeros((BLOCK_D,), tl.float32)
    for n in tl.range(0, R):
        i_r = i_b * 0 + n  # int64 addresses
        sign, a, b, c = tl.load(sign_ptr + i_r), tl.load(a_ptr + i_r), tl.load(b_ptr + i_r), tl.load(c_ptr + i_r)
        o = (i_b * R + i_r) * D + i_d
        F = tl.load(prediction_ptr + o, mask=mask, other=0.0).to(tl.float32)
        eps = sign * load_normals(keys_ptr, points_ptr, i_b, i_r, i_d, mask, D)
        grad = 2.0 * c * c * tl.load(grad_ptr + i_b * R + i_r) * (a * eps + b * x - F)
        tl.store(grad_prediction_ptr + o, -grad, mask=mask)
        grad_x += b * grad
    tl.store(grad_x_ptr + i_b * D + i_d, grad_x, mask=mask)


def residual(
    prediction: Tensor, x: Tensor, keys: Tensor, points: Tensor, sign: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    """Return the squared residual of every row, float32, shape (B, R)."""
    batch, rows, d = prediction.shape
    error = torch.empty(batch, rows, device=x.device)
    residual_fwd_kernel[(batch, rows)](
        prediction, x, keys, points, sign, a, b, c, error, rows, d, _block_d(d), num_warps=NUM_WARPS
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
    block = _block_d(d)
    residual_bwd_kernel[(batch, triton.cdiv(d, block))](
        grad.contiguous(), prediction, x, keys, points, sign, a, b, c, grad_prediction, grad_x, rows, d, block,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_prediction, grad_x


def _block_d(d: int) -> int:
    return min(BLOCK_D, triton.next_power_of_2(d))
