r"""The noise: counter-based, keyed by (seed, sample index, draw, element), so that every batch gives the same answer.

Element i of draw s for sample b is

.. math:: \epsilon_{bsi} = \sqrt2\,\mathrm{erf}^{-1}\big((w + \tfrac12)\,2^{-31}\big), \qquad
    w = (P_{si} \oplus Q_{bi})\, M_{bi} \bmod 2^{32}

from three 32-bit words: the point P belongs to the draw and is shared by all samples; shift Q and odd multiplier M
belong to the sample and are shared by all draws. Both maps are one-to-one, so eps is exactly standard normal, for one
exclusive or and one product an element instead of the hundred operations of a generator call. The points are

- ``independent``: Philox words. Draws of a sample are pairwise independent, and so are those of two samples: means and
  their variances are exact. M, a Philox word, makes every sample see the shared points in its own order; without it all
  samples of a call would be lucky or unlucky together.
- ``sobol``: a scrambled Sobol sequence, and M = 1. The exclusive or is then a digital shift, which keeps the sequence's
  net structure, so errors fall faster than 1/sqrt(S) while each sample's estimate stays unbiased.

References:
    Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011), https://doi.org/10.1145/2063384.2063405
    Monte Carlo Variance of Scrambled Net Quadrature (Owen, 1997), https://doi.org/10.1137/S0036142994277468
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..support.host import seed_of
from .select import implementation, runnable

SOBOL_MAX_DIM = torch.quasirandom.SobolEngine.MAXDIM - 1  # one dimension orders the draws
POINT_BYTES = 4  # of an element of a draw's point
STREAM_SHIFT, STREAM_MULTIPLIER, STREAM_POINT, STREAM_DEQUANTIZE, STREAM_LOSS, STREAM_PROBE, STREAM_NODES = range(7)
STREAM_ENCODER, STREAM_SEED = 7, 8  # of sixteen

_MASK = 0xFFFFFFFF
_BLOCK_WORDS = 1 << 14  # made at once on a CPU: Philox holds eight int64 for each int32 that it leaves
_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Fixed, as the shift per sample supplies the randomness. In few dimensions a scramble may be as bad as no sequence at
# all, at a size and for a density that nobody can tell beforehand; that of 20240816 was for those of
# tests/test_sobol.py, and this one is not. It is that of the first coordinates of so many: another number of dimensions
# would draw another.
_SOBOL_SCRAMBLE, _SCRAMBLED_TOGETHER = 2, 32


def philox(counter: tuple, key: tuple[int, int]) -> tuple:
    """Return the four words of Philox4x32-10, each int64 in [0, 2^32), where the counter's tensors lie.

    Arguments:
        counter: four int64 tensors, or arrays of numpy, that broadcast together, or plain ints, taken modulo 2^32; of
            ints alone the words are ints.
        key: two ints, taken modulo 2^32.
    """
    c0, c1, c2, c3 = (c & _MASK for c in counter)
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(10):
        # The 64-bit product wraps around in int64; its two halves are still the right 32-bit words.
        p0, p1 = c0 * _ROUND[0], c2 * _ROUND[1]
        c0, c1 = ((p1 >> 32) ^ c1 ^ k0) & _MASK, p1 & _MASK
        c2, c3 = ((p0 >> 32) ^ c3 ^ k1) & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _checked(seed: int) -> int:
    """Return a seed; raise ValueError for one that is no integer of 64 bits, since the key has no more."""
    seed = seed_of(seed)
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer of 64 bits, got {seed}; give it modulo 2**64")
    return seed


def words(seed: int, index: Tensor, draw: int, stream: int | range, d: int) -> Tensor:
    """Return d Philox words for each 64-bit index, int32 (two's complement), shape (len(index), d).

    Element i is word i % 4 of counter (i // 4, index mod 2^32, draw, stream + 16 (index // 2^32)) under the key
    (seed mod 2^32, seed // 2^32). A range of S streams gives shape (len(index), S, d). On a GPU a kernel of Triton's
    makes the same words in one launch.
    """
    seed, streams = _checked(seed), stream if isinstance(stream, range) else range(stream, stream + 1)
    if _by_kernel(index.device):
        found = implementation("triton").words(seed, index, draw, streams, d)
    elif (on_host := _array(index)) is not None:
        found = _words_on_host(seed, on_host, draw, streams, d)
    else:
        group = torch.arange((d + 3) // 4, device=index.device)
        low, high = (index & _MASK)[:, None, None], (index >> 32)[:, None, None]
        # A range needs no copy to a device.
        each = torch.arange(streams.start, streams.stop, device=index.device)[:, None]
        quad = philox((group, low, draw, each + 16 * high), (seed, seed >> 32))
        found = torch.stack(quad, -1).flatten(2)[..., :d].to(torch.int32)
    return found if isinstance(stream, range) else found[:, 0]


def _array(index: Tensor) -> np.ndarray | None:
    """Return a tensor of the host as an array; None for one elsewhere, of torch.func, or of a graph that is made."""
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        return index.numpy()
    except RuntimeError:  # of a tensor without memory of its own
        return None


def _words_on_host(seed: int, index: np.ndarray, draw: int, streams: range, d: int) -> Tensor:
    """Return `words` of several streams by numpy, whose operations on few numbers take less time."""
    group, each = np.arange((d + 3) // 4), np.arange(streams.start, streams.stop)[:, None]
    low, high = (index & _MASK)[:, None, None], (index >> 32)[:, None, None]
    quad = philox((group, low, draw, each + 16 * high), (seed, seed >> 32))
    found = np.stack(quad, -1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(found.reshape(len(index), len(streams), 4 * len(group))[..., :d]).contiguous()


def _by_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and "triton" in runnable(device, torch.float32)


def unit(seed: int, draw: int, stream: int) -> float:
    """Return one number in [0, 1) for a seed, without any tensor."""
    seed = _checked(seed)
    return philox((0, 0, draw, stream), (seed, seed >> 32))[0] * 2.0**-32


def derived_seed(seed: int, draw: int) -> int:
    """Return a seed of 64 bits for one of several estimates of the same samples, whose noise is then independent."""
    seed = _checked(seed)
    low, high, *_ = philox((0, 0, draw, STREAM_SEED), (seed, seed >> 32))
    return low | high << 32


def sample_keys(kind: str, seed: int, sample_index: Tensor, d: int, round_: int = 0) -> Tensor:
    """Return each sample's own words (Q, M), int32, shape (B, 2, d); `round_` renews them for further estimates."""
    both = range(STREAM_SHIFT, STREAM_MULTIPLIER + 1)
    if _by_kernel(sample_index.device):
        kept = 0 if kind == "sobol" else _MASK
        return implementation("triton").keys(_checked(seed), sample_index, round_, both, d, kept)
    found, start = torch.empty(len(sample_index), 2, d, dtype=torch.int32, device=sample_index.device), 0
    for index in _blocks(sample_index, d):
        own, start = found[start : start + len(index)], start + len(index)
        if kind == "sobol":
            own[:, 0], own[:, 1] = words(seed, index, round_, STREAM_SHIFT, d), 1
        else:
            own.copy_(words(seed, index, round_, both, d))
            own[:, 1] |= 1  # odd
    return found


def points(kind: str, seed: int, draws: range, total: int, d: int, device: torch.device, round_: int = 0) -> Tensor:
    """Return the words P of some draws, shared by all samples, int32, shape (len(draws), d).

    Arguments:
        kind: "independent" or "sobol".
        draws: which draws, a range inside range(total).
        total: how many draws the estimate has; it fixes the order of the Sobol points.
        round_: renews independent points for further estimates; Sobol points are renewed by the keys alone.
    """
    if kind == "sobol":
        return _sobol(total, d)[draws.start : draws.stop].to(device)
    blocks = _blocks(torch.arange(draws.start, draws.stop, device=device), d)
    found = [words(seed, block, round_, STREAM_POINT, d) for block in blocks]
    return found[0] if len(found) == 1 else torch.cat(found)


def _blocks(index: Tensor, d: int) -> tuple[Tensor, ...]:
    at_once = _BLOCK_WORDS if index.device.type == "cpu" else 64 * _BLOCK_WORDS  # a GPU wants few launches
    return index.split(max(1, at_once // d))


@lru_cache(maxsize=2)  # S x d words each
def _sobol(total: int, d: int) -> Tensor:
    together = max(d + 1, _SCRAMBLED_TOGETHER)
    engine = torch.quasirandom.SobolEngine(together, scramble=True, seed=_SOBOL_SCRAMBLE)
    sizes = [len(block) for block in _blocks(torch.arange(total, device="cpu"), together)]
    first = torch.cat([engine.draw(size, dtype=torch.float64)[:, 0].clone() for size in sizes])
    # Sorted by the first coordinate, draw s belongs to the s-th stratum of log-SNR: nodes and noise form one net.
    rank, found = first.argsort().argsort(), torch.empty(total, d, dtype=torch.int32, device="cpu")
    engine.reset()
    for place in rank.split(sizes):
        unit = engine.draw(len(place), dtype=torch.float64)[:, 1 : d + 1]
        found[place] = ((unit * 2.0**32).to(torch.int64) - 2**31).to(torch.int32)
    return found


def combine(keys: Tensor, point: Tensor) -> Tensor:
    """Return the words w = (P XOR Q) M, int32, shape (B, R, d), from keys (B, 2, d) and points (R, d)."""
    return (point[None] ^ keys[:, :1]).mul_(keys[:, 1:])


def normal(w: Tensor, sign: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map 32-bit words to standard normals through the inverse distribution function, times a sign where given.

    The product with a power of two is exact, so that the uniform rounds once, in every implementation alike; it is kept
    below 1, in float32 |eps| <= 5.42. Antithetic twins have the same words and the sign -1.

    torch's erfinv is the definition, in float64 exactly and in float32 to 1.2e-7 of itself; a kernel's polynomial
    (kernels/inverse_normal.py) stays within 4.9e-7. As torch operations that polynomial would be no more exact and take
    2.6 to 5.5 times as long on a CPU, since each of its sixteen steps passes over memory.
    """
    top = 1 - torch.finfo(dtype).eps / 2
    half = w.new_full((), 2.0**-32, dtype=dtype)  # a fill, where torch.tensor would copy from the host
    factor = math.sqrt(2) if sign is None else math.sqrt(2) * sign.to(dtype)
    return torch.add(half, w.to(dtype), alpha=2.0**-31).clamp_(-top, top).erfinv_().mul_(factor)


def uniform(w: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Map 32-bit words to [0, 1), strictly below 1 in every dtype."""
    top = 1 - torch.finfo(dtype).eps / 2
    return ((w.to(torch.int64) & _MASK).to(torch.float64) * 2.0**-32).to(dtype).clamp_(max=top)
