"""The gradient of the fused op in its parameters by Triton's kernel, against autograd through the definition.

In the interpreter, on the CPU; with TRITON_INTERPRET=0 on a GPU, as `make gpu-check` runs them.
"""

import itertools

import pytest
import torch
from agreement import close

pytest.importorskip("triton")
from fastscore.kernels import density_mlp_dp, packing
from fastscore.kernels.names import ACTIVATIONS
from fastscore.kernels.weights import weight_buffer
from kernel_cases import DEVICE, Case, adaln, both, edm, skip, waiting

from fastscore import Reference
from fastscore.ops import definitions as ops
from fastscore.ops import gradient
from fastscore.ops import torch as truth
from fastscore.ops import triton as backend
from fastscore.ops.instructions import Act, Add, Affine, Linear, Norm, Save, encode
from fastscore.ops.task import Task, WithRespectTo

# Sums in float32 of B R rows' gradients, each right to 1e-5 of its mean size; what cancels among the rows is bounded by
# the mean size of the sums alone.
TOLERANCE = 1e-4


def exact(case, net, kind, v):
    """Return the gradients of sum(v f) in x, weights and tables by autograd in float64."""
    code, weights, tables = net
    x, *rest = leaves = [t.clone().requires_grad_() for t in (case.x, *weights, *tables)]
    x_t = case.alpha[:, None] * x[:, None] + case.sigma[:, None] * case.eps
    prediction = truth.run(code, rest[: len(weights)], rest[len(weights) :], x_t)
    f = truth.residual(prediction, x, case.eps, case.keys, case.points, case.sign, case.a, case.b_, case.c)
    if kind:
        f = f - Reference(*case.reference(kind).tensors()).residual(x, x_t, case.eps, case.alpha, case.sigma)
    return torch.autograd.grad(f, leaves, v, materialize_grads=True)


def by_op(case, net, kind, v, dtype=torch.float32, wanted=(True, True, True)):
    """Return the gradients of those that are wanted by the op's backward pass, None for the others."""
    code, weights, tables = net
    parts = [case.x.float()], [w.to(dtype) for w in weights], [t.float() for t in tables]
    (x,), weights, tables = ([t.clone().requires_grad_(asked) for t in part] for part, asked in zip(parts, wanted))
    q = case.reference(kind).tensors() if kind else []
    f = ops.density_mlp(
        x, case.keys, case.points, case.rows.float(), case.alpha, case.sigma, encode(code), weights, tables, q, "triton"
    )
    every = [x, *weights, *tables]
    asked = [leaf for leaf in every if leaf.requires_grad]
    found = iter(torch.autograd.grad(f, asked, v.float(), materialize_grads=True))
    return [next(found) if leaf.requires_grad else None for leaf in every]


@pytest.fixture(autouse=True)
def by_the_kernel(monkeypatch):
    """Count launches of the kernel; nothing but it may compute a gradient here."""
    launches, host = [], density_mlp_dp.density_mlp_dp
    monkeypatch.setattr(density_mlp_dp, "density_mlp_dp", lambda *a: launches.append(a) or host(*a))
    monkeypatch.setattr(gradient, "_by_autograd", None)
    return launches


@pytest.fixture
def in_parts(monkeypatch):
    """Return a function that lets every launch split its rows into so many parts."""
    return lambda parts: monkeypatch.setattr(density_mlp_dp, "_splits", lambda *_: parts)


# Not every pair of sizes, but every size of each kind. What a launch splits its rows into is no matter of the network's
# instructions: both ways of small cases, of more and of fewer rows than parts, and one of each large one.
CASES = [
    *((adaln, 1, 1, 1, 16, 1, "isotropic", parts) for parts in (1, 3)),
    (adaln, 7, 8, 2, 64, 3, "diagonal", 3),
    *((edm, 33, 2, 13, 100, 2, "diagonal", parts) for parts in (1, 3)),
    (waiting, 5, 33, 50, 32, 3, None, 3),
    *((both, 3, 2, 20, 32, 3, None, parts) for parts in (1, 3)),
    *((skip, 3, 2, 5, 32, 0, "isotropic", parts) for parts in (1, 3)),
    (adaln, 35, 3, 100, 100, 2, "isotropic", 1),
    (edm, 18, 5, 128, 128, 1, "diagonal", 1),
]


@pytest.mark.parametrize(("net", "b", "r", "d", "width", "depth", "kind", "parts"), CASES)
def test_all_gradients_are_the_definitions(net, b, r, d, width, depth, kind, parts, in_parts, by_the_kernel):
    in_parts(parts)
    case = Case(b, r, d)
    network, v = net(case, width, depth), case.randn(b, r)
    found, expected = by_op(case, network, kind, v), exact(case, network, kind, v)
    assert len(by_the_kernel) == 1
    for k, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.shape == other.shape
        assert close(one, other, TOLERANCE), k


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_what_wants_a_gradient_gets_the_same_numbers(wanted, by_the_kernel):
    case = Case(5, 4, 13)
    network, v = adaln(case, 20, 2), case.randn(5, 4)
    every, found = by_op(case, network, "diagonal", v), by_op(case, network, "diagonal", v, wanted=wanted)
    assert len(by_the_kernel) == 1 + any(wanted[1:])  # x alone has a kernel with its tape in registers
    n = len(network[1])
    asked = [wanted[0], *[wanted[1]] * n, *[wanted[2]] * len(network[2])]
    for got, whole, want in zip(found, every, asked, strict=True):
        assert (got is not None) == want
        if got is not None:
            torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-6 * float(whole.abs().mean()))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    case = Case(3, 2, 5)
    network, v = edm(case, 20, 2, name), case.randn(3, 2)
    for one, other in zip(by_op(case, network, None, v), exact(case, network, None, v), strict=True):
        assert close(one, other, TOLERANCE)


@pytest.mark.parametrize("kind", ["full", "mixture", "full mixture"])
def test_any_reference_goes_where_x_wants_no_gradient(kind):
    case = Case(3, 2, 5)
    network, v = adaln(case, 20, 1), case.randn(3, 2)
    found, expected = by_op(case, network, kind, v, wanted=(False, True, True)), exact(case, network, kind, v)
    assert all(close(one, other, TOLERANCE) for one, other in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(dtype):
    case = Case(7, 6, 13)
    code, weights, tables = adaln(case, 64, 2)
    weights = [w.to(dtype).double() for w in weights]
    v = case.randn(7, 6)
    found, expected = (
        by_op(case, (code, weights, tables), "diagonal", v, dtype),
        exact(case, (code, weights, tables), "diagonal", v),
    )
    for one, other in zip(found, expected, strict=True):
        # Operands are rounded to 2^-9 (2^-12, and not at all in the interpreter) of themselves at random, through eight
        # products; so are the sums of weights at the end. In the root of the mean square, of which a wrong operand
        # would take a share of order one.
        assert float((one.double() - other).norm() / other.norm()) < 8**0.5 * 2.0**-8
    assert {t.dtype for t in found[1 : 1 + len(weights)]} == {dtype}


def test_one_weight_of_two_layers_and_one_table_of_two_places():
    case = Case(5, 3, 16)
    weights = [case.randn(16, 16) / 4, case.randn(16, 16) / 4]
    tables = [case.randn(1, 1, 16), case.randn(5, 1, 16)]
    code = [Affine(0, 1), Affine(1, -1), Linear(0), Affine(-1, 0), Act("silu"), Linear(0), Save(0), Affine(1, 0)]
    code += [Add(0, 1), Linear(1), Affine(1, 1), Affine(0, -1)]
    v = case.randn(5, 3)
    network = code, weights, tables
    for one, other in zip(by_op(case, network, None, v), exact(case, network, None, v), strict=True):
        assert close(one, other, TOLERANCE)


def test_a_launch_repeats_to_the_bit(in_parts):
    in_parts(2)
    case = Case(35, 4, 5)
    network, v = adaln(case, 20, 2), case.randn(35, 4)
    assert all(map(torch.equal, by_op(case, network, None, v), by_op(case, network, None, v)))


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (False, False, True)])
def test_opcheck(wanted):
    case = Case(2, 3, 5)
    code, weights, tables = adaln(case, 16, 1)
    arguments = case.keys, case.points, case.rows.float(), case.alpha, case.sigma, encode(code)
    operands = [w.float() for w in weights], [t.float() for t in tables], case.reference("diagonal").tensors()
    v = case.randn(2, 3).float()
    torch.library.opcheck(
        gradient.density_mlp_dp, (v, case.x.float(), *arguments, *operands, list(wanted), "triton"),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("d", "layers", "components", "of_x", "reason"),
    [
        (129, 1, 1, False, "gradients go up to 128 dimensions in a kernel, got 129"),
        (5, 21, 1, False, "gradients go up to 40 instructions that are no loop of equal layers, got 42"),
        (5, 1, 2, True, "gradients of x in a kernel need a reference along the axes"),
        (5, 1, 2, False, None),
        (5, 20, 1, True, None),
    ],
)
def test_it_says_why_it_cannot(d, layers, components, of_x, reason):
    unlike = [op for k in range(layers - 1) for op in (Norm(1e-5 * (k + 1)), Linear(1))]  # no two layers are equal
    code = [Linear(0), *unlike, *[Act("silu"), Act("silu")], Linear(2)]
    weights = [torch.zeros(16, d), torch.zeros(16, 16), torch.zeros(d, 16)]
    task = Task.of(code, weights, ["r"], d, DEVICE, components)
    assert backend.why_not_dp(task, of_x) == reason
    assert gradient.by_kernel("triton", task, WithRespectTo(of_x, True, False)) == reason
    assert gradient.by_kernel("torch", task, WithRespectTo(of_x, True, True)) == "the backend is PyTorch"


def test_float64_weights_have_none():
    task = Task.of([Linear(0), Linear(1)], [torch.zeros(16, 3).double(), torch.zeros(3, 16).double()], [], 3, DEVICE)
    assert "float64" in backend.why_not_dp(task, False)


def test_what_a_row_takes_is_what_the_launch_allocates(monkeypatch):
    """Of tensors with one entry a row at least, with every row in a program of its own."""
    case = Case(4, 6, 13)
    code, weights, tables = adaln(case, 64, 2)
    sizes, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(empty(*a, **k)) or sizes[-1])
    monkeypatch.setattr(density_mlp_dp, "_splits", lambda work, x, rows: rows)
    monkeypatch.setattr(density_mlp_dp, "samples_of", lambda work: 4)
    by_op(case, (code, weights, tables), None, case.randn(4, 6), wanted=(False, True, True))
    levels = map(packing.level_of, tables)
    bound = backend.bytes_dp(Task.of(code, [w.float() for w in weights], levels, 13, DEVICE))
    taken = sum(t.nbytes for t in sizes) / (4 * 6)
    assert 0.5 * bound < taken <= bound


@pytest.mark.parametrize("shapes", [[(16, 16)] * 3, [(32, 5), (20, 32), (32, 20), (30, 32), (5, 30)]])
def test_weights_lie_transposed_and_padded_in_one_buffer(shapes):
    case = Case(1, 1, 1)
    given = [case.randn(*shape) for shape in shapes]
    specs, buffer = weight_buffer(given, [(packing.padded(i), packing.padded(o)) for o, i in shapes], torch.float32)
    assert sorted(offset for offset, _, _ in specs)[0] == 0
    assert buffer.numel() == sum(i * o for _, i, o in specs)
    for weight, (offset, in_, out) in zip(given, specs, strict=True):
        expected = torch.zeros(in_, out, device=DEVICE)
        expected[: weight.shape[1], : weight.shape[0]] = weight.T
        assert torch.equal(buffer[offset : offset + in_ * out].view(in_, out), expected)
