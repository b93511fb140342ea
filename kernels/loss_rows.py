r"""What a training loss computes before it calls the network, in one pass over the rows.

.. math:: x_t = \alpha_r x_b + \sigma_r\,\epsilon_r, \qquad
    \|\epsilon - \epsilon_q\|^2 = \Big\|\frac{\alpha^2 v\,\epsilon - \alpha\sigma\,(x - m)}
    {\alpha^2 v + \sigma^2}\Big\|^2, \qquad
    \log q(x_b) = -\tfrac12 \sum_i \Big(\frac{(x_i - m_i)^2}{v_i} + \log 2\pi v_i\Big)

for a reference q of one Gaussian along the axes, with mean m and variance v. A program owns BLOCK_N rows, with their
antithetic twins: every row has its own time here, and noise of its own from its words. log q is summed in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import normal
from .residual import NUM_WARPS, tile


@triton.jit
def _row(x, eps, alpha, sigma, keep, pulled, mask):
    """Return x_t and the squared error of the reference, element by element."""
    error = tl.where(mask, keep * eps - pulled, 0.0)
    return alpha * x + sigma * eps, error * error


@triton.jit
def loss_rows_fwd_kernel(
    x_ptr, words_ptr,  # float32 (B, D), int32 (R, D + 1) of which the first is no noise
    numbers_ptr,  # alpha and sigma of each row come first, float64 (2.., R)
    weight_ptr, mean_ptr, variance_ptr,  # of the reference, float64 (1,), and (D,) or with SHARED (1,)
    x_t_ptr, control_ptr,  # out: float32 (SIGNS, R, D), (SIGNS, R)
    log_q_ptr,  # out: float64 (B,)
    R, B, D,
    SHARED: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    i_n = first + tl.arange(0, BLOCK_N)[:, None]
    inside = i_n < R
    alpha = tl.load(numbers_ptr + i_n, mask=inside, other=1.0).to(tl.float32)  # [BN, 1]
    sigma = tl.load(numbers_ptr + R + i_n, mask=inside, other=1.0).to(tl.float32)
    control = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    twin = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    log_q = tl.zeros((BLOCK_N, BLOCK_D), tl.float64)
    for start in tl.range(0, D, BLOCK_D):
        i_d = start + tl.arange(0, BLOCK_D)[None, :]
        mask = inside & (i_d < D)
        i_q = i_d * 0 if SHARED else i_d
        m = tl.load(mean_ptr + i_q, mask=i_d < D, other=0.0)  # [1, BD]
        v = tl.load(variance_ptr + i_q, mask=i_d < D, other=1.0)
        x = tl.load(x_ptr + (i_n % B) * D + i_d, mask=mask, other=0.0)
        eps = normal(tl.load(words_ptr + i_n * (D + 1) + 1 + i_d, mask=mask, other=0))
        signal = alpha * alpha * v.to(tl.float32)
        total = signal + sigma * sigma
        keep, pulled = signal / total, alpha * sigma / total * (x - m.to(tl.float32))
        x_t, error = _row(x, eps, alpha, sigma, keep, pulled, mask)
        tl.store(x_t_ptr + i_n * D + i_d, x_t, mask=mask)
        control += error
        if SIGNS == 2:
            x_t, error = _row(x, -eps, alpha, sigma, keep, pulled, mask)
            tl.store(x_t_ptr + (R + i_n) * D + i_d, x_t, mask=mask)
            twin += error
        if first < B:  # the first draw alone sees a sample for the first time
            y = x.to(tl.float64) - m
            log_q += tl.where(mask, y * y * (1 / v) + tl.log(6.283185307179586 * v), 0.0)
    i_n = first + tl.arange(0, BLOCK_N)
    tl.store(control_ptr + i_n, tl.sum(control, 1), mask=i_n < R)
    if SIGNS == 2:
        tl.store(control_ptr + R + i_n, tl.sum(twin, 1), mask=i_n < R)
    tl.store(log_q_ptr + i_n, tl.log(tl.load(weight_ptr)) - 0.5 * tl.sum(log_q, 1), mask=i_n < B)


def loss_rows(
    x: Tensor, words: Tensor, numbers: Tensor, signs: int, weight: Tensor, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t (signs, K, B, d) and the reference's error (signs, K, B), float32, and log q(x), float64, (B,).

    Shapes as in `fastscore.ops.loss.loss_rows`, all contiguous; mean and variance (1, d) or (1, 1).
    """
    (draws, batch, _), d = words.shape, x.shape[1]
    x_t = torch.empty(signs, draws, batch, d, device=x.device)
    control = torch.empty(signs, draws, batch, device=x.device)
    log_q = torch.empty(batch, dtype=torch.float64, device=x.device)
    block_n, block_d = tile(d)
    loss_rows_fwd_kernel[(triton.cdiv(draws * batch, block_n),)](
        x, words, numbers, weight, mean, variance, x_t, control, log_q, draws * batch, batch, d, mean.shape[1] == 1,
        signs, block_n, block_d, num_warps=NUM_WARPS,
    )  # fmt: skip
    return x_t, control, log_q
