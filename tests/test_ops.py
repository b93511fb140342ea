"""The two ops: registered correctly, equal to their definitions, with exact gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastscore.ops import definitions as ops
from fastscore.ops import noise
from fastscore.ops.instructions import Affine, Linear, encode
from fastscore.ops.select import BACKENDS, select
from fastscore.reference.gaussians import Reference

SIZES = [(1, 1, 1), (3, 5, 63), (2, 4, 100), (7, 9, 13), (1, 3, 1000)]


class Names(TorchDispatchMode):
    """The operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def inputs(b, r, d, dtype, requires_grad=False):
    generator = torch.Generator().manual_seed(b + r + d)
    x = torch.randn(b, d, dtype=dtype, generator=generator, requires_grad=requires_grad)
    keys = noise.sample_keys("independent", 1, torch.arange(b), d)
    points = noise.points("independent", 1, range(r), r, d, torch.device("cpu"))
    sign = torch.where(torch.arange(r) % 3 == 1, -1.0, 1.0).to(dtype)
    tables = torch.rand(5, r, dtype=dtype, generator=generator) + 0.1
    prediction = torch.randn(b, r, d, dtype=dtype, generator=generator, requires_grad=requires_grad)
    return x, keys, points, sign, tables, prediction


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("b", "r", "d"), SIZES)
def test_ops_are_their_definitions(b, r, d, dtype):
    x, keys, points, sign, (alpha, sigma, a, b_, c), prediction = inputs(b, r, d, dtype)
    x_t, eps = ops.perturb(x, keys, points, sign, alpha, sigma)
    found = ops.residual(prediction, x, eps, keys, points, sign, a, b_, c)
    again = ops.residual(prediction, x, eps.new_empty(0), keys, points, sign, a, b_, c)
    assert torch.equal(again, found)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for i in range(b):
        for j in range(r):
            word = ((points[j] ^ keys[i, 0]).long() * keys[i, 1].long()).to(torch.int32)
            e = sign[j] * noise.normal(word, dtype=dtype)
            assert torch.equal(eps[i, j], e)
            assert torch.allclose(x_t[i, j], alpha[j] * x[i] + sigma[j] * e, rtol=tolerance, atol=tolerance)
            error = c[j] * (a[j] * e + b_[j] * x[i] - prediction[i, j])
            assert float(found[i, j]) == pytest.approx(float(error.square().sum()), rel=tolerance)


def test_the_operators_are_left_out_where_nothing_is_differentiated():
    x, *words, (alpha, sigma, a, b, c), prediction = inputs(3, 5, 63, torch.float32)

    def run():
        perturb, residual = ops.by("torch")
        x_t, eps = perturb(x, *words, alpha, sigma)
        return x_t, eps, residual(prediction, x, eps, *words, a, b, c)

    expected = run()
    with torch.no_grad(), Names() as mode:
        assert all(map(torch.equal, run(), expected))
    assert not any(name.startswith("fastscore") for name in mode.names)
    with Names() as mode:
        run()
    assert {"fastscore.perturb.default", "fastscore.residual.default"} <= set(mode.names)


def test_the_short_cut_for_eps_is_the_general_formula():
    x, keys, points, sign, (alpha, sigma, _, _, c), prediction = inputs(3, 4, 33, torch.float64)
    _, eps = ops.perturb(x, keys, points, sign, alpha, sigma)
    one, zero = torch.ones(4).double(), torch.zeros(4).double()
    expected = c.square() * (eps - prediction).square().sum(-1)
    assert torch.allclose(ops.residual(prediction, x, eps, keys, points, sign, one, zero, c), expected, rtol=1e-12)


@pytest.mark.parametrize(("b", "r", "d"), [(1, 1, 1), (3, 4, 7)])
def test_gradients_match_finite_differences(b, r, d):
    x, keys, points, sign, (alpha, sigma, a, b_, c), prediction = inputs(b, r, d, torch.float64, True)
    assert torch.autograd.gradcheck(lambda x: ops.perturb(x, keys, points, sign, alpha, sigma)[0], (x,))
    eps = ops.perturb(x.detach(), keys, points, sign, alpha, sigma)[1]
    assert torch.autograd.gradcheck(lambda p, x: ops.residual(p, x, eps, keys, points, sign, a, b_, c), (prediction, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    x, keys, points, sign, (alpha, sigma, a, b_, c), prediction = inputs(2, 3, 5, dtype, True)
    torch.library.opcheck(ops.perturb, (x, keys, points, sign, alpha, sigma))
    eps = ops.perturb(x.detach(), keys, points, sign, alpha, sigma)[1]
    torch.library.opcheck(ops.residual, (prediction, x, eps, keys, points, sign, a, b_, c))


def test_backend_choice_and_message_share_one_predicate(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cpu = torch.device("cpu")
    assert select(cpu, torch.float32) == "torch"
    assert select(cpu, torch.float64, "torch") == "torch"
    for backend in BACKENDS[:2]:
        reason = backend.why_not(cpu, torch.float32)
        with pytest.raises(ValueError, match=f"{backend.name}: {reason}"):
            select(cpu, torch.float32, backend.name)
    with pytest.raises(ValueError, match=r"torch: sums need float32 or float64, got torch\.float16"):
        select(cpu, torch.float16)
    with pytest.raises(ValueError, match="'auto' or one of cuda, triton, torch; got 'metal'"):
        select(cpu, torch.float32, "metal")


def test_an_older_triton_is_told_from_a_missing_gpu(monkeypatch):
    monkeypatch.setattr("fastscore.ops.select.triton_version", lambda: "3.4.0")
    with pytest.raises(ValueError, match=r"triton: its kernels need Triton 3\.6, found 3\.4\.0"):
        select(torch.device("cpu"), torch.float32, "triton")


@pytest.mark.parametrize("wanted", ["x", "weights", "both"])
def test_the_gradient_is_of_what_wants_one_and_no_more(wanted, monkeypatch):
    """Of a program x -> W x + shift: with frozen data the reference, which depends on them alone, is not evaluated."""
    b, r, d = 3, 5, 4
    x, keys, points, sign, rows, _ = inputs(b, r, d, torch.float64)
    weight, shift = torch.randn(d, d, dtype=torch.float64), torch.randn(1, r, d, dtype=torch.float64)
    code = encode([Linear(0), Affine(-1, 0)])
    q = Reference.isotropic(1.3)

    def value(x, weight, reference):
        numbers = torch.stack([sign, *rows], 1)
        given = code, [weight], [shift], reference, "torch"
        return ops.density_mlp(x, keys, points, numbers, rows[0], rows[1], *given).square().sum()

    x.requires_grad_(wanted != "weights")
    weight.requires_grad_(wanted != "x")
    leaves = [leaf for leaf in (x, weight) if leaf.requires_grad]
    expected = torch.autograd.grad(value(x, weight, q.tensors()), leaves)
    # Central differences of a sum of fourth powers, in float64.
    for leaf, gradient in zip(leaves, expected):
        direction, step = torch.randn_like(leaf), 1e-5
        with torch.no_grad():
            ends = [
                value(*(v + s * step * direction if v is leaf else v for v in (x, weight)), q.tensors())
                for s in (1, -1)
            ]
        assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float((gradient * direction).sum()), rel=1e-6)
    calls, real = [], Reference.residual
    monkeypatch.setattr(Reference, "residual", lambda *given: calls.append(1) or real(*given))
    torch.autograd.grad(value(x, weight, q.tensors()), leaves)
    assert len(calls) == (1 if wanted == "weights" else 2)  # forward, and again in the backward pass of x
