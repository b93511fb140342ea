r"""The control variate inside a kernel: :math:`\|\epsilon - \epsilon_q\|^2` of a Gaussian or mixture reference.

With m, C = U diag(v) U^T of a Gaussian, y = U^T (x - m) and z = U^T eps,

.. math:: \|\epsilon - \epsilon_q\| = \|\mathrm{keep}\, z - \mathrm{pull}\, y\|, \qquad
    \mathrm{keep} = \frac{\alpha^2 v}{\alpha^2 v + \sigma^2}, \quad
    \mathrm{pull} = \frac{\alpha\sigma}{\alpha^2 v + \sigma^2}

and a mixture's eps_q is the posterior mean of its components'. What depends on the row alone (keep, pull, gains, biases)
comes in tables; products are as accurate as float32's, whatever the network's are: a biased reference would
bias the density. KIND, and what CONTROL holds:

- "none": nothing.
- "diagonal": keep, pull, pull m. One Gaussian along the axes, any number of chunks.
- "full": keep, pull. One Gaussian in its eigenbasis q (D, D), with y (B, D).
- "mixture": center, gain, gain m, bias, K. Diagonal components; gain = 1 / (alpha^2 v_k + sigma^2), (K, D) a row.
- "full mixture": alpha m, gain, bias, K. Components in their own eigenbases q (K, D, D).
"""

import triton
import triton.language as tl

from .tile_ops import vector


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _row_matrix(
    tables, i_r, REFS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load a row's (K, D) table, zero outside; REFS[N] has width D."""
    i_k, i_d = tl.arange(0, BLOCK_K)[:, None], tl.arange(0, BLOCK_D)[None, :]
    p = tables[0] + i_r * tables[3] + REFS[N][1]
    return tl.load(p + i_k * REFS[N][2] + i_d, mask=(i_k < K) & (i_d < REFS[N][2]), other=0.0)


@triton.jit
def _mixture(x_t, sigma, tables, i_b, i_r, REFS: tl.constexpr, CONTROL: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return eps_q of diagonal components: two products for the posterior, two for its mean."""  # [BB, BD]
    y = x_t - vector(x_t, tables, i_b, i_r, 0, REFS, CONTROL[0])
    gain = _row_matrix(tables, i_r, REFS, CONTROL[1], CONTROL[4], BLOCK_K, x_t.shape[1])  # [BK, BD]
    gain_mean = _row_matrix(tables, i_r, REFS, CONTROL[2], CONTROL[4], BLOCK_K, x_t.shape[1])
    i_k = tl.arange(0, BLOCK_K)
    bias = tl.load(tables[0] + i_r * tables[3] + REFS[CONTROL[3]][1] + i_k, mask=i_k < CONTROL[4], other=float("-inf"))
    logit = bias[None, :] - 0.5 * _product(y * y, tl.trans(gain)) + _product(y, tl.trans(gain_mean))
    weight = tl.exp(logit - tl.max(logit, 1)[:, None])
    weight = weight / tl.sum(weight, 1)[:, None]  # [BB, BK]
    return sigma * (y * _product(weight, gain) - _product(weight, gain_mean))


@triton.jit
def _full_mixture(x_t, sigma, tables, q_ptr, i_b, i_r, REFS: tl.constexpr, CONTROL: tl.constexpr):
    """Return eps_q of full components, one after the other with a running softmax."""  # [BB, BD]
    D: tl.constexpr = REFS[CONTROL[0]][2]
    BLOCK_D: tl.constexpr = x_t.shape[1]
    i_d = tl.arange(0, BLOCK_D)
    inside = i_d < D
    top = tl.full((x_t.shape[0],), float("-inf"), tl.float32)
    mass = tl.zeros((x_t.shape[0],), tl.float32)
    mean = tl.zeros((x_t.shape[0], BLOCK_D), tl.float32)
    row = tables[0] + i_r * tables[3]
    for k in tl.range(0, CONTROL[3]):
        q = tl.load(q_ptr + k * BLOCK_D * BLOCK_D + i_d[:, None] * BLOCK_D + i_d[None, :])
        centre = tl.load(row + REFS[CONTROL[0]][1] + k * D + i_d, mask=inside, other=0.0)
        gain = tl.load(row + REFS[CONTROL[1]][1] + k * D + i_d, mask=inside, other=0.0)
        z = _product(tl.where(inside[None, :], x_t - centre[None, :], 0.0), q)
        pulled = z * gain[None, :]
        logit = tl.load(row + REFS[CONTROL[2]][1] + k) - 0.5 * tl.sum(z * pulled, 1)
        new_top = tl.maximum(top, logit)
        keep, weight = tl.exp(top - new_top), tl.exp(logit - new_top)
        mass = mass * keep + weight
        mean = mean * keep[:, None] + weight[:, None] * _product(pulled, tl.trans(q))
        top = new_top
    return sigma * mean / mass[:, None]


@triton.jit
def control_residual(
    x,
    eps,
    x_t,
    sigma,
    tables,
    q_ptr,
    y_ptr,
    i_b,
    i_r,
    c,
    D: tl.constexpr,
    REFS: tl.constexpr,
    KIND: tl.constexpr,
    CONTROL: tl.constexpr,
):
    """Return the squared norm of eps - eps_q over the dimensions of this chunk."""  # [BB]
    BLOCK_D: tl.constexpr = x.shape[1]
    if KIND == "none":
        return tl.zeros((x.shape[0],), tl.float32)
    elif KIND == "diagonal":
        keep = vector(x, tables, i_b, i_r, c, REFS, CONTROL[0])
        pull = vector(x, tables, i_b, i_r, c, REFS, CONTROL[1])
        error = keep * eps - pull * x + vector(x, tables, i_b, i_r, c, REFS, CONTROL[2])
    elif KIND == "full":
        i_d = tl.arange(0, BLOCK_D)
        mask = (i_b < tables[6])[:, None] & (i_d < D)[None, :]
        q = tl.load(q_ptr + i_d[:, None] * BLOCK_D + i_d[None, :])
        y = tl.load(y_ptr + i_b[:, None] * D + i_d[None, :], mask=mask, other=0.0)
        keep = vector(x, tables, i_b, i_r, 0, REFS, CONTROL[0])
        error = keep * _product(eps, q) - vector(x, tables, i_b, i_r, 0, REFS, CONTROL[1]) * y
    elif KIND == "mixture":
        error = eps - _mixture(x_t, sigma, tables, i_b, i_r, REFS, CONTROL, CONTROL[5])
    else:
        tl.static_assert(KIND == "full mixture", "unknown reference")
        error = eps - _full_mixture(x_t, sigma, tables, q_ptr, i_b, i_r, REFS, CONTROL)
    return tl.sum(error * error, 1)
