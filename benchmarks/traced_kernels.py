"""Which compiled kernels are traced through a row, on which networks, and what the traces say.

A kernel joins by a row in CASES: the network that it runs, how its parameters are made, and how its warps meet. What a
row may take at most stands in LIMITS, by the beginning of a kernel's name.
"""

from __future__ import annotations

import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import issue_model
import random_networks
import sass
import sass_listing
import torch
from fastscore.kernels.occupancy import best_splits
from fastscore.kernels.packing import level_of
from issue_model import Setting
from random_networks import Problem
from sass_listing import Instruction
from sass_machine import Thread, one_row

from fastscore.ops import cuda, cuda_steps
from fastscore.ops.steps import cut

ARCHITECTURE, CAPABILITY, SHARED = "sm_90a", 90, 232_448
SAMPLES, ROWS, D = 4096, 256, 64  # of the launches that were timed
# Clusters of so many blocks that an H200 runs at once. Of those of four it is not known: as many as it has
# multiprocessors for, at most.
ACTIVE = {1: 132, 2: 66, 4: 33}
CLOCK = 1.8e9  # of the timed kernels, by Nsight: 1.78 to 1.88 GHz
TRACED_ROWS = 5
PARAMETERS_AT = 0x210  # in constant bank 0, behind what describes the launch
INDIRECT = ("BRX", "BRXU")


class Launch(NamedTuple):
    """A launch as a traced thread sees it: parameters' bytes, and `fastscore._C.plan`'s answer."""

    parameters: bytes
    plan: dict


class Case(NamedTuple):
    """A network on a kernel; `tiles`: of 64 samples that a block evaluates at once."""

    network: str  # as results/h200_kernels.json names it
    family: Callable[..., None]
    width: int
    depth: int
    kernel: str
    setting: Setting
    tiles: int
    launch: Callable[[ModuleType, Problem], Launch]


def row_machine(module: ModuleType, problem: Problem) -> Launch:
    """Return the launch of csrc/density_mlp.h for so many samples, and rows that one block walks over."""
    count, ones = TRACED_ROWS, torch.ones(TRACED_ROWS, dtype=torch.float64)
    x, words = torch.zeros(SAMPLES, D), torch.zeros(SAMPLES, 2, D, dtype=torch.int32)
    tables, weights = [table[:, :1] for table in problem.tables], [w.bfloat16() for w in problem.weights]
    points, rows = words[:count, 0], torch.ones(count, 6)
    network = problem.code, weights, tables, list(problem.reference or ())
    packed = cuda.pack(x, words, points, rows, ones, ones, *network)
    strides = [table.shape[-1] for table in packed.tables]
    plan = module.plan(*packed.shape, strides[0], CAPABILITY, SHARED)
    size = struct.calcsize("iiiif")
    data = struct.pack("<9Q", *([1 << 20] * 9))
    data += struct.pack("<13i", SAMPLES, count, *strides, *packed.operands)
    data += struct.pack("<i", len(packed.program) // size) + packed.program.ljust(size * cuda.MAX_INSTRUCTIONS, b"\0")
    rest = count, plan["stages"], plan["tiles"], plan["table_stages"], plan["stage_bytes"], 0, 0, 0
    return Launch(data + struct.pack("<8i", *rest), plan)


def steps(module: ModuleType, problem: Problem) -> Launch:
    """Return the launch of csrc/steps.h for so many samples, and rows that one cluster walks over."""
    count, ones = TRACED_ROWS, torch.ones(TRACED_ROWS, dtype=torch.float64)
    x, words = torch.zeros(SAMPLES, D), torch.zeros(SAMPLES, 2, D, dtype=torch.int32)
    tables, weights = [table[:, :1] for table in problem.tables], [w.bfloat16() for w in problem.weights]
    program = cut(problem.code, tuple(map(level_of, tables)))
    arguments = x, words, words[:count, 0], torch.ones(count, 6), ones, ones
    packed = cuda.pack(*arguments, problem.code, weights, tables, list(problem.reference or ()), program)
    plan = module.steps_plan(*packed.shape, CAPABILITY, SHARED)
    size, between = 32, len(packed.steps) // 32 - 2
    data = struct.pack("<5Q", *([1 << 20] * 5))
    data += struct.pack("<8i", SAMPLES, count, packed.shape.record, *packed.columns, between)
    data += packed.steps.ljust(size * (cuda_steps.MAX_STEPS + 2), b"\0")
    barriers = plan["stages"] if packed.shape.hidden > cuda_steps.WIDTHS[0] else 1
    rest = plan["stages"], plan["tiles"], plan["record_stages"], TRACED_ROWS, 0, barriers, 0, 0, 0
    return Launch(data + struct.pack("<9i", *rest), plan)


def _case(network: str, kernel: str, depth: int, setting: Setting, tiles: int, launch: Callable = row_machine) -> Case:
    family = random_networks.adaln if network.startswith("adaLN") else random_networks.plain
    width = int(network.split("H=")[1].split()[0])
    return Case(network, family, width, depth, kernel, setting, tiles, launch)


CHAIN = "sm90_density_mlp_fwd_kernel<{}, 64>".format
# Refills of a ring, in cycles, are those that fit the timed kernels.
CASES = (
    _case("adaLN H=64 L=3", CHAIN(64), 3, Setting(3), 3),
    _case("adaLN H=128 L=3", CHAIN(128), 3, Setting(2, stages=9), 2),
    _case("adaLN H=256 L=3", CHAIN(256), 3, Setting(2, stages=4, vectors=1200), 2),
    _case("adaLN H=512 L=3", "sm90_density_mlp_wide_fwd_kernel", 3, Setting(2, 2, 900, 1200, apart=False), 1),
    _case("plain H=128 L=3", CHAIN(128), 2, Setting(2), 2),
    _case("plain H=256 L=3", CHAIN(256), 2, Setting(2, stages=5), 2),
    _case("adaLN H=64 L=3", "sm90_steps_64_fwd_kernel<64, false, true>", 3, Setting(3), 3, steps),
    _case("adaLN H=128 L=3", "sm90_steps_128_fwd_kernel<64, false, true>", 3, Setting(2, stages=7), 2, steps),
    _case("plain H=128 L=3", "sm90_steps_128_fwd_kernel<64, false, true>", 2, Setting(2), 2, steps),
    _case("adaLN H=256 L=3", "sm90_steps_256_fwd_kernel<64, false>", 3, Setting(2, stages=8), 2, steps),
    _case("plain H=256 L=3", "sm90_steps_256_fwd_kernel<64, false>", 2, Setting(2, stages=8), 2, steps),
    _case("adaLN H=512 L=3", "sm90_steps_512_fwd_kernel<false>", 3, Setting(2, 2, 900, 1200, apart=False), 1, steps),
    _case("adaLN H=1024 L=3", "sm90_steps_1024_fwd_kernel<false>", 3, Setting(2, 4, 900, 1200, False), 1, steps),
    _case("plain H=64 L=3", "sm90_steps_64_fwd_kernel<64, false, true>", 2, Setting(3), 3, steps),
    _case("plain H=512 L=3", "sm90_steps_512_fwd_kernel<false>", 2, Setting(2, 2, 900, apart=False), 1, steps),
    _case("adaLN H=64 L=6", "sm90_steps_64_fwd_kernel<64, false, false>", 6, Setting(3), 3, steps),
    _case("adaLN H=128 L=6", "sm90_steps_128_fwd_kernel<64, false, true>", 6, Setting(2, stages=6), 2, steps),
    _case("adaLN H=256 L=6", "sm90_steps_256_fwd_kernel<64, false>", 6, Setting(2, stages=6), 2, steps),
)
# Instructions that a row of three blocks may take in the kernels of fused steps, by width; MOVs, and bytes of stack.
LIMITS = {"sm90_steps": {64: 2850, 128: 4450, 256: 9400, 512: 9700, 1024: 13700}}
MOST_MOVES, MOST_STACK = 210, 80


class Library:
    """The machine code of a compiled module."""

    def __init__(self, path: Path, module: ModuleType):
        self.path, self.module = path, module

    @cached_property
    def code(self) -> dict[str, list[Instruction]]:
        return sass_listing.listings(self.path, ARCHITECTURE)

    @cached_property
    def tables(self) -> dict[str, bytes]:
        """The tables of indirect branches, of every kernel that has one."""
        found: dict[str, bytes] = {}
        with tempfile.TemporaryDirectory() as folder:
            sass.extract(self.path, Path(folder))
            for cubin in Path(folder).glob(f"*.{ARCHITECTURE}.cubin"):
                found |= sass_listing.branch_tables(cubin.read_bytes())
        return found

    def trace(self, mangled: str, launch: Launch) -> tuple[list[Instruction], Thread]:
        """Return a row's instructions in the first consumer warp, and the thread that issued them."""
        start = struct.pack("<4i", launch.plan["threads"], 1, 1, 1).ljust(PARAMETERS_AT, b"\0")
        thread = Thread(self.code[mangled], {0: start + launch.parameters, 2: self.tables.get(mangled, b"")})
        return one_row(thread, TRACED_ROWS), thread


def trace_all(path: Path, module: ModuleType, names: dict[str, str]) -> list[dict]:
    """Return a row for every case whose kernel the library has; `names`: {kernel: mangled name}."""
    library = Library(path, module)
    return [trace_case(library, case, names[case.kernel]) for case in CASES if case.kernel in names]


def trace_case(library: Library, case: Case, mangled: str) -> dict:
    """Trace a case, and count what a warp issues for a row of 64 samples."""
    problem = random_networks.problem(case.family, case.width, case.depth, D, "diagonal", "bf16")
    launch = case.launch(library.module, problem)
    trace, thread = library.trace(mangled, launch)
    cycles = issue_model.cycles(trace, case.setting)
    found = {"network": case.network, "kernel": case.kernel, "width": case.width} | summary(trace)
    found |= {"undecided": len(thread.undecided), "shared": launch.plan["shared_bytes"]}
    milliseconds = 1e3 * cycles * rows_of_a_block(launch.plan) / CLOCK
    return found | {"cycles": round(cycles / case.tiles), "predicted, ms": float(f"{milliseconds:.3g}")}


def summary(trace: list[Instruction]) -> dict:
    """Count a row's instructions by what the gates hold; `tensor`: cycles of the tensor cores for a warp's products."""
    bases = Counter(instruction.base for instruction in trace)
    return {
        "instructions": len(trace),
        "moves": bases["MOV"],
        "branches": bases["BRA"],
        "indirect": sum(bases[name] for name in INDIRECT),
        "special": bases["MUFU"],
        "tensor": sum(issue_model.columns_of(i) for i in trace if i.base == "HGMMA") // 2,
        "noise side by side": side_by_side(trace),
        "local": bases["LDL"] + bases["STL"],
    }


def side_by_side(trace: list[Instruction]) -> int:
    """Return the fewest elements of noise that are made without a branch between them."""
    runs = [0]
    for instruction in trace:
        if instruction.base in ("BRA", *INDIRECT):
            runs.append(0)
        runs[-1] += instruction.name == "MUFU.SQRT"  # one an element, and nowhere else
    return min((run for run in runs if run), default=0)


def rows_of_a_block(plan: dict) -> int:
    """Return how many rows the longest block evaluates, in all its waves, of the launches that were timed."""
    if "record_stages" in plan:  # persistent clusters share all pairs of a tile and a row
        return -(
            -(-(-SAMPLES // (plan["samples"] * plan["cluster"])) * ROWS) // ACTIVE[plan["cluster"] * plan["parts"]]
        )
    cluster = min(plan["cluster"], 2)  # as `division` of csrc/density_mlp.cpp chooses for that many samples
    tiles = -(-SAMPLES // (plan["samples"] * cluster))
    splits = best_splits(tiles, ROWS, ACTIVE[cluster])
    return -(-tiles * splits // ACTIVE[cluster]) * -(-ROWS // splits)


def exceeded(found: list[dict], recorded: list[dict]) -> list[str]:
    """Return one line for everything in which a trace is worse than the recorded one, or beyond LIMITS."""
    lines, before = [], {(row["network"], row["kernel"]): row for row in recorded}
    for row in found:
        name, old = f"{row['network']} on {row['kernel']}", before.get((row["network"], row["kernel"]))
        if old is None:
            lines.append(f"{name}: not recorded")
            continue
        lines += [f"{name}: {c} {old[c]} -> {row[c]}" for c in ("special", "tensor") if row[c] != old[c]]
        fixed = ("indirect", "undecided", "local")
        lines += [f"{name}: {c} {old[c]} -> {row[c]}" for c in fixed if row[c] > old[c]]
        longer = ("instructions", "moves", "branches", "cycles")
        lines += [f"{name}: {c} {old[c]} -> {row[c]}" for c in longer if row[c] > 1.02 * old[c] + 2]
        if row["noise side by side"] < old["noise side by side"]:
            lines.append(f"{name}: noise side by side {old['noise side by side']} -> {row['noise side by side']}")
        lines += [f"{name}: {what}" for what in _beyond_limits(row)]
    return lines


def _beyond_limits(row: dict) -> list[str]:
    """Return what of a row is beyond the device, or beyond what its kind of kernel may take."""
    lines = [f"{row['shared']} bytes of shared memory of {SHARED}"] if row["shared"] > SHARED else []
    if row["special"] and row["noise side by side"] < 8:
        lines.append(f"a branch after {row['noise side by side']} elements of noise")
    for prefix, most in LIMITS.items():
        if not row["kernel"].startswith(prefix):
            continue
        if row["network"].endswith("L=3") and row["instructions"] > most[row["width"]]:
            lines.append(f"{row['instructions']} instructions of {most[row['width']]}")
        if row["network"].endswith("L=3") and row["moves"] > MOST_MOVES:
            lines.append(f"{row['moves']} moves of {MOST_MOVES}")
        if row["indirect"]:
            lines.append(f"{row['indirect']} indirect branches")
    return lines
