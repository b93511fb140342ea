r"""What a training loss makes of the network's answers F: a number a row, and the gradient of it.

With the residual :math:`r_\pm = c\,(\pm a\,\epsilon + b\,x - F_\pm)` of a row and of its antithetic twin, and w the
weight of the row's log-SNR,

.. math:: \mathrm{difference} = \tfrac w2 \sum_\pm \|r_\pm\|^2 - \|\epsilon - \epsilon_q\|_\pm^2, \qquad
    \frac{\partial\,\mathrm{difference}}{\partial F_\pm} = -w\,c\,r_\pm, \qquad
    \mathrm{pull} = \Big\|\frac c2 \sum_\pm r_\pm\Big\|^2

and the same with one sign and without the halves. The noise is made again from its words in both directions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import normal
from .residual import NUM_WARPS, tile


@triton.jit
def _residual(prediction_ptr, x_ptr, words_ptr, numbers_ptr, i_n, i_d, SIGN: tl.constexpr, R, B, D):
    """Return c (sign a eps + b x - F) of some rows and dimensions, zero outside, and c."""
    inside = i_n < R
    mask = inside & (i_d < D)
    a = tl.load(numbers_ptr + 2 * R + i_n, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(numbers_ptr + 3 * R + i_n, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(numbers_ptr + 4 * R + i_n, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + (i_n % B) * D + i_d, mask=mask, other=0.0)
    eps = SIGN * normal(tl.load(words_ptr + i_n * (D + 1) + 1 + i_d, mask=mask, other=0))
    i_f = i_n if SIGN == 1 else R + i_n
    F = tl.load(prediction_ptr + i_f * D + i_d, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, c * (a * eps + b * x - F), 0.0), c


@triton.jit
def loss_difference_fwd_kernel(
    prediction_ptr,  # (SIGNS, R, D), any floating dtype
    x_ptr, words_ptr,  # float32 (B, D), int32 (R, D + 1)
    control_ptr,  # of the reference, float32 (SIGNS, R)
    numbers_ptr,  # alpha, sigma, a, b, c, weight of each row, float64 (6, R)
    difference_ptr, pull_ptr,  # out: float32 (R,)
    R, B, D,
    SIGNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    i_n = first + tl.arange(0, BLOCK_N)[:, None]
    squares = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    pull = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in tl.range(0, D, BLOCK_D):
        i_d = start + tl.arange(0, BLOCK_D)[None, :]
        r, c = _residual(prediction_ptr, x_ptr, words_ptr, numbers_ptr, i_n, i_d, 1, R, B, D)
        squares += r * r
        if SIGNS == 2:
            twin, c = _residual(prediction_ptr, x_ptr, words_ptr, numbers_ptr, i_n, i_d, -1, R, B, D)
            squares += twin * twin
            r = 0.5 * (r + twin)
        pull += (c * r) * (c * r)
    i_n = first + tl.arange(0, BLOCK_N)
    total = tl.sum(squares, 1) - tl.load(control_ptr + i_n, mask=i_n < R, other=0.0)
    if SIGNS == 2:
        total = 0.5 * (total - tl.load(control_ptr + R + i_n, mask=i_n < R, other=0.0))
    weight = tl.load(numbers_ptr + 5 * R + i_n, mask=i_n < R, other=0.0).to(tl.float32)
    tl.store(difference_ptr + i_n, weight * total, mask=i_n < R)
    tl.store(pull_ptr + i_n, tl.sum(pull, 1), mask=i_n < R)


@triton.jit
def loss_difference_bwd_kernel(
    grad_ptr,  # of the difference, float32 (R,)
    prediction_ptr, x_ptr, words_ptr, numbers_ptr,
    grad_prediction_ptr,  # out: (SIGNS, R, D), dtype of the prediction
    R, B, D,
    SIGNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    mask = (i_n < R) & (i_d < D)
    weight = tl.load(numbers_ptr + 5 * R + i_n, mask=i_n < R, other=0.0).to(tl.float32)
    grad = -2.0 / SIGNS * weight * tl.load(grad_ptr + i_n, mask=i_n < R, other=0.0)
    r, c = _residual(prediction_ptr, x_ptr, words_ptr, numbers_ptr, i_n, i_d, 1, R, B, D)
    tl.store(grad_prediction_ptr + i_n * D + i_d, grad * c * r, mask=mask)
    if SIGNS == 2:
        r, c = _residual(prediction_ptr, x_ptr, words_ptr, numbers_ptr, i_n, i_d, -1, R, B, D)
        tl.store(grad_prediction_ptr + (R + i_n) * D + i_d, grad * c * r, mask=mask)


def loss_difference(
    prediction: Tensor, x: Tensor, words: Tensor, control: Tensor, numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the difference and the pull of every row, float32, shape (K, B); all arguments contiguous."""
    signs, draws, batch, d = prediction.shape
    difference, pull = (torch.empty(draws, batch, device=x.device) for _ in range(2))
    block_n, block_d = tile(d)
    loss_difference_fwd_kernel[(triton.cdiv(draws * batch, block_n),)](
        prediction, x, words, control, numbers, difference, pull, draws * batch, batch, d, signs, block_n, block_d,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return difference, pull


def loss_gradient(grad: Tensor, prediction: Tensor, x: Tensor, words: Tensor, numbers: Tensor) -> Tensor:
    """Return the gradient with respect to the prediction (signs, K, B, d), given that of the difference (K, B)."""
    signs, draws, batch, d = prediction.shape
    grad_prediction = torch.empty_like(prediction)
    block_n, block_d = tile(d)
    loss_difference_bwd_kernel[(triton.cdiv(draws * batch, block_n), triton.cdiv(d, block_d))](
        grad, prediction, x, words, numbers, grad_prediction, draws * batch, batch, d, signs, block_n, block_d,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return grad_prediction
