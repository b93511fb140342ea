"""Where the op of backend="cuda" goes: to a compiled kernel on the emulated GPU, or to Triton's in its interpreter."""

import sys
import types

import pytest
import torch
from emulator import build as builder
from emulator.comparison import HOPPER, Module, load

from fastscore import Reference
from fastscore.ops import cuda, noise
from fastscore.ops import torch as truth
from fastscore.ops.instructions import encode
from fastscore.ops.task import Evaluation
from fastscore.program.row_program import RowProgram

pytestmark = pytest.mark.slow
BATCH, ROWS, D, WIDTH = 5, 3, 13, 50


@pytest.fixture(scope="module")
def library():
    return load(builder.CSRC, "sm90_density_mlp", "sm90_steps_64")


class Network(torch.nn.Module):
    def __init__(self, width=WIDTH, norm=False):
        super().__init__()
        self.first, self.last = torch.nn.Linear(D, width), torch.nn.Linear(width, D)
        self.norm = torch.nn.LayerNorm(width) if norm else torch.nn.Identity()

    def forward(self, x, t):
        return self.last(torch.nn.functional.silu(self.norm(self.first(x) + t[:, None].to(x.dtype))))


def forget() -> None:
    """Ask another device than the test before."""
    cuda.why_not_fused.cache_clear()
    cuda.steps_of.cache_clear()


def mixture() -> Reference:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(2, D, generator=generator, dtype=torch.float64)
    return Reference(torch.full((2,), 0.5, dtype=torch.float64), mean, torch.ones(2, D, dtype=torch.float64), None)


@pytest.mark.parametrize(
    ("dtype", "norm", "reference", "kernel"),
    [
        (torch.bfloat16, False, Reference.isotropic(1.3), "steps"),
        (torch.bfloat16, False, mixture(), "steps"),  # its control variate comes from Triton's kernel
        (torch.bfloat16, True, Reference.isotropic(1.3), "density_mlp"),  # steps have no norm before an activation
        (torch.float32, False, Reference.isotropic(1.3), "triton"),  # the compiled kernels multiply bfloat16 only
    ],
)
def test_a_network_goes_to_the_kernel_that_covers_it(library, monkeypatch, dtype, norm, reference, kernel):
    launched = []
    forget()
    module = Module(library, HOPPER)
    module.plan = lambda *shape: {}
    for name in ("density_mlp", "steps"):
        run = getattr(module, name)
        setattr(module, name, lambda *a, name=name, run=run: (launched.append(name), run(*a)))
    monkeypatch.setattr(cuda, "native", lambda: module)
    monkeypatch.setattr(cuda, "_device", lambda device: HOPPER)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    through_triton = cuda.through_triton.density_mlp
    monkeypatch.setattr(
        cuda.through_triton, "density_mlp", lambda *a: (launched.append("triton"), through_triton(*a))[1]
    )
    library.emulator_device(9, 0, 3)
    torch.manual_seed(0)
    network = Network(norm=norm).to(dtype)
    x = torch.randn(BATCH, D)
    keys = noise.sample_keys("independent", 3, torch.arange(BATCH), D)
    points = noise.points("independent", 3, range(ROWS), ROWS, D, torch.device("cpu"))
    alpha, sigma = (torch.tensor(v, dtype=torch.float64) for v in ((0.9, 0.6, 0.1), (0.19**0.5, 0.8, 0.99**0.5)))
    ones, zeros = torch.ones(ROWS), torch.zeros(ROWS)
    rows = torch.stack([ones, alpha.float(), sigma.float(), ones, zeros, ones], 1)
    time = torch.linspace(0, 1, ROWS)
    program = RowProgram.trace(network, (D,), time, dtype=dtype)
    code = encode(program.code)
    weights, tables = program.bind(time)
    given = Evaluation(x, keys, points, rows, alpha, sigma, code, weights, tables, reference.tensors())
    with torch.no_grad():
        found = cuda.density_mlp(given)
        expected = truth.density_mlp(given)
    assert launched == [kernel]
    assert (cuda.why_not_fused(given.task) is None) is (kernel != "triton")
    # bfloat16 rounds the operands of two products in the kernel, and results too in the definition.
    tolerance = 3 * 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    assert float(((found - expected).abs() / (expected.abs() + expected.abs().mean())).max()) < tolerance


RUNS = "on cpu: one kernel of backend cuda: asked for; it runs"


@pytest.mark.parametrize(
    ("width", "norm", "last"),
    [
        (WIDTH, False, f"{RUNS} as steps, which no GPU has timed yet"),
        (
            WIDTH,
            True,
            f"{RUNS} by instructions, since a layer outside of residual blocks has norm where a step has act",
        ),
        (600, False, f"{RUNS} as steps, which no GPU has timed yet"),
        (
            1025,
            False,
            "on cpu: no single kernel; PyTorch runs the program between a kernel of noise and one of residuals: "
            "cuda: hidden widths go up to 1024, the network has 1025; triton: ",
        ),
    ],
)
def test_explain_names_what_runs_a_network(monkeypatch, width, norm, last):
    explain = sys.modules["fastscore.program.explain"]  # not the function of that name
    monkeypatch.setattr(explain, "runnable", lambda device, dtype, name: ("cuda", "triton"))
    forget()
    module = types.SimpleNamespace(plan=lambda *shape: {}, steps_plan=lambda *shape: {})
    monkeypatch.setattr(cuda, "native", lambda: module)
    monkeypatch.setattr(cuda, "_device", lambda device: HOPPER)
    assert f"\n{last}" in explain.explain(Network(width, norm).bfloat16(), (D,))
