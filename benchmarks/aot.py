"""Compile every kernel configuration for sm_80 and sm_90 without a GPU, and read what the compiler made of it.

    python benchmarks/aot.py                                            prints the table of docs/kernels.md
    python benchmarks/aot.py --json > benchmarks/results/aot.json       records what the tests hold kernels to

Registers, stack and shared memory come from the cubin, instruction counts from its disassembly: matrix instructions
(HGMMA on sm_90, HMMA on sm_80), local loads and stores (spills), and the longest loop's instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import random_networks
import sass
import torch
import triton
from fastscore.kernels import density_mlp, density_mlp_dp, density_mlp_dx, density_mlp_grad, density_mlp_wide, launch
from fastscore.kernels.panels import Panels
from fastscore.kernels.weights import weight_groups
from markdown import aot_table
from random_networks import Problem
from thin_kernels import THIN, compile_thin
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

adaLN, plain = random_networks.adaln, random_networks.plain


class Case(NamedTuple):
    """A network's shape, its reference and the precision of the products; the launch is the one that is chosen."""

    net: Callable[..., None]
    width: int
    depth: int
    d: int
    reference: str
    precision: str

    @property
    def name(self) -> str:
        net = "adaLN" if self.net is adaLN else "plain"
        return f"{net} H={self.width} L={self.depth} d={self.d}, {self.reference}, {self.precision}"


CASES = (
    Case(adaLN, 64, 3, 64, "diagonal", "bf16"),
    Case(adaLN, 64, 12, 64, "diagonal", "bf16"),
    Case(adaLN, 128, 3, 64, "diagonal", "bf16"),
    Case(adaLN, 256, 3, 64, "diagonal", "bf16"),
    Case(plain, 128, 3, 64, "diagonal", "bf16"),
    Case(plain, 128, 3, 2, "full mixture", "bf16"),
    Case(adaLN, 64, 3, 64, "full", "bf16"),
    Case(adaLN, 64, 3, 64, "mixture", "bf16"),
    Case(plain, 128, 2, 128, "full", "bf16"),
    Case(plain, 128, 2, 128, "full mixture", "bf16"),
    Case(plain, 64, 2, 64, "none", "bf16"),
    Case(adaLN, 64, 3, 784, "diagonal", "bf16"),
    Case(adaLN, 64, 3, 64, "diagonal", "fp16"),
    Case(adaLN, 64, 3, 64, "diagonal", "tf32"),
    Case(adaLN, 64, 3, 64, "diagonal", "tf32x3"),
    Case(adaLN, 128, 3, 64, "diagonal", "tf32x3"),
    Case(adaLN, 512, 3, 64, "diagonal", "bf16"),
    Case(adaLN, 512, 3, 64, "diagonal", "tf32x3"),
)
# Shared memory of a program in bytes, by compute capability.
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def device(capability: int) -> launch.Device:
    return launch.Device(capability, SHARED[capability])


POINTERS = {"x_ptr": "*fp32", "keys_ptr": "*i32", "points_ptr": "*i32", "rows_ptr": "*fp32", "r_ptr": "*fp32"}
POINTERS |= {"b_ptr": "*fp32", "br_ptr": "*fp32", "q_ptr": "*fp32", "y_ptr": "*fp32", "f_ptr": "*fp32"}
POINTERS |= {"grad_ptr": "*fp32", "grad_x_ptr": "*fp32", "error_ptr": "*fp32", "tape_ptr": "*fp32"}
POINTERS |= {"saved_ptr": "*fp32", "grad_r_ptr": "*fp32", "grad_b_ptr": "*fp32", "grad_br_ptr": "*fp32"}
SIZES = ("B", "R", "ROWS_PER_PROGRAM", "PAIRS_PER_PROGRAM", "r_stride", "b_stride", "br_stride")
SIZES += ("grad_r_stride", "grad_b_stride", "grad_br_stride")
OPERAND_POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def chosen(work: launch.Work, capability: int) -> launch.Config | Panels:
    """Return what a network without a reference, or with one along the axes, is launched with; raise NoRoom."""
    if work.layout.width <= launch.MAX_WIDTH[work.itemsize]:
        try:
            return launch.Config.from_heuristic(work, device(capability))
        except launch.NoRoom:
            if work.reference not in ("none", "diagonal"):
                raise
    return Panels.choose(work, device(capability))


def compile_forward(problem: Problem, config: launch.Config | Panels, capability: int):
    """Return the compiled forward kernel of a problem, with the constants of a launch."""
    work, operands = problem.packed()
    if isinstance(config, Panels):
        constexprs = density_mlp_wide.wide_constants(work, operands, config)
        kernel = density_mlp_wide.density_mlp_wide_kernel
        return build(kernel, constexprs, problem.precision, config.num_warps, capability)
    constexprs = density_mlp.constants(work.layout, operands, problem.d, problem.precision, config)
    return build(density_mlp.density_mlp_fwd_kernel, constexprs, problem.precision, config.num_warps, capability)


ACCESS = re.compile(r"(st|ld)\.global|(cp)\.async\.c[ag]|(bar)\.sync")


def unordered(ptx: str) -> int:
    """Return how many stores to memory no barrier parts from the next load, or from the last one before them.

    The kernel of wide layers reads what other threads of its program have written; Triton's interpreter has one thread.
    """
    found = [next(filter(None, match.groups())) for match in ACCESS.finditer(ptx)]
    pairs = [(a, b) for a, b in pairwise(found) if a != b]  # runs of one kind
    return sum("st" in pair and "bar" not in pair for pair in pairs)


def compile_gradient(problem: Problem, wanted: tuple[bool, bool, bool], capability: int):
    """Return the compiled gradient kernel of a problem, for x, the weights and the vector operands, or some of them."""
    work, operands = problem.packed()
    shape = work.layout, operands, problem.d, problem.precision
    places, samples = weight_groups(work.layout.weights)[1], gradient_samples(work, wanted)
    constexprs = density_mlp_grad.grad_constants(*shape, wanted, places, samples)
    kernel = density_mlp_grad.density_mlp_grad_kernel
    return build(kernel, constexprs, problem.precision, density_mlp_grad.NUM_WARPS, capability)


def gradient_samples(work: launch.Work, wanted: tuple[bool, bool, bool]) -> int:
    """Return how many samples a program of the gradient's kernel owns."""
    return density_mlp_dp.samples_of(work) if any(wanted[1:]) else density_mlp_dx.BLOCK_B


def build(kernel, constexprs: dict, precision: str, num_warps: int, capability: int):
    """Compile a kernel of the fused family."""
    operand = OPERAND_POINTER[launch.OPERANDS[precision]]
    signature = POINTERS | dict.fromkeys(("w_ptr", "inputs_ptr", "outputs_ptr", "operands_ptr"), operand)
    signature |= dict.fromkeys(SIZES, "i32") | dict.fromkeys(constexprs, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    # What a launch finds by itself: pointers of torch tensors are aligned.
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def inspect(compiled) -> dict:
    """Return what the cubin says: registers, stack and shared memory in bytes, and instruction counts."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        (row,) = sass.kernels(cubin).values()
    return {
        "registers": row["registers"],
        "stack": row["stack"],
        "shared": compiled.metadata.shared,
        "matrix": row["hgmma"] + row["hmma"],
        "wgmma": row["hgmma"],
        "local": row["ldl"] + row["stl"],
        "loop": row["loop"],
    }


# Which gradients of which networks: x alone, the parameters, or all of them.
DX, DP, BOTH = {"dx of ": (True, False, False)}, {"dp of ": (False, True, True)}, {"dx, dp of ": (True, True, True)}
GRADIENTS = tuple(
    (*next(iter(wanted.items())), Case(net, width, depth, 64, "diagonal", precision))
    for wanted, net, width, depth, precision in (
        (DX, adaLN, 64, 3, "bf16"),
        (DX, adaLN, 128, 1, "bf16"),
        (DX, adaLN, 64, 3, "tf32x3"),
        (DP, adaLN, 64, 3, "bf16"),
        (DP, adaLN, 128, 3, "bf16"),
        (DP, adaLN, 256, 3, "bf16"),
        (DP, plain, 128, 3, "bf16"),
        (DP, adaLN, 64, 3, "tf32x3"),
        (DP, adaLN, 128, 3, "tf32x3"),
        (BOTH, adaLN, 64, 6, "bf16"),
        (BOTH, adaLN, 64, 3, "tf32x3"),
    )
)


def measure(case: Case | str, capability: int, gradient: tuple | None = None) -> dict:
    """Compile a case, or the thin kernel of that name, and return its row of the table.

    Arguments:
        gradient: what to call the gradient's kernel in place of the forward one, and what wants a gradient.
    """
    if isinstance(case, str):
        launched = {"samples": 1, "warps": THIN[case].warps, "weights": "-"}
        return {"case": case, "sm": capability} | launched | inspect(compile_thin(case, capability))
    problem = random_networks.problem(*case)
    if gradient is not None:
        name, wanted = gradient[0] + case.name, gradient[1]
        samples = gradient_samples(problem.packed()[0], wanted)
        config = launch.Config(samples, density_mlp_grad.NUM_WARPS, False, 1)
        compiled = compile_gradient(problem, wanted, capability)
    else:
        name, config = case.name, chosen(problem.packed()[0], capability)
        compiled = compile_forward(problem, config, capability)
        assert not (isinstance(config, Panels) and unordered(compiled.asm["ptx"])), name
    weights = "in panels" if isinstance(config, Panels) else "resident" if config.resident else "streamed"
    launched = {"samples": config.block_b, "warps": config.num_warps, "weights": weights}
    return {"case": name, "sm": capability} | launched | inspect(compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--match", default="", help="only the cases whose name contains this")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    cases = [case for case in (*CASES, *THIN) if options.match in getattr(case, "name", case)]
    jobs = [(case, sm, None) for case in cases for sm in options.capabilities]
    jobs += [
        (case, sm, (name, wanted))
        for name, wanted, case in GRADIENTS
        if options.match in name + case.name
        for sm in options.capabilities
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(measure, *zip(*jobs, strict=True)))
    if options.json:
        json.dump({"triton": triton.__version__, "rows": rows}, sys.stdout, indent=1)
        return
    print(aot_table(rows))


if __name__ == "__main__":
    main()
