"""The CUDA kernels, unchanged, on the emulated GPU against the torch backend with the same rounding of operands."""

import ctypes
from pathlib import Path

import pytest
import torch
from emulator.build import ADVERSARIAL, CSRC, IN_ORDER, RANDOM, build

from fastscore import Reference, noise
from fastscore.backends import cuda
from fastscore.backends import torch as truth

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
HOPPER, AMPERE = (90, 232448), (80, 166912)  # compute capability, shared memory that a block may have
# Operands are rounded to bfloat16 in both. Where one sits at the boundary of two bfloat16 numbers, float32's sums round
# it the other way than float64's: 2^-9 of one of hundreds of terms, more often the deeper the network. Measured: 1e-7
# to 6e-6 up to two layers, 1.7e-4 after six. A mistake in the kernels shows as 1e-2 or more.
TOLERANCE = 3e-4


@pytest.fixture(scope="module")
def library():
    sources = [CSRC / f"{name}.cu" for name in ("sm80_density_mlp", "sm90_density_mlp")]
    found = build([*sources, CSRC / "density_mlp.cpp", HERE / "density_mlp.cpp"])
    found.launch.restype = ctypes.c_char_p
    return found


class Module:
    """Stands in for fastscore._C."""

    def __init__(self, library, device):
        self.library, self.device = library, device

    def density_mlp(self, hidden, data, linears, pointers, sizes, operands, program, device, stream):
        message = self.library.launch(
            hidden, data, linears, (ctypes.c_uint64 * 9)(*pointers), (ctypes.c_int32 * 6)(*sizes),
            (ctypes.c_int32 * 8)(*operands), program, len(program), *self.device, 3,
        )  # fmt: skip
        assert not message, (message.decode(), self.library.emulator_error())


def network(hidden, d, depth, norm, modulated, residual, batch, rows, generator, act="silu"):
    """Return code, weights in bfloat16 and tables of a random network."""

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    weights, tables = [randn(hidden, d) / d**0.5], [0.3 * randn(1, rows, hidden)]
    code = [("linear", 0), ("affine", -1, 0)]
    for layer in range(depth):
        weights.append(randn(hidden, hidden) / hidden**0.5)
        code += [("save", 1)] * residual + [("norm", 1e-6)] * norm
        if modulated:
            levels = {1: (1, rows), 2: (batch, 1)}.get(modulated, (batch, rows))
            tables += [1 + 0.3 * randn(*levels, hidden), 0.3 * randn(1, rows, hidden)]
            code += [("affine", len(tables) - 2, len(tables) - 1)]
        tables += [1 + 0.3 * randn(1, rows, hidden), 0.3 * randn(1, 1, hidden)]
        code += [("act", act), ("linear", layer + 1), ("affine", len(tables) - 2, len(tables) - 1)]
        code += [("add", 1, -1)] * residual
    weights.append(randn(d, hidden) / hidden**0.5)
    tables += [0.3 * randn(1, rows, d)]
    code += [("act", act), ("linear", depth + 1), ("affine", -1, len(tables) - 1)]
    return tuple(code), [w.bfloat16() for w in weights], tables


def expected(code, weights, tables, x_t):
    """Return the network's output with operands rounded to bfloat16."""
    h, saved = x_t, {}
    for op in code:
        if op[0] == "linear":
            h = h.bfloat16().double() @ weights[op[1]].double().T
        elif op[0] == "affine":
            h = h if op[1] < 0 else h * tables[op[1]]
            h = h if op[2] < 0 else h + tables[op[2]]
        elif op[0] == "act":
            h = torch.nn.functional.silu(h)
        elif op[0] == "norm":
            h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=op[1])
        elif op[0] == "save":
            saved[op[1]] = h
        else:
            h = h + saved[op[1]]
    return h


def difference(
    library, device, hidden, d, depth, batch, rows, norm=1, modulated=1, residual=1, kind="diagonal", mode=0
):
    """Return the relative distance between the kernel's f and the truth's."""
    generator = torch.Generator().manual_seed(hidden + d + depth + batch)
    code, weights, tables = network(hidden, d, depth, norm, modulated, residual, batch, rows, generator)
    x = torch.randn(batch, d, generator=generator)
    keys = noise.sample_keys("independent", 3, torch.arange(batch), d)
    points = noise.points("independent", 3, range(rows), rows, d, torch.device("cpu"))
    log_snr = torch.linspace(-4, 4, rows, dtype=torch.float64)
    alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    sign = torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0)
    coefficients = torch.randn(rows, 3, generator=generator)
    table = torch.cat([torch.stack([sign, alpha.float(), sigma.float()], 1), coefficients], 1)
    reference = Reference.isotropic(1.3).tensors() if kind == "diagonal" else []
    packed = cuda.pack(x, keys, points, table, alpha, sigma, code, weights, tables, reference)
    f = torch.full((batch, rows), float("nan"))
    library.emulator_device(*divmod(device[0], 10), 3)
    library.emulator_seed(ctypes.c_uint64(7), mode)
    cuda.launch(Module(library, device), packed, f, 0, 0)
    x_t, eps = truth.perturb(x, keys, points, sign, alpha.float(), sigma.float())
    prediction = expected(code, weights, [t.double() for t in tables], x_t)
    words = keys, points, sign.double()
    want = truth.residual(prediction, x.double(), eps.double(), *words, *coefficients.double().unbind(1))
    if reference:
        want = want - Reference.from_tensors(reference).residual(x.double(), x_t.double(), eps.double(), alpha, sigma)
    return float((f - want).norm() / want.norm())


SHAPES = [
    # hidden, d, depth, samples, rows, norm, modulated, residual, reference
    (64, 64, 3, 150, 5, 1, 1, 1, "diagonal"),
    (64, 2, 1, 1, 1, 0, 0, 0, "none"),
    (50, 13, 2, 63, 9, 1, 2, 1, "diagonal"),
    (128, 50, 1, 150, 5, 1, 1, 1, "diagonal"),
    (100, 1, 2, 63, 1, 1, 0, 0, "none"),
]
# Weights beyond an Ampere block's shared memory, which Hopper's kernels stream or have room for; wider networks.
HOPPER_SHAPES = [
    (64, 128, 6, 63, 5, 1, 3, 1, "none"),
    (128, 100, 4, 63, 5, 0, 1, 1, "diagonal"),
    (128, 64, 6, 63, 5, 1, 1, 1, "diagonal"),
    (256, 64, 3, 63, 5, 1, 1, 1, "diagonal"),
    (256, 128, 1, 150, 1, 0, 1, 0, "none"),
    (200, 13, 2, 300, 2, 1, 2, 1, "diagonal"),
]


@pytest.mark.parametrize(("number", "shape"), list(enumerate([*SHAPES, *HOPPER_SHAPES])))
def test_hoppers_kernels_agree_with_the_definition(library, number, shape):
    mode = (IN_ORDER, RANDOM, ADVERSARIAL)[number % 3]
    assert difference(library, HOPPER, *shape, mode=mode) < TOLERANCE


@pytest.mark.parametrize("shape", SHAPES)
def test_amperes_kernel_agrees_with_the_definition(library, shape):
    assert difference(library, AMPERE, *shape) < TOLERANCE


def test_what_does_not_fit_ampere_is_refused_with_its_sizes(library):
    with pytest.raises(AssertionError, match=r"weights \(144 KB\) and the vectors of a row .* do not fit 163 KB"):
        difference(library, AMPERE, *HOPPER_SHAPES[0])
