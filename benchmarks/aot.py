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
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import sass
import torch
import triton
from fastscore.kernels import density_mlp, density_mlp_dx, packing, perturb, residual
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ADALN = ("save", "norm", "affine", "act", "linear", "affine", "add")


@dataclass(frozen=True)
class Case:
    """A network's shape, its reference and the precision of the products; the launch is the heuristic's."""

    net: str
    width: int
    depth: int
    d: int
    reference: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.net} H={self.width} L={self.depth} d={self.d}, {self.reference}, {self.precision}"


CASES = (
    Case("adaLN", 64, 3, 64, "diagonal", "bf16"),
    Case("adaLN", 64, 12, 64, "diagonal", "bf16"),
    Case("adaLN", 128, 3, 64, "diagonal", "bf16"),
    Case("adaLN", 128, 6, 64, "diagonal", "bf16"),
    Case("adaLN", 256, 3, 64, "diagonal", "bf16"),
    Case("plain", 128, 3, 64, "diagonal", "bf16"),
    Case("plain", 128, 3, 2, "full mixture", "bf16"),
    Case("adaLN", 64, 3, 64, "full", "bf16"),
    Case("adaLN", 64, 3, 64, "mixture", "bf16"),
    Case("plain", 128, 2, 128, "full", "bf16"),
    Case("plain", 128, 2, 128, "full mixture", "bf16"),
    Case("plain", 64, 2, 64, "none", "bf16"),
    Case("adaLN", 64, 3, 784, "diagonal", "bf16"),
    Case("adaLN", 64, 3, 64, "diagonal", "fp16"),
    Case("adaLN", 64, 3, 64, "diagonal", "tf32"),
    Case("adaLN", 64, 3, 64, "diagonal", "tf32x3"),
    Case("adaLN", 128, 3, 64, "diagonal", "tf32x3"),
)
COMPONENTS = 10


def network(case: Case) -> tuple[tuple, list, list]:
    """Return code, weights and tables of a network of the case's shape."""
    rows, h, d = 2, case.width, case.d
    weights, tables = [torch.zeros(h, d)], [torch.zeros(1, rows, h)]
    code = [("linear", 0), ("affine", -1, 0)]
    for layer in range(case.depth):
        weights.append(torch.zeros(h, h))
        n = len(tables)
        if case.net == "adaLN":
            tables += [torch.zeros(1, rows, h)] * 4
            code += [("save", 1), ("norm", 1e-6), ("affine", n, n + 1), ("act", "silu")]
            code += [("linear", layer + 1), ("affine", n + 2, n + 3), ("add", 1, -1)]
        else:
            tables.append(torch.zeros(1, rows, h))
            code += [("act", "silu"), ("linear", layer + 1), ("affine", -1, n)]
    weights.append(torch.zeros(d, h))
    tables.append(torch.zeros(1, rows, d))
    return (*code, ("act", "silu"), ("linear", case.depth + 1), ("affine", -1, len(tables) - 1)), weights, tables


def reference(case: Case) -> tuple | None:
    if case.reference == "none":
        return None
    k, d = (COMPONENTS if "mixture" in case.reference else 1), case.d
    basis = torch.eye(d, dtype=torch.float64).expand(k, d, d) if "full" in case.reference else torch.empty(0)
    weight = torch.full((k,), 1 / k, dtype=torch.float64)
    return weight, torch.zeros_like(weight[:, None]).expand(k, d), torch.ones_like(weight[:, None]).expand(k, d), basis


def constants(case: Case, capability: int) -> tuple[dict, density_mlp.Config]:
    """Return the compile-time arguments and the launch, by the very functions that a launch uses."""
    into, dtype = packing.Tables(2, 2), density_mlp.OPERANDS[case.precision]
    layout, _ = packing.pack_network(*network(case), case.d, into, dtype)
    control, _, _ = packing.pack_control(reference(case), torch.zeros(2, case.d), torch.ones(2), torch.ones(2), into)
    config = density_mlp.Config.from_heuristic(layout, case.d, case.reference, case.precision, capability)
    return density_mlp.constants(layout, control, case.d, case.precision, config), config


POINTERS = {"x_ptr": "*fp32", "keys_ptr": "*i32", "points_ptr": "*i32", "rows_ptr": "*fp32", "r_ptr": "*fp32"}
POINTERS |= {"b_ptr": "*fp32", "br_ptr": "*fp32", "q_ptr": "*fp32", "y_ptr": "*fp32", "f_ptr": "*fp32"}
POINTERS |= {"grad_ptr": "*fp32", "grad_x_ptr": "*fp32", "error_ptr": "*fp32"}
SIZES = ("B", "R", "ROWS_PER_PROGRAM", "r_stride", "b_stride", "br_stride")
OPERAND_POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def compile_case(case: Case, capability: int) -> tuple:
    """Return the compiled kernel and its launch configuration."""
    constexprs, config = constants(case, capability)
    return build(density_mlp.density_mlp_fwd_kernel, constexprs, case, config, capability), config


def build(kernel, constexprs: dict, case: Case, config: density_mlp.Config, capability: int):
    """Compile a kernel of the fused family."""
    signature = POINTERS | {"w_ptr": OPERAND_POINTER[density_mlp.OPERANDS[case.precision]]}
    signature |= dict.fromkeys(SIZES, "i32") | dict.fromkeys(constexprs, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    # What a launch finds by itself: pointers of torch tensors are aligned.
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": config.num_warps, "num_stages": 1}
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


def compile_thin(name: str, capability: int):
    """Return a compiled thin kernel, for a network in bfloat16 and 3,072 dimensions."""
    pointers = {"x_t_ptr": "*bf16", "prediction_ptr": "*bf16", "grad_prediction_ptr": "*bf16"}
    pointers |= {"keys_ptr": "*i32", "points_ptr": "*i32"}
    kernel, constexprs = {
        "perturb_fwd": (perturb.perturb_fwd_kernel, {"KEEP_EPS": False, "BLOCK_N": 4, "BLOCK_D": 256}),
        "residual_fwd": (residual.residual_fwd_kernel, {"BLOCK_N": 1, "BLOCK_D": residual.TILE}),
        "residual_bwd": (residual.residual_bwd_kernel, {"BLOCK_B": 1, "BLOCK_D": residual.TILE}),
    }[name]
    signature = {
        n: "constexpr" if n in constexprs else pointers.get(n, "*fp32" if n.endswith("_ptr") else "i32")
        for n in kernel.arg_names
    }
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n.endswith("_ptr") or n == "D"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


DX = tuple(
    Case("adaLN", width, depth, 64, "diagonal", precision)
    for width, depth, precision in ((64, 3, "bf16"), (128, 1, "bf16"), (64, 3, "tf32x3"))
)


def compile_dx(case: Case, capability: int) -> tuple:
    """Return the compiled gradient kernel of a case, and its launch."""
    into, dtype = packing.Tables(2, 2), density_mlp.OPERANDS[case.precision]
    layout, _ = packing.pack_network(*network(case), case.d, into, dtype)
    control, _, _ = packing.pack_control(reference(case), torch.zeros(2, case.d), torch.ones(2), torch.ones(2), into)
    config = density_mlp.Config(density_mlp_dx.BLOCK_B, density_mlp_dx.NUM_WARPS, False, 1)
    straight = replace(config, resident=True)
    constexprs = density_mlp_dx.dx_constants(layout, control, case.d, case.precision, straight)
    return build(density_mlp_dx.density_mlp_dx_kernel, constexprs, case, config, capability), config


THIN = ("perturb_fwd", "residual_fwd", "residual_bwd")


def measure(case: Case | str, capability: int, gradient: bool = False) -> dict:
    """Compile a case, or the thin kernel of that name, and return its row of the table."""
    if isinstance(case, str):
        launch = {"samples": 1, "warps": 4, "weights": "-"}
        return {"case": case, "sm": capability} | launch | inspect(compile_thin(case, capability))
    compiled, config = (compile_dx if gradient else compile_case)(case, capability)
    weights = "resident" if config.resident else "streamed"
    launch = {"samples": config.block_b, "warps": config.num_warps, "weights": weights}
    name = f"dx of {case.name}" if gradient else case.name
    return {"case": name, "sm": capability} | launch | inspect(compiled)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--match", default="", help="only the cases whose name contains this")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    cases = [case for case in (*CASES, *THIN) if options.match in getattr(case, "name", case)]
    jobs = [(case, sm, False) for case in cases for sm in options.capabilities]
    jobs += [(case, sm, True) for case in DX if options.match in f"dx of {case.name}" for sm in options.capabilities]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(measure, *zip(*jobs, strict=True)))
    if options.json:
        json.dump({"triton": triton.__version__, "rows": rows}, sys.stdout, indent=1)
        return
    print("| kernel | sm | samples, warps | weights | registers | stack, B | shared, KB | matrix instructions | loop |")
    print("|---" * 9 + "|")
    for row in rows:
        products = f"{row['matrix']} {'wgmma' if row['wgmma'] else 'mma'}" if row["matrix"] else "-"
        cells = [row["case"], row["sm"], f"{row['samples']}, {row['warps']}", row["weights"], row["registers"]]
        cells += [row["stack"], f"{row['shared'] / 1024:.0f}", products, row["loop"] or "-"]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
