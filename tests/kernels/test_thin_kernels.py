"""Noise, perturbation, residual and control variate by Triton against the torch backend in float64.

In the interpreter, on the CPU; with TRITON_INTERPRET=0 on a GPU, as `make gpu-check` runs them.
"""

import pytest
import torch
from agreement import close, exact_normal

pytest.importorskip("triton")
import triton
import triton.language as tl
from fastscore.kernels.control import why_not
from fastscore.kernels.noise import normal
from kernel_cases import DEVICE, Case

from fastscore.ops import definitions as ops
from fastscore.ops import noise
from fastscore.ops import torch as truth
from fastscore.ops import triton as backend


@triton.jit
def words_kernel(p_ptr, q_ptr, m_ptr, w_ptr, n_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    w = (tl.load(p_ptr + i) ^ tl.load(q_ptr + i)) * tl.load(m_ptr + i)
    tl.store(w_ptr + i, w)
    tl.store(n_ptr + i, normal(w))


def test_noise_words_are_bit_exact_and_normals_are_float32s():
    n = 1 << 16
    keys = noise.sample_keys("independent", 5, torch.arange(1, device=DEVICE), n)
    points = noise.points("independent", 5, range(1), 1, n, DEVICE)
    points[0, :4] = keys[0, 0, :4] ^ torch.tensor([0, 1, -1, -(2**31)], device=DEVICE).to(torch.int32)
    w, found = torch.zeros(n, dtype=torch.int32, device=DEVICE), torch.empty(n, device=DEVICE)
    words_kernel[(1,)](points[0], keys[0, 0].contiguous(), keys[0, 1].contiguous(), w, found, n)
    assert torch.equal(w, noise.combine(keys, points)[0, 0])
    exact = exact_normal(w)
    # 4.9e-7 in float32 (tests/test_noise.py); a GPU's approximate logarithm and root add 1e-7 each.
    assert torch.allclose(found.double(), exact, rtol=8e-7, atol=0)
    assert torch.allclose(noise.normal(w).double(), exact, rtol=8e-7, atol=0)


THIN = [(1, 1, 1), (7, 8, 2), (3, 33, 13), (5, 3, 100), (2, 4, 784), (1, 2, 3000), (63, 1, 50), (1000, 1, 2)]


@pytest.mark.parametrize(("b", "r", "d"), THIN)
def test_thin_kernels_forward_and_backward(b, r, d):
    case = Case(b, r, d)
    x, sign, alpha, sigma = (v.float() for v in (case.x, case.sign, case.alpha, case.sigma))
    words = case.keys, case.points, sign
    x_t, eps = ops.perturb(x, *words, alpha, sigma, True, None, "triton")
    assert close(x_t, case.x_t)
    assert close(eps, case.eps)
    assert torch.equal(ops.perturb(x, *words, alpha, sigma, False, None, "triton")[0], x_t)
    half = ops.perturb(x, *words, alpha, sigma, False, torch.float16, "triton")[0]
    assert torch.equal(half, x_t.half())

    prediction = case.randn(b, r, d)
    want = truth.residual(prediction, case.x, case.eps, *words, case.a, case.b_, case.c)
    leaves = [prediction.float().requires_grad_(), x.clone().requires_grad_()]
    coefficients = [v.float() for v in (case.a, case.b_, case.c)]
    found = ops.residual(*leaves, x.new_empty(0), *words, *coefficients, "triton")
    assert close(found.detach(), want)
    grad = case.randn(b, r)
    expected = truth.residual_backward(grad, prediction, case.x, case.eps, *words, case.a, case.b_, case.c)
    for got, wanted in zip(torch.autograd.grad(found, leaves, grad.float()), expected):
        assert close(got, wanted, 1e-4)


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full", "mixture", "full mixture"])
@pytest.mark.parametrize(("b", "r", "d"), [(1, 1, 1), (7, 5, 2), (63, 2, 13), (3, 3, 100), (3, 5, 150)])
def test_control_kernel(kind, b, r, d, monkeypatch):
    monkeypatch.setattr(backend, "CONTROL_BYTES", 8 * 5 * d * 2)  # of two rows of a mixture, where they come in parts
    case = Case(b, r, d)
    q = case.reference(kind)
    words = case.keys, case.points, case.sign.float()
    found = ops.control(case.x.float(), *words, case.alpha, case.sigma, q.tensors(), "triton")
    assert close(found, q.residual(case.x, case.x_t, case.eps, case.alpha, case.sigma))


def test_control_kernel_says_why_it_cannot():
    assert backend.why_not_control(1, False, 100_000, DEVICE) is None
    assert backend.why_not_control(128, False, 129, DEVICE) is None
    assert "have up to 128 components, got 129" in backend.why_not_control(129, False, 129, DEVICE)
    assert "128 dimensions in a kernel, got 129" in backend.why_not_control(5, True, 129, DEVICE)
    # 512 rows of 128 float32 numbers, of a product's one factor.
    assert "a reference of 300 components in 128 dimensions takes 262,144 bytes" in why_not(300, False, 128, 232_448)


@pytest.mark.parametrize("seed", [0, 1, -3, (1 << 63) - 5, (1 << 64) - 1, 1 << 63, 0x1234567890ABCDEF])
@pytest.mark.parametrize(("d", "streams"), [(1, 1), (4, 2), (7, 2), (130, 1), (601, 2)])
def test_words_are_the_definitions_to_the_bit(seed, d, streams):
    index = torch.tensor([0, 5, 2**32 - 1, 2**32, 2**40 + 3], device=DEVICE)
    streams = range(2, 2 + streams)
    found = backend.words(seed, index, 9, streams, d)
    assert torch.equal(found.cpu(), noise.words(seed, index.cpu(), 9, streams, d))


@pytest.mark.parametrize("kind", ["independent", "sobol"])
@pytest.mark.parametrize("d", [1, 7, 601])
def test_keys_of_samples_are_the_definitions_to_the_bit(kind, d):
    index, streams = torch.tensor([0, 5, 2**32 - 1, 2**40 + 3], device=DEVICE), range(noise.STREAM_MULTIPLIER + 1)
    found = backend.keys(-3, index, 2, streams, d, 0 if kind == "sobol" else 0xFFFFFFFF)
    assert torch.equal(found.cpu(), noise.sample_keys(kind, -3, index.cpu(), d, 2))
