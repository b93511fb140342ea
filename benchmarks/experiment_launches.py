"""Experiments with the package's own kernels: what a launch may choose, one choice after another.

Every launch is compared with float64 before it is timed. A ring's length, and whether keys and x stay in shared memory,
follow from how much of it a block may take: `limit_where` finds the limit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import torch
from experiment_device import limits, micro, module, steps_of, stream
from experiment_micro import TABLE
from gpu_cases import DRAWS, SAMPLES, Case, Problem
from measuring import DEVICE, REHEARSING, Row, below, graphed, milliseconds, synchronize

from fastscore.ops import cuda
from fastscore.ops.cuda import Config
from fastscore.ops.cuda_steps import PackedSteps

LAUNCHES = 10
DEPTH = 1 if REHEARSING else 3
ADALN = {width: Case("adaLN", width, DEPTH) for width in (64, 128, 256, 512)}
PLAIN = {width: Case("plain", width, 3) for width in (128, 256)}
FEWEST = 4  # stages of a ring

Kernel = cuda.Packed | PackedSteps  # what a launch reads, and which kernel reads it


class Launches:
    """A case packed for the compiled kernels, and rows of its launches."""

    def __init__(self, experiment: str, case: Case):
        self.experiment, self.case, self.problem = experiment, case, Problem(case)
        self.half = self.problem.bound(torch.bfloat16)
        steps = steps_of(self.half, self.problem.x.shape[1], self.problem.gaussian)
        self.why_not = steps if isinstance(steps, str) else None
        self.packed = self.problem.packed_as(self.half, steps)
        self.first: dict[int, torch.Tensor] = {}  # f of the first launch, by what was packed for it

    def by_instructions(self) -> Kernel:
        """Return the same for the kernels that interpret instructions."""
        return self.problem.packed(self.half, by_instructions=True)

    def launch(
        self, f: torch.Tensor, config: Config | None = None, packed: Kernel | None = None, by: object = None
    ) -> torch.Tensor:
        """Launch once, by `fastscore._C` or what stands in for it; return f, which is written."""
        cuda.launch(by or module(), packed or self.packed, f, 0, stream(), config or Config())  # pyright: ignore
        return f

    def empty(self) -> torch.Tensor:
        """Return an f that shows what no thread has written."""
        return torch.full((SAMPLES, DRAWS), float("nan"), device=DEVICE)

    def row(self, variant: str, config: Config | None = None, packed: Kernel | None = None, by: object = None) -> Row:
        """Launch once, compare, and launch again to take the time. No choice of a launch changes a bit of f."""
        f = self.empty()

        def error() -> float:
            found = self.error_of(self.launch(f, config, packed, by))
            if not f.equal(self.first.setdefault(id(packed), f.clone())):
                raise ValueError("other numbers than in the first launch")
            return found

        return self.timed(variant, error, lambda: self.launch(f, config, packed, by))

    def by_op(self, backend: str, variant: str) -> Row:
        """The same of the whole op in a CUDA graph."""

        def run() -> torch.Tensor:
            return self.problem.by_op(self.half, backend)

        return self.timed(variant, lambda: self.error_of(run()), run, graphed)

    def error_of(self, f: torch.Tensor) -> float:
        """Return the relative error of f; raise ValueError if it is more than bfloat16's."""
        synchronize()
        return below(self.problem.error_of(f), self.case.tolerance, "the relative error")

    def timed(self, variant: str, error: Callable[[], float], run: Callable, as_timed: Callable | None = None) -> Row:
        """Return a row with an error and, where there is one, the median time of run(), or of what it is made."""
        names = {"experiment": self.experiment, "what": self.case.name, "variant": variant}
        row = Row(TABLE, f"{self.case.name}, {variant}", **names)
        print(row.part)
        row.measure("error", error)
        if row["error"] is not None:
            row.measure("ms", lambda: milliseconds(as_timed(run) if as_timed else run, LAUNCHES))
        if row.get("ms"):
            row["TFLOP/s"] = self.case.flops * SAMPLES * DRAWS / row["ms"] / 1e9
            row.tell()
        return row


def limit_where(shape: tuple, wanted: Callable[[dict], bool]) -> int | None:
    """Return the most shared memory with which a plan of steps is what is wanted, or None."""
    capability, most = limits()
    for limit in range(most, 0, -16):
        plan = module().steps_plan(*shape, capability, limit)
        if isinstance(plan, str):
            return None
        if wanted(plan):
            return limit
    return None


def described(plan: dict) -> str:
    """Return how a plan of steps divides shared memory."""
    weights = "all weights" if plan["stages"] >= plan["tiles"] else f"a ring of {plan['stages']} stages"
    return f"{weights}{', keys and x' if plan['kept'] else ''} in shared memory"


def divisions(launches: Launches) -> Iterator[Row]:
    """Every division of shared memory that a limit leads to, from the chosen one on."""
    shape, met = launches.packed.shape, set()

    def new(plan: dict) -> bool:
        return plan["stages"] >= min(FEWEST, plan["tiles"]) and described(plan) not in met

    while (limit := limit_where(shape, new)) is not None:
        plan = described(module().steps_plan(*shape, limits()[0], limit))
        met.add(plan)
        yield launches.row(plan, Config(shared_limit=limit))


class Warpgroups:
    """Stands in for `fastscore._C` at width 64, with so many warpgroups in place of three (benchmarks/micro)."""

    def __init__(self, count: int):
        self.count = count

    def steps(
        self, hidden, data, padded, linears, record, pointers, sizes, columns, steps, device, stream, *config
    ) -> None:
        """Launch; `config` is not for these kernels."""
        if hidden != 64 or padded:
            raise ValueError(f"the micro-kernel runs width 64 without padding, got {hidden}, padded: {padded}")
        numbers = (ctypes.c_int32 * 3)(*sizes, record), (ctypes.c_int32 * 4)(*columns)
        addresses = (ctypes.c_uint64 * 5)(*pointers)
        function = micro().micro_steps_64
        said = function(self.count, data, linears, addresses, *numbers, steps, len(steps), stream)
        if said:
            raise RuntimeError(said.decode())


def warpgroups() -> Iterator[Row]:
    """E4: width 64 with two and four warpgroups; the package's kernel has three."""
    launches = Launches("E4", ADALN[64])
    for count in (2, 4):
        yield launches.row(f"{count} warpgroups", by=Warpgroups(count))


def whole_ops() -> Iterator[Row]:
    """E0: a launch alone, and the whole op, which packs before, as a CUDA graph."""
    for width in (64,) if REHEARSING else (64, 128, 256):
        launches = Launches("E0", ADALN[width])
        yield launches.row("launch alone")
        backend = "triton" if REHEARSING else "cuda"
        yield launches.by_op(backend, "whole op in its graph")


def interpreted() -> Iterator[Row]:
    """E1: width 512 by instructions, in clusters, and with its rows split."""
    launches = Launches("E1", ADALN[512])
    packed = launches.by_instructions()
    for cluster in (1, 2, 4):
        yield launches.row(f"by instructions, clusters of {cluster}", Config(cluster), packed)
    for splits in range(1, 9):
        yield launches.row(f"by instructions, clusters of 2, {splits} splits", Config(2, splits), packed)


def in_triton() -> Iterator[Row]:
    """E1: Triton's kernels with the splits that they choose."""
    for case in (ADALN[64],) if REHEARSING else (ADALN[64], ADALN[128], PLAIN[128]):
        yield Launches("E1", case).by_op("triton", "Triton")


def choices(experiment: str, *cases: Case, clusters: tuple[int, ...] = ()) -> Iterator[Row]:
    """E4, E5 and E6: a network as it is launched, in clusters, and, where it runs as steps, with every division of
    shared memory and beside the kernel that interprets instructions."""
    for case in cases:
        launches = Launches(experiment, case)
        yield launches.row("chosen")
        for cluster in clusters:
            yield launches.row(f"clusters of {cluster}", Config(cluster))
        if launches.why_not is None:
            yield from divisions(launches)
            yield launches.row("by instructions", packed=launches.by_instructions())
        else:
            print(f"{case.name}: all by instructions, since {launches.why_not}")
