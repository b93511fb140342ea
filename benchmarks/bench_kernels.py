"""The kernels on a GPU, beside eager PyTorch and torch.compile in a CUDA graph, and beside what the GPU can do at most.

Every row evaluates the same f for the same samples and noise: the network in bfloat16, its reference an isotropic
Gaussian, 2^20 rows. Peers get a chunk size that fills the GPU; the compiled one is the whole evaluation (noise, x_t,
network, residual) under torch.compile, captured in one graph. Medians of device time. Right before timed: the fused
kernel against the definition in float64, on the same rows.

Without a GPU nothing here is timed; FASTSCORE_REHEARSE=1 runs every line in Triton's interpreter on a few rows.
"""

import copy
import statistics
import time
from dataclasses import dataclass

import pytest
import real_networks as nets
import torch
from fastscore.kernels import density_mlp as fused
from networks import ConvNet, mlp
from rehearsal import REHEARSING
from torch import nn
from triton.runtime.errors import OutOfResources

import fastscore as fs
from fastscore import noise, ops
from fastscore.backends import cuda, select
from fastscore.backends import torch as truth
from fastscore.backends import triton as through_triton
from fastscore.backends.task import Task
from fastscore.instructions import decode, encode
from fastscore.program import RowProgram

CUDA = torch.cuda.is_available() and not REHEARSING
pytestmark = pytest.mark.skipif(not (CUDA or REHEARSING), reason="needs a CUDA device")
DEVICE = "cuda" if CUDA else "cpu"
SAMPLES, DRAWS, D = (4096, 256, 64) if CUDA else (5, 3, 13)
CHUNK = 64  # samples at once of eager and compiled PyTorch: 16,384 rows
SCHEDULE = fs.VP()
NATIVE = CUDA and select._cuda_why_not(torch.device("cuda:0"), torch.float32) is None


@dataclass(frozen=True)
class Case:
    """A network shape; `flops` counts two for a multiply-add of the layers that depend on x."""

    kind: str
    width: int
    depth: int

    @property
    def name(self) -> str:
        return f"{self.kind} H={self.width} L={self.depth}"

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        if self.kind == "adaLN":
            net = nets.MARHead(D, self.width, self.depth)
            for p in net.parameters():  # its users start from zeros, which would hide errors and run too fast
                nn.init.normal_(p, std=0.5 / p.shape[-1] ** 0.5)
        else:
            net = mlp(D, self.width, self.depth)
        return net.eval().to(DEVICE)

    @property
    def flops(self) -> int:
        hidden = 2 * self.depth if self.kind == "adaLN" else self.depth - 1
        return 2 * (2 * D * self.width + hidden * self.width**2)


CASES = [Case(kind, h, depth) for kind in ("adaLN", "plain") for h in (64, 128, 256, 512) for depth in (3, 6)]
CASES = CASES if CUDA else [Case("adaLN", 16, 2), Case("plain", 16, 2)]


class Problem:
    """Samples, noise words and tables of one case, and the ways to evaluate f on them."""

    def __init__(self, case: Case):
        generator = torch.Generator().manual_seed(1)
        self.module, self.x = case.network(), torch.randn(SAMPLES, D, generator=generator).to(DEVICE)
        self.keys = noise.sample_keys("independent", 0, torch.arange(SAMPLES, device=DEVICE), D)
        self.points = noise.points("independent", 0, range(DRAWS), DRAWS, D, torch.device(DEVICE))
        log_snr = torch.linspace(-8, 8, DRAWS, dtype=torch.float64)
        self.time = SCHEDULE.time(log_snr)
        self.alpha, self.sigma = (v.to(DEVICE) for v in SCHEDULE.alpha_sigma(self.time))
        self.time = self.time.float().to(DEVICE)
        ones, zeros = torch.ones(DRAWS, device=DEVICE), torch.zeros(DRAWS, device=DEVICE)
        self.rows = torch.stack([ones, self.alpha.float(), self.sigma.float(), ones, zeros, ones], 1)
        self.reference = fs.Reference.isotropic().to(DEVICE)

    def by_module(self, module: nn.Module, x, keys):
        """The plain way: every row through the network, in the network's dtype."""
        sign, alpha, sigma, a, b, c = self.rows.unbind(1)
        x_t, eps = truth.perturb(x, keys, self.points, sign, alpha, sigma)
        dtype = next(module.parameters()).dtype
        flat = x_t.flatten(0, 1).to(dtype)
        prediction = module(flat, self.time.repeat(len(x)))[:, :D].reshape(x_t.shape).to(x.dtype)
        error = torch.linalg.vector_norm(a[:, None] * eps + b[:, None] * x[:, None] - prediction, dim=-1)
        return (c * error).square() - self.reference.residual(x, x_t, eps, self.alpha, self.sigma)

    def in_chunks(self, run):
        pairs = zip(self.x.split(CHUNK), self.keys.split(CHUNK))
        return torch.cat([run(x, keys) for x, keys in pairs])

    def bound(self, dtype):
        """Return the row program's code, weights and tables in a dtype."""
        program = RowProgram.trace(copy.deepcopy(self.module).to(dtype), (D,), self.time[:4], dtype=dtype)
        return encode(program.code), *program.bind(self.time)

    def by_op(self, bound, backend="triton"):
        code, weights, tables = bound
        q = self.reference.tensors()
        words = self.keys, self.points
        return ops.density_mlp(self.x, *words, self.rows, self.alpha, self.sigma, code, weights, tables, q, backend)

    def runs(self, bound):
        """Return the backends that have a kernel for the network."""
        task = Task.of_tensors(decode(bound[0]), *bound[1:], D, self.reference.tensors())
        fused = ["triton"] * (through_triton.why_not_fused(task) is None)
        return fused + ["cuda"] * (NATIVE and cuda.why_not_fused(task) is None)

    def packed(self, bound):
        """Return the problem as a compiled kernel reads it."""
        code, weights, tables = bound
        words = self.keys, self.points, self.rows, self.alpha, self.sigma
        return cuda.pack(self.x, *words, through_triton.plain(decode(code)), weights, tables, self.reference.tensors())


def milliseconds(run, rounds=20) -> float:
    """Return the median device time of run(), in milliseconds; wall time in a rehearsal."""
    if not CUDA:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    for _ in range(3):
        run()
    spent = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end))
    return statistics.median(spent)


def graphed(run):
    """Return run() as the replay of one CUDA graph."""
    if not CUDA:
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@pytest.fixture(scope="module")
def ceilings(table):
    """Measure the copy bandwidth (bytes read plus written) and the bf16 and tf32 matrix rates."""
    n, side = (1 << 30, 8192) if CUDA else (1 << 10, 64)
    source, target = torch.ones(n, device=DEVICE), torch.empty(n, device=DEVICE)
    bandwidth = 8 * n / milliseconds(lambda: target.copy_(source)) / 1e6
    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
        rates[name] = 2 * side**3 / milliseconds(lambda a=a, b=b: a @ b) / 1e9
    torch.backends.cuda.matmul.allow_tf32 = False
    table("ceilings", {"copy, GB/s": bandwidth, **{f"{name} product, TFLOP/s": rate for name, rate in rates.items()}})
    return rates


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_fused_kernel(benchmark, table, ceilings, case):
    problem = Problem(case)
    few = slice(0, 3)
    exact = problem.by_module(copy.deepcopy(problem.module).double(), problem.x[few].double(), problem.keys[few])
    half = problem.bound(torch.bfloat16)
    backends = problem.runs(half)
    if not backends:
        pytest.skip(f"no kernel has {case.name}")
    scale = exact.abs() + exact.abs().mean()
    for backend in backends:
        f = problem.by_op(half, backend)
        # bf16 operands through 2 L + 2 products: each rounds to 2^-9 at random; four times the root of their sum.
        assert float(((f[few] - exact).abs() / scale).max()) < 4 * (2 * case.depth + 2) ** 0.5 * 2.0**-9, backend
    module = copy.deepcopy(problem.module).bfloat16()

    eager = milliseconds(lambda: problem.in_chunks(lambda x, k: problem.by_module(module, x, k)), 5)
    compiled = torch.compile(lambda x, k: problem.by_module(module, x, k), dynamic=False) if CUDA else None
    baseline = milliseconds(graphed(lambda: problem.in_chunks(compiled))) if CUDA else eager
    spent = {name: milliseconds(graphed(lambda name=name: problem.by_op(half, name))) for name in backends}
    rows, program = SAMPLES * DRAWS, min(spent.values())
    rate = case.flops * rows / program / 1e9
    operands = (problem.x, problem.keys, problem.points, problem.rows, *half[1], *half[2])
    traffic = 4 * rows + sum(t.numel() * t.element_size() for t in operands)  # f, and each operand read once
    row = {
        "network": case.name,
        "rows": rows,
        "GFLOP": case.flops * rows / 1e9,
        "FLOP / byte": case.flops * rows / traffic,
        "eager, ms": eager,
        "compile + graph, ms": baseline,
        "Triton, ms": spent.get("triton"),
        "compiled kernel, ms": spent.get("cuda"),
        "over eager": eager / program,
        "over compile": baseline / program,
        "over Triton": spent["triton"] / spent["cuda"] if len(spent) == 2 else None,
        "TFLOP/s": rate,
        "of bf16 product": rate / ceilings["bf16"],
    }
    table("kernels", row)
    benchmark.extra_info.update(row, flops=case.flops * rows, nfe=DRAWS, bytes=traffic)
    benchmark.pedantic(lambda: problem.by_op(half, backends[-1]), rounds=3 if CUDA else 1)


@pytest.mark.skipif(not NATIVE, reason="no compiled kernels")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_sweep_of_the_compiled_kernel(table, case):
    """Launch one packed problem with every division of the work; the winner belongs into csrc/density_mlp.cpp."""
    problem = Problem(case)
    half = problem.bound(torch.bfloat16)
    if "cuda" not in problem.runs(half):
        pytest.skip(f"no compiled kernel has {case.name}")
    packed, f = problem.packed(half), torch.empty(SAMPLES, DRAWS, device=DEVICE)

    def launched(config):
        stream = torch.cuda.current_stream().cuda_stream
        return milliseconds(lambda: cuda.launch(select.native(), packed, f, 0, stream, config))

    chosen = launched(cuda.Config())
    want = f.clone()
    found = {"network": case.name, "chosen, ms": chosen, "best, ms": chosen, "best": "the chosen"}
    for cluster in (1, 2, 4):
        for splits in (1, 2, 4, 8, 16, 32, 64):
            config = cuda.Config(cluster, splits)
            spent = launched(config)
            assert f.equal(want), config
            if spent < found["best, ms"]:
                found |= {"best, ms": spent, "best": str(config)}
    table("native_sweep", found)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
@torch.no_grad()
def test_precisions(table, case):
    problem = Problem(case)
    few = slice(0, 3)
    exact = problem.by_module(copy.deepcopy(problem.module).double(), problem.x[few].double(), problem.keys[few])
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("fp16", torch.float16, "highest"),
        ("tf32", torch.float32, "high"),
        ("tf32x3", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        bound = problem.bound(dtype)
        error = ((problem.by_op(bound)[few] - exact).abs() / (exact.abs() + exact.abs().mean())).max()
        assert float(error) < (1e-5 if name == "tf32x3" else 3e-2)
        spent = milliseconds(graphed(lambda bound=bound: problem.by_op(bound)))
        table("precisions", {"network": case.name, "products": name, "largest error": float(error), "ms": spent})
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("case", [c for c in CASES if c.width <= 64][:2], ids=lambda case: case.name)
def test_gradient_of_the_data(table, case):
    problem = Problem(case)
    problem.module.requires_grad_(False)
    bound = problem.bound(torch.bfloat16)
    module = copy.deepcopy(problem.module).bfloat16()

    def fused_gradient():
        problem.x = problem.x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(problem.by_op(bound).sum(), problem.x)
        return grad

    def eager_gradient():
        parts = []
        for x, keys in zip(problem.x.detach().split(CHUNK), problem.keys.split(CHUNK)):
            leaf = x.requires_grad_()
            parts.append(torch.autograd.grad(problem.by_module(module, leaf, keys).sum(), leaf)[0])
        return torch.cat(parts)

    found, expected = fused_gradient(), eager_gradient()
    # Both round operands to bf16, at different places: sums over all rows agree to a few of their errors.
    scale = expected.abs() + expected.abs().mean()
    assert float(((found - expected).abs() / scale).max()) < 0.1
    row = {"network": case.name, "rows": SAMPLES * DRAWS, "eager, ms": milliseconds(eager_gradient, 5)}
    row["fused forward and gradient, ms"] = milliseconds(fused_gradient)
    table("gradient", row | {"over eager": row["eager, ms"] / row["fused forward and gradient, ms"]})


SWEEP = [(b, w, kept, stages) for b, w in ((32, 8), (64, 4), (64, 8), (128, 8)) for kept in (True, False)
         for stages in ((2,) if kept else (1, 2, 3))]  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.width <= 256][::2], ids=lambda case: case.name)
@torch.no_grad()
def test_sweep(table, case, monkeypatch):
    problem = Problem(case)
    half = problem.bound(torch.bfloat16)
    want = problem.by_op(half)
    chosen = milliseconds(graphed(lambda: problem.by_op(half)))
    best = {"network": case.name, "heuristic, ms": chosen, "best, ms": chosen, "best launch": "the heuristic's"}
    for block_b, warps, resident, stages in SWEEP if CUDA else SWEEP[:2]:
        config = fused.Config(block_b, warps, resident, stages)
        monkeypatch.setattr(fused.Config, "from_heuristic", lambda *a, config=config: config)
        try:
            got = problem.by_op(half)
        except OutOfResources:  # too much shared memory: no launch at all
            continue
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().mean()))
        spent = milliseconds(graphed(lambda: problem.by_op(half)))
        if spent < best["best, ms"]:
            best |= {"best, ms": spent, "best launch": str(config)}
    table("sweep", best)


@torch.no_grad()
def test_thin_kernels_around_a_convolutional_network(table):
    samples, nfe, side = (16, 64, 32) if CUDA else (2, 8, 8)
    torch.manual_seed(0)
    model = ConvNet(128 if CUDA else 4).eval().to(DEVICE, torch.bfloat16 if CUDA else torch.float32)
    dtype = next(model.parameters()).dtype
    x = torch.randn(samples, 3, side, side, device=DEVICE)
    density = fs.ScoreDensity(model, SCHEDULE, backend="triton")
    expected = fs.ScoreDensity(model, SCHEDULE, backend="torch").estimate(x, nfe=nfe).log_prob
    found = density.estimate(x, nfe=nfe).log_prob
    # The same network on the same rows: sums of 3 x side^2 terms in float32, by nfe of them.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().mean()))
    rows = torch.randn(samples * nfe, 3, side, side, device=DEVICE).to(dtype)
    t = torch.rand(samples * nfe, device=DEVICE)
    bare = milliseconds(graphed(lambda: model(rows, t)), 10)
    captured = fs.CapturedDensity(density, x, nfe=nfe)
    whole = milliseconds(captured.graph.replay if CUDA else lambda: captured(x), 10)
    table("thin", {"network": "ConvNet", "rows": samples * nfe, "bare, ms": bare, "estimate, ms": whole,
                   "ratio": whole / bare})  # fmt: skip
