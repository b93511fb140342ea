"""Noise: bit-exact integers, exact distribution, and the independence that the error bars rely on."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import exact_normal
from fastscore.kernels import inverse_normal

from fastscore.ops import noise

# Random123 1.09, tests/kat_vectors: philox4x32 10 rounds, (counter), (key), (result).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


# A device without Triton has tensors, the host arrays of numpy.
WHERE = ["integers", "tensors", "arrays"]


@pytest.mark.parametrize(
    "kind", [int, lambda c: torch.tensor([c]), lambda c: np.array([c])], ids=["int", "torch", "np"]
)
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_random123s_answers(counter, key, result, kind):
    assert tuple(int(torch.as_tensor(w)) for w in noise.philox(tuple(map(kind, counter)), key)) == result


try:
    import triton
    import triton.language as tl

    @triton.jit
    def philox_kernel(p_out, seed, index, draw, stream, N: tl.constexpr):
        o_quad = tl.arange(0, N)
        zero = o_quad * 0
        w0, w1, w2, w3 = tl.philox(seed, o_quad, zero + index, zero + draw, zero + stream)
        tl.store(p_out + 4 * o_quad, w0)
        tl.store(p_out + 4 * o_quad + 1, w1)
        tl.store(p_out + 4 * o_quad + 2, w2)
        tl.store(p_out + 4 * o_quad + 3, w3)
except ImportError:
    triton = None


@pytest.mark.skipif(triton is None, reason="triton has no wheel for this platform")
@pytest.mark.parametrize("seed", [0, 12345, (1 << 63) - 5, 0x1234567890ABCDEF])
def test_words_are_tritons_integers(seed):
    out = torch.zeros(256, dtype=torch.int32)
    philox_kernel[(1,)](out, seed, 77, 3, noise.STREAM_POINT, 64)
    assert torch.equal(noise.words(seed, torch.tensor([77]), 3, noise.STREAM_POINT, 256)[0], out)


def test_word_layout_is_the_documented_one():
    index, seed = torch.tensor([3, 2**32 + 3]), (7 << 32) | 11
    found = noise.words(seed, index, 9, noise.STREAM_POINT, 10)
    for row, i in enumerate(index.tolist()):
        for element in range(10):
            counter = (element // 4, i & 0xFFFFFFFF, 9, noise.STREAM_POINT + 16 * (i >> 32))
            word = int(noise.philox(counter, (11, 7))[element % 4])
            assert int(found[row, element]) & 0xFFFFFFFF == word


def test_normals_match_the_inverse_distribution_function():
    w = torch.tensor([-(2**31), -(2**30), -1, 0, 1, 2**30, 2**31 - 1], dtype=torch.int32)
    exact = torch.special.ndtri((w.double() + 2**31 + 0.5) * 2.0**-32)
    # The scale 1 - 2^-53 shifts the outermost probability, 2^-33, by a millionth.
    assert torch.allclose(noise.normal(w, dtype=torch.float64), exact, rtol=1e-7, atol=1e-16)
    inner = noise.normal(w[1:-1]).double()
    assert torch.allclose(inner, exact[1:-1], rtol=1e-6, atol=1e-9)
    ends = noise.normal(w[[0, -1]])
    assert torch.isfinite(ends).all()
    assert 5.2 < float(ends[1]) < 5.6


def both_ends_and_an_even_sample():
    """Every word of the two ends and of the middle, 2^16 each, and one of 2^12 of all others, at their centres."""
    ends = [torch.arange(2**16) - 2**31, torch.arange(2**16) - 2**15, 2**31 - 1 - torch.arange(2**16)]
    return torch.cat([torch.arange(-(2**31) + 2**11, 2**31, 2**12), *ends]).to(torch.int32)


def polynomial_normal(w, coefficients=inverse_normal.COEFFICIENTS):
    """Evaluate the kernels' polynomial as float32 does, with fused products and sums."""

    def fma(a, b, c):
        return (a.double() * b + c).float()  # float32's product is exact in float64

    u = fma(w.float(), 2.0**-31, 2.0**-32)
    v = u.abs().clamp(max=inverse_normal.LARGEST)
    log = fma(-v, v.double(), 1.0).double().log2().float()
    s = (inverse_normal.OFFSET - log).sqrt() - inverse_normal.CENTRE
    p = torch.full_like(s, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        p = fma(p, s.double(), torch.tensor(c).double())
    return p * u


def test_the_polynomial_of_kernels_is_the_inverse_distribution_function():
    w = both_ends_and_an_even_sample()
    found, exact = polynomial_normal(w).double(), exact_normal(w)
    # The polynomial's own 2.4e-7, and the roundings of its last three steps at 6e-8 each.
    assert float((found / exact - 1).abs().max()) < 5e-7
    even = 2**20
    assert abs(float(found[:even].square().mean() / exact[:even].square().mean() - 1)) < 1e-7
    # 2^20 words of equal probability miss 1.3e-6 of the variance, in the tails.
    assert float(exact[:even].square().mean()) == pytest.approx(1, abs=5e-6)
    torchs = noise.normal(w)
    assert float((torchs.double() / exact - 1).abs().max()) < 2e-7
    assert float((torchs.double() - found).abs().max()) < 3e-6  # all backends agree to float32's roundings


def test_a_wrong_digit_of_the_polynomial_is_seen():
    planted = [*inverse_normal.COEFFICIENTS[:6], -0.0002267207739012316, *inverse_normal.COEFFICIENTS[7:]]
    w = both_ends_and_an_even_sample()
    assert float((polynomial_normal(w, planted).double() / exact_normal(w) - 1).abs().max()) > 5e-7


def test_the_cuda_kernels_have_the_same_polynomial():
    text = (Path(__file__).parents[1] / "csrc" / "common" / "noise.cuh").read_text()
    body = text[text.index("float normal(") : text.index("return p * u")]
    numbers = [float(v) for v in re.findall(r"-?\d+\.\d+(?:e-\d+)?(?=f\b)", body)]
    assert numbers[:6] == [2.0**-31, 2.0**-32, inverse_normal.LARGEST, inverse_normal.OFFSET, 1, inverse_normal.CENTRE]
    assert tuple(reversed(numbers[6:])) == inverse_normal.COEFFICIENTS


def draw_eps(kind, seed, samples, draws, d):
    points = noise.points(kind, seed, range(draws), draws, d, torch.device("cpu"))
    keys = noise.sample_keys(kind, seed, torch.arange(samples), d)
    return noise.normal(noise.combine(keys, points), dtype=torch.float64)


@pytest.mark.parametrize("kind", ["independent", "sobol"])
def test_moments_are_those_of_standard_normals(kind):
    eps = draw_eps(kind, 0, 256, 512, 8)
    # 256 shifts make 256 independent means of 512 draws each, over 8 coordinates; five standard errors.
    error = 5 / (256 * 512 * 8) ** 0.5
    assert abs(float(eps.mean())) < error
    assert abs(float(eps.square().mean()) - 1) < error * 2**0.5
    assert abs(float(eps.pow(4).mean()) - 3) < error * 96**0.5


def test_samples_and_draws_are_uncorrelated():
    eps = draw_eps("independent", 3, 64, 64, 1024)
    # Products of distinct samples, and of distinct draws: mean zero, 1024 coordinates, also for squares.
    for value, variance in ((eps, 1.0), (eps.square() - 1, 2.0)):
        across_samples = (value[0::2] * value[1::2]).mean(-1)
        across_draws = (value[:, 0::2] * value[:, 1::2]).mean(-1)
        for product in (across_samples, across_draws):
            assert abs(float(product.mean())) < 5 * variance / (product.numel() * 1024) ** 0.5


def test_sobol_points_fill_space_more_evenly_than_random_ones():
    def additive_error(kind):
        eps = draw_eps(kind, 0, 64, 256, 16)
        return float((eps.square().mean(1) - 1).square().mean().sqrt())

    # A stratified coordinate integrates eps^2 with error of order 1/S instead of 1/sqrt(S).
    assert additive_error("sobol") < 0.2 * additive_error("independent")


@pytest.mark.parametrize("function", ["linear", "quadratic", "sign"])
def test_samples_are_not_lucky_together(function):
    """Given the shared points of one seed, the spread over samples is still that of independent draws."""
    ratios = []
    for seed in range(64):
        eps = draw_eps("independent", seed, 400, 16, 1)[..., 0]
        value = {"linear": eps, "quadratic": (eps.square() - 1) / 2**0.5, "sign": eps.sign()}[function]
        ratios.append(float(16 * value.mean(1).var()))
    ratios = torch.tensor(ratios)
    # Variances from 400 samples of nearly normal means: standard deviation sqrt(2 / 399) = 0.07; 0.08 with their tails.
    assert float(ratios.mean()) == pytest.approx(1, abs=5 * 0.08 / 8)
    assert float(ratios.std()) < 1.5 * 0.08


def test_keys_do_not_depend_on_blocks(monkeypatch):
    whole = noise.sample_keys("independent", 5, torch.arange(100), 7)
    monkeypatch.setattr(noise, "_BLOCK_WORDS", 40)
    assert torch.equal(noise.sample_keys("independent", 5, torch.arange(100), 7), whole)


def test_uniform_stays_below_one():
    w = torch.tensor([-1, 0, 2**31 - 1], dtype=torch.int32)
    assert float(noise.uniform(w)[0]) < 1
    assert float(noise.uniform(w)[1]) == 0


@pytest.mark.parametrize("seed", [1 << 64, 1 << 70, -(1 << 63) - 1])
def test_seeds_that_would_be_others_are_refused(seed):
    for call in (noise.unit, noise.words):
        with pytest.raises(ValueError, match="seed must be an integer of 64 bits, got"):
            call(seed, *((0, 0) if call is noise.unit else (torch.arange(2), 0, 0, 3)))
