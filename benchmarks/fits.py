"""Compile what is chosen for random networks on several devices, and compare its resources with the device's.

    python benchmarks/fits.py --count 40 --seed 0         a sample, as the tests take it; --json for all rows

Networks, widths, depths, dimensions, references, precisions and devices are drawn (`random_networks.py`). Of each, the
forward kernel that `Config.from_heuristic` chooses is compiled, that of the data's gradient where it says that it can
run, of every twentieth network that of the parameters, and the reference's own kernel. Shared memory and registers are
those of the compiled binary, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import aot
import random_networks
import sass
import torch
import triton
from fastscore.kernels import control, density_mlp_dp, density_mlp_dx, density_mlp_grad, launch, packing
from random_networks import Problem
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

REGISTERS = 65_536  # of a multiprocessor, on every architecture
WIDE = 10  # networks for one that is wider than the kernel takes whose weights come whole
SELDOM = 20  # networks for one whose parameters' gradient is compiled, which takes as long as all else of several


def examine(seed: int) -> list[dict]:
    """Return a row for every kernel of a random network on a random device, or what the choice says against it."""
    torch.set_num_threads(1)
    generator = random.Random(seed)
    problem = random_networks.random_problem(generator, wide=seed % WIDE == WIDE - 1)
    capability = generator.choice(tuple(aot.SHARED))
    about = {"seed": seed, "case": problem.name, "sm": capability, "granted": aot.SHARED[capability]}
    kernels = (forward, gradient, reference, parameters)[: 4 if seed % SELDOM == 0 else 3]
    return [about | {"kernel": kernel.__name__} | row for kernel in kernels for row in kernel(problem, capability)]


def forward(problem: Problem, capability: int) -> Iterator[dict]:
    """Compile the launch that is chosen, or yield why there is none."""
    work = problem.packed()[0]
    try:
        config = aot.chosen(work, capability)
    except launch.NoRoom as error:
        yield {"refused": str(error)}
        return
    bound, compiled = config.shared_bytes(work, capability), aot.compile_forward(problem, config, capability)
    yield {"launch": str(config), "bound": bound} | resources(compiled, config.num_warps)


def gradient(problem: Problem, capability: int) -> Iterator[dict]:
    """Compile the kernel of the data's gradient where the choice would run it."""
    work, shapes = problem.packed()[0], [tuple(w.shape) for w in problem.weights]
    mixture, full = "mixture" in work.reference, "full" in work.reference
    bound = density_mlp_dx.shared_bytes(work)
    if density_mlp_dx.why_not(problem.code, shapes, problem.d, mixture, full) or bound > aot.SHARED[capability]:
        return
    compiled = aot.compile_gradient(problem, density_mlp_dx.ALONE, capability)
    yield {"bound": bound} | resources(compiled, density_mlp_grad.NUM_WARPS)


def parameters(problem: Problem, capability: int) -> Iterator[dict]:
    """Compile the kernel of the parameters' gradient where the choice would run it."""
    work = problem.packed()[0]
    if density_mlp_dp.why_not(problem.d, False, False, False) is not None:
        return
    try:
        density_mlp_dp.check_room(work, aot.device(capability))
    except launch.NoRoom:
        return
    compiled = aot.compile_gradient(problem, (False, True, True), capability)
    yield {"bound": density_mlp_dp.shared_bytes(work)} | resources(compiled, density_mlp_grad.NUM_WARPS)


def reference(problem: Problem, capability: int) -> Iterator[dict]:
    """Compile the kernel that evaluates a reference by itself, unless it needs no shared memory."""
    work, d = problem.packed()[0], problem.d
    fits = control.why_not(work.components, "full" in work.reference, d, aot.SHARED[capability]) is None
    if work.reference not in ("none", "diagonal") and fits:
        bound = control.shared_bytes(work.reference, work.components, d)
        yield {"bound": bound} | resources(compile_control(problem, capability), control.NUM_WARPS)


def compile_control(problem: Problem, capability: int):
    """Return the compiled kernel that evaluates a problem's reference by itself."""
    into, x, ones = packing.Tables(2, 2), torch.zeros(2, problem.d), torch.ones(2)
    kind, _, _ = packing.pack_control(problem.reference, x, ones, ones, into)
    refs, operands = packing.number_references(kind[1:])
    constexprs = {"D": problem.d, "PADDED": packing.padded(problem.d), "BLOCK_D": packing.block_d(problem.d)}
    constexprs |= {"BLOCK_B": control.BLOCK_B, "REFS": refs, "KIND": kind[0], "CONTROL": operands}
    names = control.control_fwd_kernel.arg_names
    signature = {n: "constexpr" if n in constexprs else aot.POINTERS.get(n, "i32") for n in names}
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    options = {"num_warps": control.NUM_WARPS, "num_stages": 1}
    source = ASTSource(fn=control.control_fwd_kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled, num_warps: int) -> dict:
    """Return shared memory of a program, and registers of all its threads.

    What a cubin calls static, 1 KB on Hopper and later, is the driver's; the memory that a device grants excludes it.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = sass.dump("--dump-resource-usage", cubin)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return {"shared": compiled.metadata.shared, "registers": 32 * num_warps * registers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    seeds = range(options.seed, options.seed + options.count)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = [row for found in pool.map(examine, seeds) for row in found]
    if options.json:
        json.dump(rows, sys.stdout)
        return
    compiled = [row for row in rows if "shared" in row]
    largest = max(compiled, key=lambda row: row["shared"] / row["granted"])
    print(f"{len(seeds)} networks, {len(compiled)} kernels compiled, {len(rows) - len(compiled)} networks without one")
    print(f"largest share of a device's shared memory: {largest['shared'] / largest['granted']:.4f}, {largest}")
    print(*exceeded(rows), sep="\n")
    sys.exit(bool(exceeded(rows)))


def exceeded(rows: list[dict]) -> list[str]:
    """Return one line for every kernel that takes more than its device has, or than the bound that chose it."""
    lines = []
    for row in (row for row in rows if "shared" in row):
        name, shared = f"seed {row['seed']}, {row['kernel']}", row["shared"]
        lines += [f"{name}: {shared} bytes of {row['granted']}"] * (shared > row["granted"])
        lines += [f"{name}: {shared} bytes, the bound is {row['bound']}"] * (shared > row["bound"])
        lines += [f"{name}: {row['registers']} registers"] * (row["registers"] > REGISTERS)
    return lines


if __name__ == "__main__":
    main()
