"""The fused Triton kernels against the torch backend in float64, forward and backward.

In the interpreter, on the CPU; with TRITON_INTERPRET=0 on a GPU, as `make gpu-check` runs them.
"""

import warnings

import pytest
import torch
from agreement import close

pytest.importorskip("triton")
from fastscore.kernels import density_mlp as fused
from fastscore.kernels import launch
from fastscore.kernels.names import ACTIVATIONS
from kernel_cases import DEVICE, Case, adaln, bare, both, edm, skip, waiting
from triton.runtime.errors import OutOfResources

from fastscore import Reference
from fastscore.ops import definitions as ops
from fastscore.ops import torch as truth
from fastscore.ops import triton as backend
from fastscore.ops.instructions import Act, Add, Affine, Linear, Norm, Save, decode, encode
from fastscore.ops.interpreting import interpreting
from fastscore.ops.task import Evaluation, Task


def run(case, net, kind=None, dtype=torch.float32):
    """Return f by the kernel and by the definition, in float64, for a network (code, weights, tables)."""
    code, weights, tables = net
    q = case.reference(kind).tensors() if kind else []
    task = Task.of_tensors(code, [w.to(dtype) for w in weights], tables, case.d, q)
    assert backend.why_not_fused(task) is None
    words = case.keys, case.points
    got = ops.density_mlp(
        case.x.float(), *words, case.rows.float(), case.alpha, case.sigma, encode(code),
        [w.to(dtype) for w in weights], [t.float() for t in tables], q, "triton",
    )  # fmt: skip
    prediction = truth.run(code, weights, tables, case.x_t)
    want = truth.residual(prediction, case.x, case.eps, *words, case.sign, case.a, case.b_, case.c)
    if kind:
        want = want - Reference(*q).residual(case.x, case.x_t, case.eps, case.alpha, case.sigma)
    return got, want


# Not every pair of sizes, but every size of each kind.
FUSED = [
    (adaln, 1, 1, 1, 16, 1, "isotropic"),
    (adaln, 7, 8, 2, 64, 3, "full mixture"),
    (edm, 63, 2, 13, 100, 2, "full"),
    (adaln, 5, 33, 50, 64, 2, "mixture"),
    (edm, 7, 3, 64, 128, 1, "diagonal"),
    (adaln, 3, 2, 100, 100, 4, "full"),
    (edm, 2, 2, 784, 64, 2, "isotropic"),
    (adaln, 3, 2, 784, 128, 3, "diagonal"),
    (adaln, 1000, 1, 2, 16, 0, None),
    (waiting, 3, 2, 150, 32, 3, None),
    (both, 3, 2, 150, 32, 3, None),
    (skip, 3, 2, 5, 32, 0, "isotropic"),
    (bare, 3, 2, 5, 32, 1, None),
    (bare, 3, 2, 5, 32, 3, "diagonal"),
    (adaln, 7, 3, 50, 256, 2, "diagonal"),  # wide layers from here on, and references that come apart
    (adaln, 33, 3, 13, 300, 1, "full"),
    (edm, 3, 1, 129, 270, 2, "isotropic"),
    (bare, 3, 2, 5, 300, 2, None),
    (both, 3, 2, 5, 512, 2, None),
    (skip, 1, 1, 1, 129, 0, None),
    (adaln, 5, 3, 150, 64, 1, "full mixture"),
    (edm, 3, 2, 200, 20, 2, "full"),
    (adaln, 3, 2, 129, 16, 1, "mixture"),
]


@pytest.mark.parametrize(("net", "b", "r", "d", "width", "depth", "kind"), FUSED)
def test_fused_kernel_is_the_definition(net, b, r, d, width, depth, kind):
    case = Case(b, r, d)
    assert close(*run(case, net(case, width, depth), kind))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    case = Case(3, 2, 5)
    assert close(*run(case, edm(case, 20, 2, name)))


@pytest.mark.parametrize("width", [20, 300])  # the kernel of wide layers, too
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_of_a_weight_reaches_every_f(name, width):
    """Hidden by tl.maximum(x, 0), it would be a finite and wrong log-density, with an error bar."""
    case = Case(3, 2, 5)
    code, weights, tables = edm(case, width, 2, name)
    weights[0][0, 0] = torch.nan
    got, _ = run(case, (code, weights, tables))
    assert got.isnan().all()


@pytest.mark.parametrize("width", [64, 256, 512])
def test_bf16_products_stay_within_their_rounding(width):
    case = Case(7, 4, 13)
    code, weights, tables = adaln(case, width, 3)
    weights = [w.bfloat16().double() for w in weights]
    got, want = run(case, (code, weights, tables), "diagonal", torch.bfloat16)
    # Every operand is rounded to 2^-9 of itself at random, through depth + 2 products; the largest of 28 rows may
    # show four times the root of the sum of squares. (What would show a wrong operand is of order one.)
    bound = 4 * (5 * 2) ** 0.5 * 2.0**-9
    assert close(got, want, bound)
    assert not close(got, want, 1e-6)


@pytest.mark.parametrize(
    "config",
    [
        launch.Config(16, 4, resident=True, stages=1, splits=1),
        launch.Config(32, 4, resident=False, stages=2, splits=3),
        launch.Config(64, 8, resident=True, stages=2, splits=7),
    ],
)
def test_every_launch_gives_the_same_numbers(config, monkeypatch):
    case = Case(37, 7, 13)
    net = adaln(case, 64, 4)
    got, want = run(case, net, "full")
    monkeypatch.setattr(launch.Config, "from_heuristic", lambda *a: config)
    again, _ = run(case, net, "full")
    assert close(got, want)
    # Sums of 13 and 64 terms, whose order a tile may change.
    assert torch.allclose(again, got, rtol=1e-6, atol=1e-6 * float(got.abs().mean()))


def test_gradients_of_the_fused_op_are_the_definitions():
    case = Case(3, 4, 5)
    code, weights, tables = edm(case, 20, 2)
    q = case.reference("diagonal").tensors()

    def gradients(name, dtype):
        leaves = [v.to(dtype).requires_grad_() for v in (case.x, *weights, *tables)]
        n = len(weights) + 1
        f = ops.density_mlp(
            leaves[0], case.keys, case.points, case.rows.to(dtype), case.alpha, case.sigma, encode(code),
            leaves[1:n], leaves[n:], q, name,
        )  # fmt: skip
        return torch.autograd.grad(f.square().sum(), leaves)

    for got, want in zip(gradients("triton", torch.float32), gradients("torch", torch.float64)):
        # Noise from float32's uniforms differs from float64's by 6e-8 / |density|: the tail sets this bound.
        assert close(got, want, 1e-4)


DX = [
    (adaln, 1, 1, 1, 16, 1, "isotropic"),
    (adaln, 7, 8, 2, 64, 3, "diagonal"),
    (edm, 33, 2, 13, 100, 2, "diagonal"),
    (waiting, 5, 33, 50, 32, 3, None),
    (bare, 3, 2, 5, 32, 3, None),
    (adaln, 3, 2, 100, 100, 2, "isotropic"),
]


@pytest.mark.parametrize(("net", "b", "r", "d", "width", "depth", "kind"), DX)
@pytest.mark.parametrize("splits", [1, 2])
def test_fused_gradient_of_the_data(net, b, r, d, width, depth, kind, splits):
    case = Case(b, r, d)
    code, weights, tables = net(case, width, depth)
    q = case.reference(kind).tensors() if kind else []
    v, leaf = case.randn(b, r), case.x.clone().requires_grad_()
    x_t = case.alpha[:, None] * leaf[:, None] + case.sigma[:, None] * case.eps
    prediction = truth.run(code, weights, tables, x_t)
    f = truth.residual(prediction, leaf, case.eps, case.keys, case.points, case.sign, case.a, case.b_, case.c)
    if kind:
        f = f - Reference(*q).residual(leaf, x_t, case.eps, case.alpha, case.sigma)
    (want,) = torch.autograd.grad(f, leaf, v)
    words = case.keys, case.points, case.rows.float(), case.alpha, case.sigma
    operands = [w.float() for w in weights], [t.float() for t in tables], q
    got = backend.density_mlp_dx(v.float(), Evaluation(case.x.float(), *words, encode(code), *operands), splits)
    assert close(got, want, 1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_derivative(name):
    test_fused_gradient_of_the_data(lambda *a: edm(*a, name), 3, 2, 5, 20, 2, "diagonal", 1)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_opcheck_of_the_fused_op(name):
    case = Case(2, 3, 5)
    code, weights, tables = adaln(case, 16, 1)
    floats = lambda values: [v.float().requires_grad_() for v in values]  # noqa: E731
    (x,) = floats([case.x])
    arguments = case.keys, case.points, case.rows.float(), case.alpha, case.sigma, encode(code)
    q = case.reference("diagonal").tensors()
    torch.library.opcheck(ops.density_mlp, (x, *arguments, floats(weights), floats(tables), q, name))
    words = case.keys, case.points, case.sign.float()
    torch.library.opcheck(ops.control, (case.x.float(), *words, case.alpha, case.sigma, q, name))


def test_code_survives_its_text():
    code, _, _ = adaln(Case(1, 1, 1), 16, 2)
    assert list(decode(encode(code))) == code


@pytest.mark.parametrize(
    ("code", "widths", "reason"),
    [
        ([Linear(0)], [(5, 5)], "two linear maps at least, the network has 1"),
        ([Linear(0), Act("silu"), Linear(1)], [(513, 5), (5, 513)], "hidden widths go up to 512, the network has 513"),
        ([Linear(0), Linear(1)], [(16, 5), (6, 16)], "returns 6 values for 5 dimensions"),
        ([Norm(1e-5), Linear(0), Linear(1)], [(16, 5), (5, 16)], "norm works on hidden layers only"),
        ([Linear(0), Linear(1), Act("tanh")], [(16, 5), (5, 16)], "act works on hidden layers only"),
        ([Affine(0, -1), Save(0), Linear(0), Linear(1), Add(0)], [(16, 5), (5, 16)], "keeps x_t itself for later"),
        ([Save(0), Linear(0), Add(0), Linear(1)], [(5, 5), (5, 5)], "a sum joins two hidden layers"),
        ([Save(0), Affine(0, -1), Add(0), Linear(0), Linear(1)], [(16, 5), (5, 16)], "a sum joins two hidden layers"),
    ],
)
def test_the_fused_kernel_says_why_it_cannot(code, widths, reason):
    assert reason in backend.why_not_fused(Task.of(code, [torch.zeros(w) for w in widths], ["r"], 5, DEVICE))


@pytest.fixture
def refusing(monkeypatch):
    """Return the launches that a device was asked for, which refuses those of more than `limit` samples."""
    asked, kernel = [], fused.density_mlp_fwd_kernel

    def limited(limit):
        class Kernel:
            def __getitem__(self, grid):
                def start(*arguments, **constants):
                    asked.append(constants["BLOCK_B"])
                    if constants["BLOCK_B"] > limit:
                        raise OutOfResources(300_000, 232_448, "shared memory")
                    return kernel[grid](*arguments, **constants)

                return start

        monkeypatch.setattr(fused, "density_mlp_fwd_kernel", Kernel())
        return asked

    yield limited
    launch._REFUSED.clear()
    launch._first_that_fits.cache_clear()


@pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter")
def test_a_refused_launch_gives_way_to_a_smaller_one_once(refusing):
    asked, case = refusing(16), Case(5, 3, 13)
    net = adaln(case, 64, 2)
    with pytest.warns(RuntimeWarning, match="tiles of 32 samples did not start"):
        assert close(*run(case, net, "diagonal"))
    assert asked == [32, 32, 16]  # with a stage ahead, without, smaller
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # alone: Triton's interpreter may use what numpy will drop
        run(case, net, "diagonal")
    assert asked == [32, 32, 16, 16]


@pytest.mark.skipif(not interpreting(), reason="needs Triton's interpreter")
def test_without_any_launch_pytorch_evaluates(refusing):
    asked, case = refusing(0), Case(5, 3, 13)
    with pytest.warns(RuntimeWarning) as warned:
        found, want = run(case, adaln(case, 64, 2), "diagonal")
    assert "no Triton kernel fits this network, PyTorch evaluates it" in str(warned[-1].message)
    assert close(found, want)
    assert asked == [32, 32, 16]
