r"""The first thin kernel, for networks that the fused one does not run: noised rows in the network's own dtype.

.. math:: x_t = \alpha_r x_b + \sigma_r\, \epsilon_{br}

One program makes BLOCK_D dimensions of BLOCK_N rows, counted over all samples. The noise is made in registers from its
words; it is written only where somebody asks for it, because `residual` makes it again: what reaches device memory is
x_t alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import load_normals

TILE, BLOCK_D, NUM_WARPS = 1024, 256, 4  # eight elements a thread, in loads of 16 bytes


@triton.jit
def perturb_fwd_kernel(
    x_ptr,  # data, float32 (B, D)
    keys_ptr,  # int32 (B, 2, D)
    points_ptr,  # int32 (R, D)
    sign_ptr, alpha_ptr, sigma_ptr,  # float32 (R,)
    x_t_ptr,  # out: (B, R, D)
    eps_ptr,  # out: float32 (B, R, D), if KEEP_EPS
    N, R, D,
    KEEP_EPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    i_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    i_b, i_r = i_n // R, i_n % R
    mask = (i_n < N) & (i_d < D)
    sign = tl.load(sign_ptr + i_r, mask=i_n < N, other=0.0)  # [BN, 1]
    alpha = tl.load(alpha_ptr + i_r, mask=i_n < N, other=0.0)
    sigma = tl.load(sigma_ptr + i_r, mask=i_n < N, other=0.0)
    x = tl.load(x_ptr + i_b * D + i_d, mask=mask, other=0.0)
    eps = sign * load_normals(keys_ptr, points_ptr, i_b, i_r, i_d, mask, D)  # [BN, BD]
    o = i_n * D + i_d
    tl.store(x_t_ptr + o, alpha * x + sigma * eps, mask=mask)
    if KEEP_EPS:
        tl.store(eps_ptr + o, eps, mask=mask)


def perturb(
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    sign: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    keep_eps: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return x_t in `dtype` and eps in float32, each (B, R, d); eps is empty unless kept."""
    (batch, d), rows = x.shape, len(points)
    x_t = torch.empty(batch, rows, d, dtype=dtype, device=x.device)
    eps = torch.empty((batch, rows, d) if keep_eps else (0,), device=x.device)
    block_d = min(BLOCK_D, triton.next_power_of_2(d))
    block_n = TILE // block_d
    grid = (triton.cdiv(batch * rows, block_n), triton.cdiv(d, block_d))
    perturb_fwd_kernel[grid](
        x, keys, points, sign, alpha, sigma, x_t, eps, batch * rows, rows, d, keep_eps, block_n, block_d,
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return x_t, eps
