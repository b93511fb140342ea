r"""What the draws of samples say of their log-density, in one launch: value, error bar, both ends, the curve's sums,
and of a table what its rule is off.

The definitions are `fastscore/estimator/summary.py` and what it calls; here is their arithmetic, in float64. A program
owns BLOCK_B samples and goes through the draws BLOCK_N at a time; a draw's neighbours, which differences need, are
loaded again. Rows of f may belong to several groups of nodes, each with tables of its own. The curve's sums are one row
of `parts` a program, which the caller adds up: no atomics, and so the same answer every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_B, BLOCK_N, BLOCK_D, NUM_WARPS = 8, 32, 64, 8  # at most 128 registers, none spilled (sm_80, sm_90)


class Bars(NamedTuple):
    """How variances become error bars: numbers of `fastscore.estimator.calibration` and `statistics`, and rounding."""

    measured: bool
    level: float
    ordinary: float
    odd: float
    lo: float
    hi: float
    known: float
    expected: float
    fewest: int
    eps: float
    size: float


@triton.jit
def _term(f_ptr, even_ptr, curve_ptr, row, table, n, inside, N):
    """Load f of some draws and return it with its term, both float64, zero outside."""  # [BB, BN]
    inside = inside & (n >= 0) & (n < N)
    f = tl.load(f_ptr + row * N + n, mask=inside, other=0.0).to(tl.float64)
    even = tl.load(even_ptr + table * N + n, mask=inside, other=0.0)
    curve = tl.load(curve_ptr + table * N + n, mask=inside, other=0.0)
    return f, (f - curve) * (0.5 * even)


@triton.jit
def _log_q(x_ptr, mean_ptr, variance_ptr, i_x, inside, D, m_stride, v_stride, BLOCK_D: tl.constexpr):
    """Return log q(x) of one Gaussian along the axes, float64."""  # [BB]
    total = tl.zeros((i_x.shape[0],), tl.float64)
    for c in tl.range(0, D, BLOCK_D):
        i_d = c + tl.arange(0, BLOCK_D)[None, :]
        mask = inside[:, None] & (i_d < D)
        x = tl.load(x_ptr + i_x[:, None] * D + i_d, mask=mask, other=0.0).to(tl.float64)
        mean = tl.load(mean_ptr + i_d * m_stride, mask=i_d < D, other=0.0)
        variance = tl.load(variance_ptr + i_d * v_stride, mask=i_d < D, other=1.0)
        y = x - mean
        term = tl.log(6.283185307179586 * variance) + y * y / variance
        total += tl.sum(tl.where(mask, term, 0.0), 1)
    return -0.5 * total


@triton.jit
def summary_kernel(
    f_ptr, chosen_ptr, group_ptr,  # float32 (b, N); of every row its sample and its group, int64 (b,)
    x_ptr, base_ptr,  # float32 (B, D); float64 (b,), what stands outside the sum where no Gaussian says it
    mean_ptr, variance_ptr,  # of that Gaussian, float64
    weight_ptr, remainder_ptr, curve_ptr,  # of the groups, float64 (G, N), (G,), (G, N)
    even_ptr, last_ptr,  # float64 (G, N)
    off_ptr, off_remainder_ptr, off_noise_ptr,  # float64 (G, N), (G,), (G, N - 1); where there is a table
    means_ptr, spreads_ptr, at_ptr,  # float64 (G, N, 4), (G, N - 1, 4), (G, 2, 2)
    value_ptr, bars_ptr, jump_ptr, ends_ptr,  # out: float64 (B,), (2, B), (B,), (B, 2, 7)
    told_ptr, plain_ptr, rule_error_ptr,  # out: float32 (2, B), float64 (B,), (B, 2)
    parts_ptr,  # out: float64 (programs, 2, N)
    b, B, N, D, m_stride, v_stride, dims,
    level, ordinary, odd_ratio, lo, hi, known, expected, fewest, eps, size, noisy, clean,
    GROUPED: tl.constexpr, GAUSSIAN: tl.constexpr, MEASURED: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = i < b
    sample = tl.load(chosen_ptr + i, mask=inside, other=0)
    group = sample * 0
    if GROUPED:
        group = tl.load(group_ptr + i, mask=inside, other=0)
    row, table, rows = i[:, None], group[:, None], inside[:, None]
    zero = tl.zeros((BLOCK_B,), tl.float64)
    total, two, four, third, jump = zero, zero, zero, zero, zero
    bent, bent_four = zero, zero
    off, off_noise = zero, zero
    m0, m1, m2, m3, s0, s1, s2, s3 = zero, zero, zero, zero, zero, zero, zero, zero
    for start in tl.range(0, N, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        n = i_n[None, :]
        f, term = _term(f_ptr, even_ptr, curve_ptr, row, table, n, rows, N)
        f1, term1 = _term(f_ptr, even_ptr, curve_ptr, row, table, n - 1, rows, N)
        _, term2 = _term(f_ptr, even_ptr, curve_ptr, row, table, n - 2, rows, N)
        here = rows & (n < N)
        total += tl.sum(f * tl.load(weight_ptr + table * N + n, mask=here, other=0.0), 1)
        jump += tl.sum(term * tl.load(last_ptr + table * N + n, mask=here, other=0.0), 1)
        second = rows & (n >= 1) & (n < N)
        step = tl.where(second, term - term1, 0.0)
        square = step * step
        two += tl.sum(square, 1)
        four += tl.sum(square * square, 1)
        bend = tl.where(second & (n >= 2), term1 - 0.5 * (term2 + term), 0.0)
        third += tl.sum(bend * bend * bend, 1)
        bend = bend * bend
        bent += tl.sum(bend, 1)
        bent_four += tl.sum(bend * bend, 1)
        if TABLE:
            beside = f - tl.load(curve_ptr + table * N + n, mask=here, other=0.0)
            move = beside - f1 + tl.load(curve_ptr + table * N + n - 1, mask=second, other=0.0)
            off += tl.sum(beside * tl.load(off_ptr + table * N + n, mask=here, other=0.0), 1)
            spread = tl.load(off_noise_ptr + table * (N - 1) + n - 1, mask=second, other=0.0)
            off_noise += tl.sum(move * move * spread, 1)
        half = -0.5 * f
        rise = tl.where(second, half + 0.5 * f1, 0.0)
        rise = rise * rise
        p, q = means_ptr + (table * N + n) * 4, spreads_ptr + (table * (N - 1) + n - 1) * 4
        m0 += tl.sum(half * tl.load(p, mask=here, other=0.0), 1)
        m1 += tl.sum(half * tl.load(p + 1, mask=here, other=0.0), 1)
        m2 += tl.sum(half * tl.load(p + 2, mask=here, other=0.0), 1)
        m3 += tl.sum(half * tl.load(p + 3, mask=here, other=0.0), 1)
        s0 += tl.sum(rise * tl.load(q, mask=second, other=0.0), 1)
        s1 += tl.sum(rise * tl.load(q + 1, mask=second, other=0.0), 1)
        s2 += tl.sum(rise * tl.load(q + 2, mask=second, other=0.0), 1)
        s3 += tl.sum(rise * tl.load(q + 3, mask=second, other=0.0), 1)
        part = parts_ptr + tl.program_id(0).to(tl.int64) * 2 * N + i_n
        tl.store(part, tl.sum(half, 0), mask=i_n < N)
        tl.store(part + N, tl.sum(half * half, 0), mask=i_n < N)

    # The same steps as `Spread.of`, `calibrated` and `with_rounding`.
    variance = two * N / (2 * (N - 1))
    nu = tl.maximum(2 * two * two / tl.maximum(four, 1e-300), 1.0)
    straight = bent * N / (1.5 * (N - 2))
    own_nu = tl.maximum(1.54 * bent * bent / tl.maximum(bent_four, 1e-300), 1.0)
    draws = tl.where(N >= fewest, own_nu / 0.51, 1.5 * nu)
    variance, nu = tl.where(N >= fewest, straight, variance), tl.where(N >= fewest, own_nu, nu)
    student = 1 + 1.21 / nu + 1.44 / (nu * nu)
    wide, plain = student * student * variance, variance
    if MEASURED:
        excess = tl.log(tl.maximum(variance, 1e-300)) - level
        w = tl.minimum(tl.maximum((excess - lo) / (hi - lo), 0.0), 1.0)
        ratio = tl.exp((1 - w) * ordinary + w * odd_ratio)
        wide, plain = wide * ratio, plain * ratio
    else:
        third = third / 0.75
        seen = tl.minimum(third * third / tl.maximum(variance * variance * variance, 1e-300), draws)
        share = known / (known + draws)
        skewed = 1 + 1.08 * (share * expected / (dims * draws) + (1 - share) * seen)
        wide = wide * skewed * skewed + jump * jump / 12
    if GAUSSIAN:
        base = _log_q(x_ptr, mean_ptr, variance_ptr, sample, inside, D, m_stride, v_stride, BLOCK_D)
    else:
        base = tl.load(base_ptr + i, mask=inside, other=0.0)
    value = base - 0.5 * (total + tl.load(remainder_ptr + group, mask=inside, other=0.0))
    rounding = eps * (tl.abs(value) + size)
    tl.store(value_ptr + sample, value, mask=inside)
    tl.store(bars_ptr + sample, wide, mask=inside)
    tl.store(bars_ptr + B + sample, plain, mask=inside)
    tl.store(jump_ptr + sample, jump, mask=inside)
    tl.store(told_ptr + sample, value.to(tl.float32), mask=inside)
    tl.store(told_ptr + B + sample, tl.sqrt(wide + rounding * rounding).to(tl.float32), mask=inside)
    tl.store(plain_ptr + sample, plain + rounding * rounding, mask=inside)
    if TABLE:
        off += tl.load(off_remainder_ptr + group, mask=inside, other=0.0)
        tl.store(rule_error_ptr + sample * 2, -0.5 * off, mask=inside)
        tl.store(rule_error_ptr + sample * 2 + 1, off_noise, mask=inside)
    end, at = ends_ptr + sample * 14, at_ptr + group * 4
    tl.store(end, m0, mask=inside)
    tl.store(end + 1, s0, mask=inside)
    tl.store(end + 2, m1, mask=inside)
    tl.store(end + 3, s1, mask=inside)
    tl.store(end + 4, tl.load(at, mask=inside, other=0.0), mask=inside)
    tl.store(end + 5, tl.load(at + 1, mask=inside, other=0.0), mask=inside)
    tl.store(end + 6, noisy + zero, mask=inside)
    tl.store(end + 7, m2, mask=inside)
    tl.store(end + 8, s2, mask=inside)
    tl.store(end + 9, m3, mask=inside)
    tl.store(end + 10, s3, mask=inside)
    tl.store(end + 11, tl.load(at + 2, mask=inside, other=0.0), mask=inside)
    tl.store(end + 12, tl.load(at + 3, mask=inside, other=0.0), mask=inside)
    tl.store(end + 13, clean + zero, mask=inside)


def summary(
    f: Tensor,
    chosen: Tensor,
    group: Tensor | None,
    x: Tensor,
    base: Tensor | tuple[Tensor, Tensor],
    tables: tuple[Tensor, ...],
    bars: Bars,
    slowest: tuple[float, float],
    into: tuple[Tensor, ...],
    sums: Tensor | None = None,
) -> Tensor:
    """Write what the rows of f (b, N) say into the rows `chosen` of `into`; return the curve's two sums, (2, N).

    Arguments:
        group: of every row; None where all belong to one.
        base: what stands outside the sum, (b,), or mean and variance of the Gaussian whose log-density it is.
        tables: weight, remainder, curve, even and ends of `Rule`, its three of `Trapezoids`, which are empty where
            there is no table, and the three of `EndTable`, of all groups.
        slowest: rates of decay at both ends.
        into: value, variances, jump, ends, told and plain variance, and the error of a table's rule.
        sums: where the curve's go, (2, N); in new memory by default.
    """
    (rows, draws), (batch, d) = f.shape, x.shape
    gaussian = isinstance(base, tuple)
    mean, variance = base if gaussian else (base, base)
    programs = triton.cdiv(rows, BLOCK_B)
    parts = torch.empty(programs, 2, draws, dtype=torch.float64, device=f.device)
    strides = int(mean.numel() > 1), int(variance.numel() > 1)
    measured, *numbers = bars
    summary_kernel[(programs,)](
        f.contiguous(), chosen, chosen if group is None else group, x, base if not gaussian else mean, mean, variance,
        *tables, *into, parts, rows, batch, draws, d, *strides, d, *numbers, *slowest,
        GROUPED=group is not None, GAUSSIAN=gaussian, MEASURED=measured, TABLE=tables[5].numel() > 0,
        BLOCK_B=BLOCK_B, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
    )  # fmt: skip
    return torch.sum(parts, 0, out=sums)
