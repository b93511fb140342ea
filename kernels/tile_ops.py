"""Operations on a tile of rows, [BLOCK_B, width] in float32 registers: products, vector operands, normalization.

A vector operand is a number K into the constexpr REFS, whose entries (level, offset, width) say where `tables` hold it:
level PER_ROW is one vector per row, shared by all samples; PER_SAMPLE one per sample, shared by all rows; PER_PAIR one
for each. K = -1 is no operand. (Triton before 3.7 passes no part of a constexpr tuple to a function, hence numbers.)
"""

import triton
import triton.language as tl

PER_ROW, PER_SAMPLE, PER_PAIR = (tl.constexpr(i) for i in range(3))


@triton.jit
def tile(ptr, K: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr):
    """Load a K x N block of a row-major matrix that is padded to whole blocks."""
    return tl.load(ptr + tl.arange(0, K)[:, None] * STRIDE + tl.arange(0, N)[None, :])


@triton.jit
def matrix(ptr, WEIGHTS: tl.constexpr, K: tl.constexpr):
    """Load a whole padded weight, WEIGHTS[K] = (offset, in, out)."""
    return tile(ptr + WEIGHTS[K][0], WEIGHTS[K][1], WEIGHTS[K][2], WEIGHTS[K][2])


@triton.jit
def _round_bf16(x):
    """Round to nearest even in float32: what a cast does on a GPU and Triton's interpreter does not."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + (0x7FFF + ((bits >> 16) & 1))) & 0xFFFF0000
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def operand(h, PRECISION: tl.constexpr):
    """Round a tile to what the matrix product takes."""
    if PRECISION == "bf16":
        return h.to(tl.bfloat16)
    elif PRECISION == "fp16":
        return h.to(tl.float16)
    elif PRECISION == "emulated bf16":
        return _round_bf16(h)
    else:
        return h


@triton.jit
def matmul(h, w, PRECISION: tl.constexpr):
    """Return h w in float32.

    PRECISION is "tf32x3" (float32's accuracy), "tf32", "bf16" or "fp16"; "ieee" and "emulated bf16" are for the
    interpreter, whose bf16 products are not to be trusted.
    """
    if PRECISION == "bf16" or PRECISION == "fp16":
        return tl.dot(operand(h, PRECISION), w)
    elif PRECISION == "emulated bf16":
        return tl.dot(operand(h, PRECISION), w, input_precision="ieee")
    else:
        return tl.dot(h, w, input_precision=PRECISION)


@triton.jit
def vector(h, tables, i_b, i_r, c, REFS: tl.constexpr, K: tl.constexpr):
    """Load an operand for the columns c, c + 1, ... of a tile like h; zero beyond its width."""  # [1 or BB, width]
    r_ptr, b_ptr, br_ptr, r_stride, b_stride, br_stride, B, R = tables
    i_d = c + tl.arange(0, h.shape[1])[None, :]
    if REFS[K][0] == PER_ROW:
        p, mask = r_ptr + i_r * r_stride, i_d < REFS[K][2]
    elif REFS[K][0] == PER_SAMPLE:
        p, mask = b_ptr + i_b[:, None] * b_stride, (i_b < B)[:, None] & (i_d < REFS[K][2])
    else:
        p, mask = br_ptr + (i_b[:, None] * R + i_r) * br_stride, (i_b < B)[:, None] & (i_d < REFS[K][2])
    return tl.load(p + REFS[K][1] + i_d, mask=mask, other=0.0)


@triton.jit
def advance(tables, n, BLOCKS: tl.constexpr, K: tl.constexpr):
    """Return the tables as the n-th of the equal layers of block K sees them: a step further each."""
    r_ptr, b_ptr, br_ptr, r_stride, b_stride, br_stride, B, R = tables
    here = r_ptr + n * BLOCKS[K][4], b_ptr + n * BLOCKS[K][5], br_ptr + n * BLOCKS[K][6]
    return (here[0], here[1], here[2], r_stride, b_stride, br_stride, B, R)


@triton.jit
def affine(h, tables, i_b, i_r, c, REFS: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """Return h scale + shift."""
    if SCALE >= 0:
        h = h * vector(h, tables, i_b, i_r, c, REFS, SCALE)
    if SHIFT >= 0:
        h = h + vector(h, tables, i_b, i_r, c, REFS, SHIFT)
    return h


@triton.jit
def layer_norm(h, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Normalize the first WIDTH columns of every row."""
    inside = tl.arange(0, h.shape[1])[None, :] < WIDTH
    mean = tl.sum(tl.where(inside, h, 0.0), 1) / WIDTH
    centred = tl.where(inside, h - mean[:, None], 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + EPS)[:, None]


@triton.jit
def layer_norm_backward(grad, h, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Return the gradient at h of `layer_norm`: rstd (g - mean(g) - y mean(g y)) over the first WIDTH columns."""
    inside = tl.arange(0, h.shape[1])[None, :] < WIDTH
    mean = tl.sum(tl.where(inside, h, 0.0), 1) / WIDTH
    centred = tl.where(inside, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + EPS)[:, None]
    y = centred * rstd
    grad = tl.where(inside, grad, 0.0)
    along = tl.sum(grad * y, 1)[:, None] / WIDTH
    return tl.where(inside, rstd * (grad - tl.sum(grad, 1)[:, None] / WIDTH - y * along), 0.0)
