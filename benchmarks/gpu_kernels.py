"""Rows of `make gpu-bench` about kernels: beside eager PyTorch, torch.compile in a CUDA graph, and the GPU's ceilings.

Peers get a chunk size that fills the GPU; the compiled one is the whole evaluation (noise, x_t, network, residual)
under torch.compile, captured in one graph. Times are medians of device time. Right before it is timed, each kernel is
compared with the definition in float64, on the same rows.
"""

from __future__ import annotations

import copy
from unittest import mock

import torch
from fastscore.kernels import density_mlp as fused
from gpu_cases import CASES, CHUNK, DRAWS, FEW, FIRST, SAMPLES, Case, Problem
from measuring import DEVICE, REHEARSING, Row, below, graphed, milliseconds
from steps import parallel
from triton.runtime.errors import OutOfResources

from fastscore.ops import cuda, select

KERNELS = {"cuda": "compiled kernel", "triton": "Triton"}


def ceilings() -> Row:
    """Copy bandwidth (bytes read plus written), and the rates of bf16 and tf32 matrix products."""
    row = Row("ceilings", device=torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU")
    n, side = (1 << 10, 64) if REHEARSING else (1 << 30, 8192)

    def copying() -> float:
        source, target = torch.ones(n, device=DEVICE), torch.empty(n, device=DEVICE)
        return 8 * n / milliseconds(lambda: target.copy_(source)) / 1e6

    def product(dtype: torch.dtype) -> float:
        torch.backends.cuda.matmul.allow_tf32 = dtype == torch.float32
        a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
        return 2 * side**3 / milliseconds(lambda: a @ b) / 1e9

    row.measure("copy, GB/s", copying)
    row.measure("bf16 product, TFLOP/s", lambda: product(torch.bfloat16))
    row.measure("tf32 product, TFLOP/s", lambda: product(torch.float32))
    return row


def first_launches() -> None:
    """Compile and launch every case once, in parallel processes, and compare f with float64: which kernels run at all?

    What is compiled stays in Triton's cache on disk."""
    parallel({case.name: lambda case=case: _launch(case) for case in CASES}, at_once=2 if REHEARSING else 8)


@torch.no_grad()
def _launch(case: Case) -> None:
    problem = Problem(case)
    half = problem.bound(torch.bfloat16)
    for backend, reason in problem.why_not(half).items():
        if reason is not None:
            print(f"{case.name}: no {KERNELS[backend]}: {reason}")
            continue
        error = below(problem.error(half, backend), case.tolerance, f"the relative error of {KERNELS[backend]}")
        print(f"{case.name}: {KERNELS[backend]}: largest relative error {error:.1e}, of {case.tolerance:.1e} allowed")


def compiling() -> None:
    """Compile what the rows of `kernel`, and of gradients, need, in parallel processes.

    It stays in the caches of Triton and Inductor.
    """
    jobs = {case.name: lambda case=case: _compile(case) for case in CASES}
    for case, dtype in ((FIRST[0], torch.float32), *((case, torch.bfloat16) for case in FIRST[:2])):
        jobs[f"gradient of {case.name}, {dtype}"] = lambda case=case, dtype=dtype: _compile_gradient(case, dtype)
    parallel(jobs, at_once=2 if REHEARSING else 8)


@torch.no_grad()
def _compile(case: Case) -> None:
    problem = Problem(case)
    if not REHEARSING:
        problem.compiled()(problem.x[:CHUNK], problem.keys[:CHUNK])
    half = problem.bound(torch.bfloat16)
    if problem.why_not(half)["triton"] is None:
        problem.by_op(half, "triton")
    print(f"{case.name}: compiled")


def _compile_gradient(case: Case, dtype: torch.dtype) -> None:
    problem = Problem(case)
    _of_parameters(_few(problem), problem.bound(dtype), "triton", dtype)
    print(f"gradient of {case.name}, {dtype}: compiled")


@torch.no_grad()
def kernel(case: Case) -> Row:
    """Milliseconds of one case by each backend, eager PyTorch and torch.compile in a graph."""
    problem, rows = Problem(case), SAMPLES * DRAWS
    half = problem.bound(torch.bfloat16)
    operands = (problem.x, problem.keys, problem.points, problem.rows, *half[1], *half[2])
    traffic = 4 * rows + sum(t.numel() * t.element_size() for t in operands)  # f, and each operand read once
    row = Row("kernels", network=case.name, rows=rows, GFLOP=case.flops * rows / 1e9)
    row["FLOP / byte"] = case.flops * rows / traffic

    for backend, reason in problem.why_not(half).items():
        name = KERNELS[backend]
        if reason is None:
            row.measure(f"{name}, error", lambda b=backend: below(problem.error(half, b), case.tolerance, "it"))
            if row[f"{name}, error"] is not None:
                row.measure(f"{name}, ms", lambda b=backend: milliseconds(graphed(lambda: problem.by_op(half, b))))
    if row.get("compiled kernel, ms"):
        row.measure("its launch alone, ms", lambda: _launched(problem.packed(half), cuda.Config())[0])
    if row.get("compiled kernel, ms") and case.width <= cuda.WIDTHS[-1]:
        row.measure("by instructions, ms", lambda: _launched(problem.packed(half, True), cuda.Config())[0])
    module = copy.deepcopy(problem.module).bfloat16()

    def eager() -> torch.Tensor:
        return problem.in_chunks(lambda x, keys: problem.by_module(module, x, keys))

    row.measure("eager, ms", lambda: milliseconds(eager, 3))
    if not REHEARSING:
        compiled = problem.compiled()
        row.measure("compile + graph, ms", lambda: milliseconds(graphed(lambda: problem.in_chunks(compiled)), 10))
    known = [row[c] for c in ("compiled kernel, ms", "its launch alone, ms", "Triton, ms") if row.get(c)]
    if known:
        row["best, ms"] = min(known)
        row["TFLOP/s"] = row["GFLOP"] / row["best, ms"]
    row.ratio("over compile", "compile + graph, ms", "best, ms")
    row.ratio("over eager", "eager, ms", "best, ms")
    return row


def _launched(packed: cuda.Packed | cuda.PackedSteps, config: cuda.Config) -> tuple[float, torch.Tensor]:
    """Return the milliseconds of one launch of a compiled kernel, and its f."""
    f = torch.full((SAMPLES, DRAWS), float("nan"), device=DEVICE)
    stream = torch.cuda.current_stream().cuda_stream
    return milliseconds(lambda: cuda.launch(select.native(), packed, f, 0, stream, config), 10), f


@torch.no_grad()
def division(case: Case) -> Row:
    """Launch one packed problem with every division of the work; the winner belongs into csrc/density_mlp.cpp."""
    problem, row = Problem(case), Row("launches", network=case.name, kernel="compiled kernel")
    half = problem.bound(torch.bfloat16)
    if reason := problem.why_not(half)["cuda"]:
        print(f"{case.name}: {reason}")
        return row
    packed = problem.packed(half, by_instructions=True)  # steps divide their work by themselves
    row.measure("chosen, ms", lambda: _launched(packed, cuda.Config())[0])
    want, found = _launched(packed, cuda.Config())[1], {}

    def best() -> str:
        for cluster in (1, 2, 4):
            for splits in (1, 2, 4, 8, 16, 32, 64):
                config = cuda.Config(cluster, splits)
                found[config], f = _launched(packed, config)
                if not f.equal(want):
                    raise ValueError(f"{config} gives other numbers")
        return str(min(found, key=found.get))

    row.measure("best", best)
    row.measure("best, ms", lambda: min(found.values()))
    return row


@torch.no_grad()
def configuration(case: Case) -> Row:
    """Launch Triton's kernel with configurations beside the heuristic's; the winner belongs into it."""
    problem, row, found = Problem(case), Row("launches", network=case.name, kernel="Triton"), {}
    half = problem.bound(torch.bfloat16)
    want = problem.by_op(half)
    row.measure("chosen, ms", lambda: milliseconds(graphed(lambda: problem.by_op(half))))
    shapes = ((32, 8), (64, 8)) if REHEARSING else ((32, 8), (64, 4), (64, 8), (128, 8))
    stages = {True: (2,), False: (2,) if REHEARSING else (1, 2, 3)}

    def best() -> str:
        for config in (fused.Config(*shape, kept, n) for shape in shapes for kept in stages for n in stages[kept]):
            with mock.patch.object(fused.Config, "from_heuristic", lambda *_, config=config, **__: config):
                try:
                    got = problem.by_op(half)
                except OutOfResources:  # too much shared memory: no launch at all
                    continue
                torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().mean()))
                found[str(config)] = milliseconds(graphed(lambda: problem.by_op(half)), 10)
        return min(found, key=found.get)

    row.measure("best", best)
    row.measure("best, ms", lambda: min(found.values()))
    return row


@torch.no_grad()
def precisions(case: Case) -> Row:
    """Milliseconds and errors of Triton's kernel with each kind of products."""
    problem, row = Problem(case), Row("precisions", network=case.name)
    kinds = (("bf16", torch.bfloat16, "highest", 3e-2), ("fp16", torch.float16, "highest", 3e-2),
             ("tf32", torch.float32, "high", 3e-2), ("tf32x3", torch.float32, "highest", 1e-5))  # fmt: skip

    for name, dtype, precision, limit in kinds:
        torch.set_float32_matmul_precision(precision)
        bound = problem.bound(dtype)
        row.measure(f"{name}, error", lambda b=bound, limit=limit: below(problem.error(b, "triton"), limit, "it"))
        if row[f"{name}, error"] is not None:
            row.measure(f"{name}, ms", lambda bound=bound: milliseconds(graphed(lambda: problem.by_op(bound))))
    return row


def gradient_of_the_data(case: Case) -> Row:
    """The gradient with respect to x of a frozen network: the kernel that computes it beside eager PyTorch."""
    problem, row = Problem(case), Row("calls", call=f"gradient of x, {case.name}, bf16, {SAMPLES * DRAWS} rows")
    problem.module.requires_grad_(False)
    half, module = problem.bound(torch.bfloat16), copy.deepcopy(problem.module).bfloat16()

    def by_kernel() -> torch.Tensor:
        problem.x = problem.x.detach().requires_grad_()
        return torch.autograd.grad(problem.by_op(half).sum(), problem.x)[0]

    def eager() -> torch.Tensor:
        parts = []
        for x, keys in zip(problem.x.detach().split(CHUNK), problem.keys.split(CHUNK)):
            leaf = x.requires_grad_()
            parts.append(torch.autograd.grad(problem.by_module(module, leaf, keys).sum(), leaf)[0])
        return torch.cat(parts)

    def difference() -> float:
        found, expected = by_kernel(), eager()
        # Both round operands to bf16, at different places: sums over all rows agree to a few of their errors.
        return below(float(((found - expected).abs() / (expected.abs() + expected.abs().mean())).max()), 0.1, "it")

    row.measure("difference", difference)
    row.measure("ms", lambda: milliseconds(by_kernel))
    row.beside("eager PyTorch, forward and backward", lambda: milliseconds(eager, 3))
    return row


def gradient_of_the_parameters(case: Case) -> Row:
    """The gradient of weights and vector operands: the kernel that computes it beside eager PyTorch."""
    problem = Problem(case)
    row = Row("calls", call=f"gradient of parameters, {case.name}, bf16, {SAMPLES * DRAWS} rows")
    half, module = problem.bound(torch.bfloat16), copy.deepcopy(problem.module).bfloat16()
    few, exact = _few(problem), _few(problem)
    exact.x, exact.rows = few.x.double(), few.rows.double()

    def eager() -> None:
        for x, keys in zip(problem.x.split(CHUNK), problem.keys.split(CHUNK)):
            torch.autograd.grad(problem.by_module(module, x, keys).sum(), [*module.parameters()], allow_unused=True)

    def difference() -> float:
        found, expected = (
            _of_parameters(which, half, backend, dtype)
            for which, backend, dtype in ((few, "triton", torch.bfloat16), (exact, "torch", torch.float64))
        )
        apart = sum((a.double() - b).square().sum() for a, b in zip(found, expected)) ** 0.5
        size = sum(b.square().sum() for b in expected) ** 0.5
        # Twice the products of a forward pass, each of which rounds to 2^-9 at random: four times the root of the sum.
        return below(float(apart / size), 2**0.5 * case.tolerance, "it")

    row.measure("difference", difference)
    row.measure("ms", lambda: milliseconds(lambda: _of_parameters(problem, half, "triton", torch.bfloat16)))
    row.beside("eager PyTorch, forward and backward", lambda: milliseconds(eager, 3))
    return row


def _few(problem: Problem) -> Problem:
    """Return the problem of the first samples."""
    found = copy.copy(problem)
    found.x, found.keys = problem.x[FEW], problem.keys[FEW]
    return found


def _of_parameters(problem: Problem, bound: tuple, backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the gradients of the sum of all f in weights and vector operands, by op."""
    code, *parts = bound
    weights, tables = ([v.detach().to(dtype).requires_grad_() for v in part] for part in parts)
    return [*torch.autograd.grad(problem.by_op((code, weights, tables), backend).sum(), [*weights, *tables])]
