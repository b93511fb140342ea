"""Every Triton kernel against the torch backend in float64; outputs start as NaN.

In the interpreter, on the CPU; with TRITON_INTERPRET=0 on a GPU, as `make gpu-check` runs them.
"""

import warnings

import pytest
import torch
from agreement import close, exact_normal
from fastscore.kernels import density_mlp as fused
from fastscore.kernels import launch
from fastscore.kernels.control import why_not
from fastscore.kernels.noise import normal

from fastscore import Reference
from fastscore.ops import definitions as ops
from fastscore.ops import noise
from fastscore.ops import torch as truth
from fastscore.ops import triton as backend
from fastscore.ops.activations import ACTIVATIONS
from fastscore.ops.instructions import Act, Add, Affine, Linear, Norm, Save, decode, encode
from fastscore.ops.interpreting import interpreting
from fastscore.ops.task import Task

triton = pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources  # noqa: E402

DEVICE = torch.device("cpu" if interpreting() else "cuda")
tl = triton.language

pytestmark = pytest.mark.usefixtures("poisoned")


class Case:
    """Random data, noise words and coefficients, float64, for B samples, R rows and d dimensions."""

    def __init__(self, b, r, d, seed=0):
        self.b, self.r, self.d = b, r, d
        self.generator = torch.Generator().manual_seed(1000 * b + 10 * r + d + seed)
        self.x = self.randn(b, d).float().double()
        self.keys = noise.sample_keys("independent", 3, torch.arange(b, device=DEVICE) + 7, d)
        self.points = noise.points("independent", 3, range(r), r, d, DEVICE)
        self.sign = torch.where(torch.arange(r, device=DEVICE) % 2 == 0, 1.0, -1.0).double()
        log_snr = torch.linspace(-6, 6, r, dtype=torch.float64, device=DEVICE)
        self.alpha, self.sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        self.a, self.b_, self.c = self.randn(r), self.randn(r), self.randn(r)
        self.eps = exact_normal(noise.combine(self.keys, self.points)) * self.sign[:, None]
        self.x_t = self.alpha[:, None] * self.x[:, None] + self.sigma[:, None] * self.eps

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(DEVICE)

    @property
    def rows(self):
        return torch.stack([self.sign, self.alpha, self.sigma, self.a, self.b_, self.c], 1)

    def reference(self, kind, components=5):
        self.generator.manual_seed(components + self.d)
        k = components if "mixture" in kind else 1
        weight, mean = self.randn(k).softmax(0), self.randn(k, self.d)
        variance = (self.randn(k, self.d) - 0.5).exp()
        if kind == "isotropic":
            return Reference.isotropic(1.3).to(DEVICE)
        basis = torch.linalg.qr(self.randn(k, self.d, self.d))[0] if "full" in kind else None
        return Reference(weight, mean, variance, basis).to(DEVICE)


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
    # The polynomial's 3.3e-7 and the roundings of nine steps.
    assert torch.allclose(found.double(), exact, rtol=1e-6, atol=0)
    assert torch.allclose(noise.normal(w).double(), exact, rtol=1e-6, atol=0)


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
@pytest.mark.parametrize(("b", "r", "d"), [(1, 1, 1), (7, 5, 2), (63, 2, 13), (3, 3, 100)])
def test_control_kernel(kind, b, r, d):
    case = Case(b, r, d)
    q = case.reference(kind)
    words = case.keys, case.points, case.sign.float()
    found = ops.control(case.x.float(), *words, case.alpha, case.sigma, q.tensors(), "triton")
    assert close(found, q.residual(case.x, case.x_t, case.eps, case.alpha, case.sigma))


def test_control_kernel_says_why_it_cannot():
    assert backend.why_not_control(1, False, 100_000, DEVICE) is None
    assert "128 dimensions in a kernel, got 129" in backend.why_not_control(5, False, 129, DEVICE)
    # 512 rows of 128 float32 numbers, of a product's one factor.
    assert "a reference of 300 components in 128 dimensions takes 262,144 bytes" in why_not(300, False, 128, 232_448)


def adaln(case, width, depth, name="silu"):
    """Pre-norm residual blocks whose modulation comes per draw, per sample, per pair and for all alike."""
    b, r, h = case.b, case.r, width
    weights, tables = [case.randn(h, case.d) / case.d**0.5], [0.3 * case.randn(1, r, h)]
    code = [Linear(0), Affine(-1, 0)]
    for layer in range(depth):
        n = len(tables)
        weights.append(case.randn(h, h) / h**0.5)
        tables += [1 + 0.2 * case.randn(1, r, h), 0.2 * case.randn(b, r, h)]
        tables += [1 + 0.2 * case.randn(b, 1, h), 0.1 * case.randn(1, 1, h)]
        code += [Save(1), Norm(1e-6), Affine(n, n + 1), Act(name), Linear(layer + 1), Affine(n + 2, n + 3), Add(1)]
    weights.append(case.randn(case.d, h) / h**0.5)
    tables.append(0.1 * case.randn(1, 1, case.d))
    return [*code, Act(name), Linear(depth + 1), Affine(-1, len(tables) - 1)], weights, tables


def edm(case, width, depth, name="gelu"):
    """Unequal widths between c_in x_t and c_skip x_t + c_out F, with scales after a sum."""
    d, r = case.d, case.r
    weights, tables = [case.randn(width, d) / d**0.5], [case.randn(1, r, 1), case.randn(1, r, d)]
    code = [Save(0), Affine(0, 1), Linear(0)]
    for layer in range(depth):
        wide = width if layer % 2 else max(1, width - 5)
        weights.append(case.randn(wide, weights[-1].shape[0]) / width**0.5)
        tables.append(0.1 * case.randn(1, 1, wide))
        code += [Act(name), Linear(layer + 1), Affine(-1, len(tables) - 1)]
    weights.append(case.randn(d, weights[-1].shape[0]) / width**0.5)
    n = len(tables)
    tables += [case.randn(1, r, 1), case.randn(1, r, d), case.randn(1, r, 1), case.randn(1, 1, d)]
    return [*code, Act(name), Linear(depth + 1), Affine(n, n + 1), Add(0, n + 2), Affine(n + 3, -1)], weights, tables


def waiting(case, width, depth, name="silu"):
    """A tile saved before equal layers, one that each of them adds, and one that waits for all of them."""
    weights, tables = [case.randn(width, case.d) / case.d**0.5], [0.3 * case.randn(1, case.r, width)]
    code = [Linear(0), Affine(-1, 0), Save(0), Act(name), Save(1)]
    for layer in range(depth):
        weights.append(case.randn(width, width) / width**0.5)
        tables.append(0.1 * case.randn(1, 1, width))
        code += [Linear(layer + 1), Affine(-1, layer + 1), Act(name), Add(0)]
    weights.append(case.randn(case.d, width) / width**0.5)
    return [*code, Add(1), Linear(depth + 1)], weights, tables


def both(case, width, depth, name="silu"):
    """Equal layers that read a tile saved before them and save another of their own."""
    code, weights, tables = waiting(case, width, depth, name)
    inside = [op for k in range(depth) for op in (Save(1), *code[5 + 4 * k : 9 + 4 * k], Add(1))]
    return [*code[:4], *inside, code[-1]], weights, tables


def skip(case, width, depth, name="silu"):
    """x_t plus a network without biases: no table at all."""
    weights = [case.randn(width, case.d) / case.d**0.5, case.randn(case.d, width) / width**0.5]
    return [Save(0), Linear(0), Act(name), Linear(1), Add(0)], weights, []


def run(case, net, kind=None, dtype=torch.float32):
    """Return f by the kernel and by the definition, in float64, for a network (code, weights, tables)."""
    code, weights, tables = net
    q = case.reference(kind).tensors() if kind else []
    # In float32 width 256 spills on a GPU, so the choice refuses it; the kernel itself is right there too.
    reason = backend.why_not_fused(Task.of_tensors(code, [w.to(dtype) for w in weights], tables, case.d, q))
    assert reason is None or (dtype == torch.float32 and "128, the network has 256" in reason)
    if reason is not None and not interpreting():
        pytest.skip(reason)
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
    (adaln, 7, 3, 50, 256, 2, "diagonal"),
]


@pytest.mark.parametrize(("net", "b", "r", "d", "width", "depth", "kind"), FUSED)
def test_fused_kernel_is_the_definition(net, b, r, d, width, depth, kind):
    case = Case(b, r, d)
    assert close(*run(case, net(case, width, depth), kind))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    case = Case(3, 2, 5)
    assert close(*run(case, edm(case, 20, 2, name)))


@pytest.mark.parametrize("width", [64, 256])
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
    got = backend.density_mlp_dx(
        v.float(), case.x.float(), case.keys, case.points, case.rows.float(), case.alpha, case.sigma, encode(code),
        [w.float() for w in weights], [t.float() for t in tables], q, splits,
    )  # fmt: skip
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
        ([Linear(0), Act("silu"), Linear(1)], [(129, 5), (5, 129)], "hidden widths go up to 128, the network has 129"),
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
        warnings.simplefilter("error")
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
