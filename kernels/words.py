"""The words of the noise, as `fastscore.ops.noise.words` defines them, bit for bit, in one launch.

Philox4x32-10 gives four words a call. One program makes BLOCK such quads of one (index, stream) pair: the points
of all draws, or both words of all samples, are one launch instead of a hundred integer operations in torch.

References:
    Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011), https://doi.org/10.1145/2063384.2063405
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 128  # quads
NONE = -1  # of the streams


@triton.jit(do_not_specialize=["seed", "draw", "stream", "odd", "kept"])
def words_kernel(
    index_ptr,  # int64 (N,)
    words_ptr,  # out: int32 (N, S, D)
    seed, draw, stream,  # key; third word of the counter; first stream
    odd, kept,  # which of the S streams gets the last bit set, and which other bits it keeps
    S, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i_n, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    quad = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i_n)
    zero = (quad * 0).to(tl.uint32)
    low = zero + (index & 0xFFFFFFFF).to(tl.uint32)
    third = zero + draw.to(tl.uint32)
    high = zero + (stream + i_s + 16 * (index >> 32)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, quad.to(tl.uint32), low, third, high)
    if i_s == odd:
        bits = kept.to(tl.uint32)
        w0, w1, w2, w3 = (w0 & bits) | 1, (w1 & bits) | 1, (w2 & bits) | 1, (w3 & bits) | 1
    o = words_ptr + (i_n * S + i_s) * D + 4 * quad
    tl.store(o, w0.to(tl.int32, bitcast=True), mask=4 * quad < D)
    tl.store(o + 1, w1.to(tl.int32, bitcast=True), mask=4 * quad + 1 < D)
    tl.store(o + 2, w2.to(tl.int32, bitcast=True), mask=4 * quad + 2 < D)
    tl.store(o + 3, w3.to(tl.int32, bitcast=True), mask=4 * quad + 3 < D)


def words(
    seed: int, index: Tensor, draw: int, streams: range, d: int, odd: int = NONE, kept: int = 0xFFFFFFFF
) -> Tensor:
    """Return int32 words (n, S, d) for indices (n,) and consecutive streams.

    Of the stream at place `odd` the last bit is set, and of its others those in the mask `kept` stay.
    """
    found = torch.empty(len(index), len(streams), d, dtype=torch.int32, device=index.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(triton.cdiv(d, 4)))
    grid = (len(index), len(streams), triton.cdiv(triton.cdiv(d, 4), block))
    signed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)  # as the kernel's integers are
    words_kernel[grid](
        index.contiguous(), found, signed, draw, streams.start, odd, kept, len(streams), d, block, num_warps=1
    )
    return found
