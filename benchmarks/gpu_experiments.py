"""What decides how the kernels of Hopper are built: `make gpu-bench OPTIONS="--only experiments --seconds 300"`.

Each measures a choice that was made without a GPU: how many stages a ring has, how many blocks share it, where keys and
x lie, and what the tensor cores leave to all else. Each is a step with a time limit of its own, so one that fails stops
no other. Every launch is compared with float64 before it is timed. All rows go to one table, `experiments`.

What is compiled into a kernel is not varied, but for the warpgroups of width 64. So there is no width 256 with a saved
tile of float32 or without halves that overlap, and no kernel of steps with stages of other sizes. Nor does a kernel of
the package run in clusters of three, where a third of a stage is no multiple of 16 bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import experiment_counters as counters
import experiment_device as device
import experiment_launches as launches
import experiment_micro as micro
import torch
from experiment_launches import ADALN, PLAIN
from measuring import REHEARSING, Row
from steps import Step


@dataclass(frozen=True)
class Experiment:
    """A step of the experiments.

    Arguments:
        name: what `--only` calls it, behind "experiments".
        seconds: its time limit.
        rows: functions that measure row after row.
        decides: what its numbers are for.
    """

    name: str
    seconds: float
    rows: tuple[Callable[[], Iterable[Row]], ...]
    decides: str
    why_not: str = ""


def make_experiments() -> list[Experiment]:
    """Return all experiments in their order."""

    def choices(name: str, *cases, clusters: tuple[int, ...] = ()) -> Callable[[], Iterable[Row]]:
        return lambda: launches.choices(name, *cases, clusters=clusters)

    return [
        Experiment("E0 launch and clock", 25, (launches.whole_ops, micro.clocks), "what packing takes; the clock"),
        Experiment("E1 instructions", 20, (launches.interpreted,), "clusters and splits at width 512"),
        Experiment("E1 Triton", 40, (launches.in_triton,), "whether its splits leave waves unfilled"),
        Experiment("E2 fill", 25, (micro.fills,), "bytes a cycle that a ring can count on; the size of clusters"),
        Experiment("E3 products", 15, (micro.maths,), "the rate of the tensor cores that is left to a kernel"),
        Experiment(
            "E4 width 64", 20, (choices("E4", ADALN[64]), launches.warpgroups), "the place of keys and x; warpgroups"
        ),
        Experiment("E4 width 128", 25, (choices("E4", ADALN[128], PLAIN[128], clusters=(1, 2, 4)),), "ring, clusters"),
        Experiment("E5 width 256", 30, (choices("E5", ADALN[256], PLAIN[256], clusters=(1, 2, 4)),), "ring, clusters"),
        Experiment("E6 width 512", 30, (choices("E6", ADALN[512], clusters=(1, 2, 4)),), "clusters"),
        Experiment("E7 counters", 45, (counters.counted,), "what warps wait for", why_not=counters.why_not()),
    ]


# Seconds for nvcc, which compiles four small files where the library is not there yet; a rehearsal compiles the
# package's kernels too, for the emulated GPU.
PREPARATION = 120.0 if REHEARSING else 25.0


def measured(experiment: Experiment) -> Callable[[], None]:
    """Return a step's function; it fails if one of the rows' numbers could not be measured."""

    def run() -> None:
        print(f"decides: {experiment.decides}")
        with torch.no_grad():
            failed = [row for rows in experiment.rows for row in rows() if row.failed]
        if failed:
            sys.exit("; ".join(f"{row.part}, {column}: {why}" for row in failed for column, why in row.failed.items()))

    return run


def make_steps() -> list[Step]:
    """Return the steps of all experiments, which run where they are asked for."""
    return [
        Step("experiments, micro-kernels", device.prepare, PREPARATION, asked=True),
        *(
            Step(f"experiments {e.name}", measured(e), e.seconds, why_not=e.why_not, asked=True)
            for e in make_experiments()
        ),
    ]
