"""Operations on a tile of rows, [BLOCK_B, width] in float32 registers: products, vector operands, normalization.

A vector operand is a constexpr reference (level, offset, width) into `tables`: level "r" is one vector per row, shared by
all samples; "b" one per sample, shared by all rows; "br" one for each pair. An empty reference is no operand at all.
"""

import triton
import triton.language as tl


@triton.jit
def tile(ptr, K: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr):
    """Load a K x N block of a row-major matrix that is padded to whole blocks."""
    return tl.load(ptr + tl.arange(0, K)[:, None] * STRIDE + tl.arange(0, N)[None, :])


@triton.jit
def matrix(ptr, SPEC: tl.constexpr):
    """Load a whole padded weight, SPEC = (offset, in, out)."""
    return tile(ptr + SPEC[0], SPEC[1], SPEC[2], SPEC[2])


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
    """Return h w in float32. PRECISION: "tf32x3" (float32's accuracy), "tf32", "bf16", "fp16"; "ieee" and "emulated bf16"
    are for the interpreter, whose bf16 products are not to be trusted."""
    if PRECISION == "bf16" or PRECISION == "fp16":
        return tl.dot(operand(h, PRECISION), w)
    elif PRECISION == "emulated bf16":
        return tl.dot(operand(h, PRECISION), w, input_precision="ieee")
    else:
        return tl.dot(h, w, input_precision=PRECISION)


@triton.jit
def vector(h, tables, i_b, i_r, c, REF: tl.constexpr):
    """Load an operand for the columns c, c + 1, ... of a tile like h; zero beyond its width."""  # [1 or BB, width]
    r_ptr, b_ptr, br_ptr, r_stride, b_stride, br_stride, B, R = tables
    i_d = c + tl.arange(0, h.shape[1])[None, :]
    if REF[0] == "r":
        p, mask = r_ptr + i_r * r_stride, i_d < REF[2]
    elif REF[0] == "b":
        p, mask = b_ptr + i_b[:, None] * b_stride, (i_b < B)[:, None] & (i_d < REF[2])
    else:
        p, mask = br_ptr + (i_b[:, None] * R + i_r) * br_stride, (i_b < B)[:, None] & (i_d < REF[2])
    return tl.load(p + REF[1] + i_d, mask=mask, other=0.0)


@triton.jit
def advance(tables, n, STEPS: tl.constexpr):
    """Return the tables as the n-th of equal layers sees them: STEPS columns further each."""
    r_ptr, b_ptr, br_ptr, r_stride, b_stride, br_stride, B, R = tables
    return (
        r_ptr + n * STEPS[0], b_ptr + n * STEPS[1], br_ptr + n * STEPS[2], r_stride, b_stride, br_stride, B, R
    )  # fmt: skip


@triton.jit
def affine(h, tables, i_b, i_r, c, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """Return h scale + shift."""
    if len(SCALE):
        h = h * vector(h, tables, i_b, i_r, c, SCALE)
    if len(SHIFT):
        h = h + vector(h, tables, i_b, i_r, c, SHIFT)
    return h


@triton.jit
def scaled(h, tables, i_b, i_r, c, SCALE: tl.constexpr):
    """Return h scale; the reference ("one",) stands for a scale of one."""
    if SCALE[0] == "one":
        return h
    else:
        return h * vector(h, tables, i_b, i_r, c, SCALE)


@triton.jit
def layer_norm(h, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """Normalize the first WIDTH columns of every row."""
    inside = tl.arange(0, h.shape[1])[None, :] < WIDTH
    mean = tl.sum(tl.where(inside, h, 0.0), 1) / WIDTH
    centred = tl.where(inside, h - mean[:, None], 0.0)
    return centred * tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + EPS)[:, None]
