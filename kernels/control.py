r"""The control variate inside a kernel: :math:`\|\epsilon - \epsilon_q\|^2` of a Gaussian or mixture reference.

With m, C = U diag(v) U^T of a Gaussian, y = U^T (x - m) and z = U^T eps,

.. math:: \|\epsilon - \epsilon_q\| = \|\mathrm{keep}\, z - \mathrm{pull}\, y\|, \qquad
    \mathrm{keep} = \frac{\alpha^2 v}{\alpha^2 v + \sigma^2}, \quad
    \mathrm{pull} = \frac{\alpha\sigma}{\alpha^2 v + \sigma^2}

and a mixture's eps_q is the posterior mean of its components'. What depends on the row alone (keep, pull, gains)
comes in tables; products are as accurate as float32's, whatever the network's are: a biased reference would
bias the density. KIND, and what CONTROL holds:

- "none": nothing.
- "diagonal": keep, pull, pull m. One Gaussian along the axes, any number of chunks.

Beyond 128 dimensions the next two are evaluated by themselves, in chunks, and the last one is not:

- "full": keep, pull. One Gaussian in its eigenbasis q (D, D), with y (B, D).
- "mixture": center, gain, gain m, bias, K. Diagonal components; gain = 1 / (alpha^2 v_k + sigma^2), (K, D) a row.
- "full mixture": alpha m, gain, bias, K. Components in their own eigenbases q (K, D, D).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import reference_bytes
from .noise import load_normals
from .packing import MAX_BLOCK_D, Reference, Tables, block_d, number_references, pack_control, padded
from .tile_ops import affine, tile, vector

MAX_COMPONENTS = 128  # in chunks; more of them spill as compiled
BLOCK_B, NUM_WARPS = 32, 8  # 32 samples keep a mixture's tiles in registers (docs/kernels.md)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _row_matrix(
    tables, i_r, c, REFS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load the columns c .. c + BLOCK_D of a row's (K, D) table, zero outside; REFS[N] has width D."""
    i_k, i_d = tl.arange(0, BLOCK_K)[:, None], c + tl.arange(0, BLOCK_D)[None, :]
    p = tables[0] + i_r * tables[3] + REFS[N][1]
    return tl.load(p + i_k * REFS[N][2] + i_d, mask=(i_k < K) & (i_d < REFS[N][2]), other=0.0)


@triton.jit
def _components(x_t, tables, i_b, i_r, c, REFS: tl.constexpr, CONTROL: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return x_t minus the centre, the gains and gains times means of diagonal components, from dimension c on."""
    y = x_t - vector(x_t, tables, i_b, i_r, c, REFS, CONTROL[0])
    gain = _row_matrix(tables, i_r, c, REFS, CONTROL[1], CONTROL[4], BLOCK_K, x_t.shape[1])  # [BK, BD]
    return y, gain, _row_matrix(tables, i_r, c, REFS, CONTROL[2], CONTROL[4], BLOCK_K, x_t.shape[1])


@triton.jit
def _bias(tables, i_r, REFS: tl.constexpr, CONTROL: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the logits at the centre, [1, BK]."""
    i_k = tl.arange(0, BLOCK_K)[None, :]
    return tl.load(tables[0] + i_r * tables[3] + REFS[CONTROL[3]][1] + i_k, mask=i_k < CONTROL[4], other=float("-inf"))


@triton.jit
def _mixture(x_t, sigma, tables, i_b, i_r, REFS: tl.constexpr, CONTROL: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return eps_q of diagonal components: two products for the posterior, two for its mean."""  # [BB, BD]
    y, gain, gain_mean = _components(x_t, tables, i_b, i_r, 0, REFS, CONTROL, BLOCK_K)
    bias = _bias(tables, i_r, REFS, CONTROL, BLOCK_K)
    logit = bias - 0.5 * _product(y * y, tl.trans(gain)) + _product(y, tl.trans(gain_mean))
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
        error = tl.zeros_like(x)  # no early return: the compiler still visits what follows it
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


@triton.jit
def _noised(data, i_b, i_r, sign, alpha, sigma, c, B, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return x, eps and x_t for dimensions c .. c + BLOCK_D, zero outside of the data."""  # [BB, BD]
    x_ptr, keys_ptr, points_ptr = data
    i_d = c + tl.arange(0, BLOCK_D)[None, :]
    mask = (i_b < B)[:, None] & (i_d < D)
    x = tl.load(x_ptr + i_b[:, None] * D + i_d, mask=mask, other=0.0)
    eps = tl.where(mask, sign * load_normals(keys_ptr, points_ptr, i_b[:, None], i_r, i_d, mask, D), 0.0)
    return x, eps, alpha * x + sigma * eps


@triton.jit
def control_fwd_kernel(
    x_ptr, keys_ptr, points_ptr,  # float32 (B, D), int32 (B, 2, D), int32 (R, D)
    rows_ptr,  # sign, alpha, sigma of each row, float32 (R, 3)
    r_ptr, q_ptr, y_ptr,
    f_ptr,  # out: float32 (B, R)
    B, R, r_stride,
    D: tl.constexpr,
    PADDED: tl.constexpr,  # rows and columns of q
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REFS: tl.constexpr,
    KIND: tl.constexpr,
    CONTROL: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)  # on the first axis, the only one that goes beyond 65,535
    i_b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    tables = (r_ptr, r_ptr, r_ptr, r_stride, 0, 0, B, R)
    p = rows_ptr + i_r * 3
    sign, alpha, sigma = tl.load(p), tl.load(p + 1), tl.load(p + 2)
    total = tl.zeros((BLOCK_B,), tl.float32)
    data = (x_ptr, keys_ptr, points_ptr)
    if KIND == "mixture" and D > BLOCK_D:
        # Two sweeps: for the posterior of the components, and for its mean.
        BLOCK_K: tl.constexpr = CONTROL[5]
        logit = tl.zeros((BLOCK_B, BLOCK_K), tl.float32) + _bias(tables, i_r, REFS, CONTROL, BLOCK_K)
        for c in tl.range(0, D, BLOCK_D):
            _, _, x_t = _noised(data, i_b, i_r, sign, alpha, sigma, c, B, D, BLOCK_D)
            y, gain, gain_mean = _components(x_t, tables, i_b, i_r, c, REFS, CONTROL, BLOCK_K)
            logit += _product(y, tl.trans(gain_mean)) - 0.5 * _product(y * y, tl.trans(gain))
        weight = tl.exp(logit - tl.max(logit, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
        for c in tl.range(0, D, BLOCK_D):
            _, eps, x_t = _noised(data, i_b, i_r, sign, alpha, sigma, c, B, D, BLOCK_D)
            y, gain, gain_mean = _components(x_t, tables, i_b, i_r, c, REFS, CONTROL, BLOCK_K)
            error = eps - sigma * (y * _product(weight, gain) - _product(weight, gain_mean))
            total += tl.sum(error * error, 1)
    elif KIND == "full" and D > BLOCK_D:
        # Each chunk of z = U^T eps takes all of eps, which is made again: the product costs more.
        for c in tl.range(0, D, BLOCK_D):
            z = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
            for k in tl.range(0, D, BLOCK_D):
                _, eps, _ = _noised(data, i_b, i_r, sign, alpha, sigma, k, B, D, BLOCK_D)
                z += _product(eps, tile(q_ptr + k * PADDED + c, BLOCK_D, BLOCK_D, PADDED))
            i_d = c + tl.arange(0, BLOCK_D)[None, :]
            y = tl.load(y_ptr + i_b[:, None] * D + i_d, mask=(i_b < B)[:, None] & (i_d < D), other=0.0)
            error = affine(z, tables, i_b, i_r, c, REFS, CONTROL[0], -1)
            error -= affine(y, tables, i_b, i_r, c, REFS, CONTROL[1], -1)
            total += tl.sum(error * error, 1)
    else:
        for c in tl.range(0, D, BLOCK_D):
            x, eps, x_t = _noised(data, i_b, i_r, sign, alpha, sigma, c, B, D, BLOCK_D)
            total += control_residual(x, eps, x_t, sigma, tables, q_ptr, y_ptr, i_b, i_r, c, D, REFS, KIND, CONTROL)
    tl.store(f_ptr + i_b * R + i_r, total, mask=i_b < B)


@triton.jit
def diagonal_fwd_kernel(
    x_ptr, keys_ptr, points_ptr,  # float32 (B, D), int32 (B, 2, D), int32 (R, D)
    sign_ptr, alpha_ptr, sigma_ptr,  # of each row, float32, float64, float64
    mean_ptr, variance_ptr, m_stride, v_stride,  # of one Gaussian, float64
    f_ptr,  # out: float32 (B, R)
    B, R,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    sign, alpha, sigma = tl.load(sign_ptr + i_r), tl.load(alpha_ptr + i_r), tl.load(sigma_ptr + i_r)
    norm = tl.zeros((BLOCK_B,), tl.float32)
    for c in tl.range(0, D, BLOCK_D):
        i_d = c + tl.arange(0, BLOCK_D)[None, :]
        mask = (i_b < B)[:, None] & (i_d < D)
        mean = tl.load(mean_ptr + i_d * m_stride, mask=i_d < D, other=0.0)
        signal = alpha * alpha * tl.load(variance_ptr + i_d * v_stride, mask=i_d < D, other=1.0)
        total = signal + sigma * sigma
        keep, pull = signal / total, alpha * sigma / total
        x = tl.load(x_ptr + i_b[:, None] * D + i_d, mask=mask, other=0.0)
        eps = sign * load_normals(keys_ptr, points_ptr, i_b[:, None], i_r, i_d, mask, D)
        error = keep.to(tl.float32) * eps - pull.to(tl.float32) * x + (pull * mean).to(tl.float32)
        error = tl.where(mask, error, 0.0)
        norm += tl.sum(error * error, 1)
    tl.store(f_ptr + i_b * R + i_r, norm, mask=i_b < B)


def kind_of(components: int, full: bool) -> str:
    """Return the kind of a reference, "none" without components."""
    if components == 0:
        return "none"
    return ("full mixture" if full else "mixture") if components > 1 else "full" if full else "diagonal"


def shared_bytes(kind: str, components: int, d: int) -> int:
    """Return a bound of the shared memory that the kernel takes; in chunks a mixture's two tables are there at once."""
    return reference_bytes(kind, components, block_d(d), BLOCK_B) * (2 if d > MAX_BLOCK_D else 1)


def why_not(components: int, full: bool, d: int, shared: int) -> str | None:
    """Return why a kernel cannot evaluate a reference where a program has `shared` bytes of shared memory, or None."""
    kind = kind_of(components, full)
    if kind in ("none", "diagonal"):
        return None
    if d > MAX_BLOCK_D and kind == "full mixture":
        return f"mixtures of full covariances go up to {MAX_BLOCK_D} dimensions in a kernel, got {d}"
    if d > MAX_BLOCK_D and components > MAX_COMPONENTS:
        return f"mixtures beyond {MAX_BLOCK_D} dimensions have up to {MAX_COMPONENTS} components, got {components}"
    needs = shared_bytes(kind, components, d)
    if needs > shared:
        return (
            f"a reference of {components} components in {d} dimensions takes {needs:,} bytes of shared memory, the "
            f"device grants {shared:,}"
        )
    return None


def control(
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    sign: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    reference: Reference,
) -> Tensor:
    """Return the squared norm of eps - eps_q of every row, float32, shape (B, R); alpha and sigma in float64."""
    (batch, d), count = x.shape, len(points)
    f, grid = torch.empty(batch, count, device=x.device), (count, triton.cdiv(batch, BLOCK_B))
    weight, mean, variance, basis = reference
    if kind_of(len(weight), basis.numel() > 0) == "diagonal":  # no table of rows is worth a launch
        strides = int(mean.shape[1] > 1), int(variance.shape[1] > 1)
        diagonal_fwd_kernel[grid](
            x, keys, points, sign, alpha, sigma, mean, variance, *strides, f, batch, count,
            D=d, BLOCK_B=BLOCK_B, BLOCK_D=block_d(d), num_warps=NUM_WARPS,
        )  # fmt: skip
        return f
    into = Tables(batch, count)
    kind, q, y = pack_control(reference, x, alpha, sigma, into)
    refs, control = number_references(kind[1:])
    rows, r = torch.stack([sign, alpha, sigma], 1).to(torch.float32), into.matrix("r", x)
    control_fwd_kernel[grid](
        x, keys, points, rows, r, q, y, f, batch, count, r.shape[-1], D=d, PADDED=padded(d), BLOCK_B=BLOCK_B,
        BLOCK_D=block_d(d), REFS=refs, KIND=kind[0], CONTROL=control, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return f
