"""Measure everything on a GPU in under five minutes: kernels, whole calls, training, memory, each beside its peers.

    make gpu-bench                                             on a machine with a GPU
    make gpu-bench OPTIONS="--only 'kernel adaLN' --seconds 60"
    make gpu-bench OPTIONS="--only experiments --seconds 300"  what decides how kernels are built (gpu_experiments.py)
    python benchmarks/gpu_bench.py --rehearse                  every line on a CPU, on a few rows; no number counts

Each number is printed, and written to benchmarks/results as JSON with machine, versions and date, as soon as it is
measured. A row is a step in a process of its own (`steps.py`): it fails, crashes or hangs alone. Rows are ordered by
what they tell; what the time does not suffice for is skipped, and said to be.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import gpu_job
from steps import Step


def measured(row: Callable, *arguments: object) -> Callable[[], None]:
    """Return a step's function that measures a row; it fails if one of the row's numbers could not be measured."""

    def run() -> None:
        found = row(*arguments)
        if found.failed:
            sys.exit("; ".join(f"{column}: {why}" for column, why in found.failed.items()))

    return run


def make_steps() -> list[Step]:
    """Return all rows; the modules that measure them are imported here, once for all processes."""
    import gpu_calls as calls
    import gpu_experiments as experiments
    import gpu_kernels as kernels
    from gpu_cases import FIRST, LATER
    from measuring import REHEARSING

    wider = () if REHEARSING else (128, 256)

    def kernel(case) -> Step:
        return Step(f"kernel {case.name}", measured(kernels.kernel, case), 40, least=10)

    def estimate(width: int, dtype: str) -> Step:
        return Step(f"estimate H={width} {dtype}", measured(calls.estimate, width, dtype), 30, least=8)

    return [
        Step("ceilings", measured(kernels.ceilings), 20),
        Step("compiling", kernels.compiling, 90, least=15),
        estimate(64, "bf16"),
        kernel(FIRST[0]),
        Step("training step", measured(calls.training_step), 20),
        Step("gradient", measured(calls.gradient), 30),
        Step("gradient by name", measured(calls.gradient, "triton"), 60),
        *(kernel(case) for case in FIRST[1:]),
        *(estimate(width, "bf16") for width in wider),
        estimate(64, "float32"),
        Step("thin path", measured(calls.thin_path), 30),
        Step("captured", measured(calls.captured), 20),
        Step("fit", measured(calls.fit), 40, least=10),
        Step("ODE", measured(calls.ode), 30),
        *(Step(f"ODE beside peers d={d}", measured(calls.ode_beside_peers, d), 90, least=20) for d in (2, 16)),
        *(Step(f"memory {budget}", measured(calls.memory, budget), 20) for budget in ("256MB", "2048MB")),
        Step("gradient of x", measured(kernels.gradient_of_the_data, FIRST[0]), 30),
        *(
            Step(f"gradient of parameters {c.name}", measured(kernels.gradient_of_the_parameters, c), 60)
            for c in FIRST[:2]
        ),
        Step("precisions", measured(kernels.precisions, FIRST[0]), 30),
        *(Step(f"divisions {case.name}", measured(kernels.division, case), 20) for case in FIRST[:3]),
        *(kernel(case) for case in LATER),
        *(Step(f"configurations {c.name}", measured(kernels.configuration, c), 60, least=15) for c in FIRST[:2]),
        *experiments.make_steps(),
    ]


if __name__ == "__main__":
    sys.exit(gpu_job.main("gpu-bench", __doc__, make_steps))
