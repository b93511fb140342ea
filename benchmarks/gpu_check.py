"""Check everything that runs on a GPU in under five minutes: every failure is listed with its first line.

    make gpu-check                              on a machine with a GPU
    make gpu-check OPTIONS="--only graph,kernels --seconds 100"
    python benchmarks/gpu_check.py --rehearse   every line on a CPU, in Triton's interpreter

1. Machine, versions, what each backend says.
2. Every kernel of `make gpu-bench` launched once and compared with float64: which run at all? They are compiled by
   parallel processes.
3. The tests of the device, outputs filled with NaN beforehand, spread over processes where pytest-xdist is there.
4. The compiled kernels under compute-sanitizer, where there is one: memcheck and racecheck.

Each is a step with its own time limit (`steps.py`), ordered by what it tells. Tracebacks of failed tests go to
gpu-check-tracebacks.txt beside the log.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gpu_job
from steps import PYTHON, Step, program

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
# Small launches of every family: the sanitizer makes a kernel a hundred times slower.
SANITIZED = [
    f"tests/test_cuda_kernels.py::test_{name}_repeat_to_the_bit_and_in_a_graph" for name in ("launches", "steps")
]
MOST_PROCESSES = 8  # each holds half a gigabyte of the GPU for its context


def pytest_step(name: str, seconds: float, *chosen: str, spread: bool = True, under: tuple[str, ...] = ()) -> Step:
    """Return the step of some tests, spread over processes where pytest-xdist is there, or run `under` a program."""
    processes = min(MOST_PROCESSES, os.cpu_count() or 1) if spread and find_spec("xdist") else 1
    options = ["-q", "-rN", "--tb=no", "-p", "failures", "-p", "no:cacheprovider"]
    options += ["-n", str(processes), "--dist", "worksteal"] if processes > 1 else []
    run = program(*under, *PYTHON, "-m", "pytest", *options, *chosen)
    return Step(name, run, seconds, least=10, sums_up=True)


def sanitized(tool: str) -> Step:
    """Return the step that runs the compiled kernels under a tool of compute-sanitizer."""
    under = SANITIZER, "--tool", tool, "--error-exitcode", "1"
    why_not = "" if Path(SANITIZER).exists() else f"found no compute-sanitizer on PATH nor at {SANITIZER}"
    return replace(pytest_step(tool, 60, *SANITIZED, spread=False, under=under), least=20, why_not=why_not)


KERNELS = "thin_kernels", "summary", "loss_kernels", "fused_kernels", "gradient_kernel"


def make_steps() -> list[Step]:
    """Return all steps; what they share is imported here, once for all processes."""
    import gpu_calls
    import gpu_kernels
    from measuring import REHEARSING

    steps = [
        Step("info", program(*PYTHON, "-m", "fastscore", "info"), 40),
        Step("public calls", gpu_calls.public_calls, 90),
        Step("launches", gpu_kernels.first_launches, 90),
    ]
    if REHEARSING:  # the tests run the others anyway; one shows that a step can
        return [*steps, pytest_step("graph", 60, "tests/test_graph.py::test_new_parameters_count", spread=False)]
    return [
        *steps,
        pytest_step("graph", 60, "tests/test_graph.py"),
        pytest_step("compiled kernels", 60, "tests/test_native.py", "tests/test_cuda_kernels.py"),
        pytest_step("backends", 90, "tests/test_backends.py", "tests/test_parameter_gradients.py"),
        pytest_step("kernels", 120, *(f"tests/kernels/test_{name}.py" for name in KERNELS)),
        sanitized("memcheck"),
        sanitized("racecheck"),
        pytest_step("resources", 60, "tests/kernels/test_aot.py"),
    ]


if __name__ == "__main__":
    sys.exit(gpu_job.main("gpu-check", __doc__, make_steps))
