"""The whole GPU job in one command: check every kernel, then measure all of them.

    make gpu-check                              on a machine with a GPU
    python benchmarks/gpu_check.py --rehearse   every line of it on a CPU, in Triton's interpreter, timing nothing

1. Versions, device, driver, and what each backend says.
2. Correctness: tests/kernels, the compiled kernels' tests, tests/test_backends.py and tests/test_graph.py on the
   device, outputs filled with NaN beforehand. Nothing is timed unless all of it passes.
3. The compiled kernels under compute-sanitizer, where there is one: memcheck and racecheck.
4. benchmarks/bench_kernels.py: ceilings, the fused kernels beside eager and compiled PyTorch, precisions, sweeps over
   launches, the thin kernels around a convolutional network. Tables are printed, and written to benchmarks/results
   (or --out) as JSON with machine, versions and date.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMPILED = ("tests/test_native.py", "tests/test_cuda_kernels.py")
CHECKS = ("tests/kernels", *COMPILED, "tests/test_backends.py", "tests/test_graph.py")
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
# Small launches of every family: the sanitizer makes a kernel a hundred times slower.
SANITIZED = "tests/test_cuda_kernels.py::test_launches_repeat_to_the_bit_and_in_a_graph"


def run(title: str, *command: str, environment: dict, under: tuple[str, ...] = ()) -> None:
    """Run a step of Python, `under` another program; end the whole job with its exit code if it fails."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([*under, sys.executable, "-P", *command], cwd=ROOT, env=environment).returncode
    print(f"== {title}: {'passed' if code == 0 else f'FAILED with exit code {code}'} in "
          f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    if code:
        sys.exit(code)


def sanitize(environment: dict) -> None:
    """Run the compiled kernels under compute-sanitizer, or say that there is none."""
    if not Path(SANITIZER).exists():
        print(f"\n== compute-sanitizer: NOT RUN, found none on PATH nor at {SANITIZER}", flush=True)
        return
    for tool in ("memcheck", "racecheck"):
        under = SANITIZER, "--tool", tool, "--error-exitcode", "1"
        run(tool, "-m", "pytest", "-q", "-p", "no:cacheprovider", SANITIZED, environment=environment, under=under)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="run every line on a CPU and time nothing")
    parser.add_argument("--out", type=Path, help="also copy the result files here")
    options = parser.parse_args()
    rehearse = {"FASTSCORE_REHEARSE": "1", "TRITON_INTERPRET": "1"} if options.rehearse else {"TRITON_INTERPRET": "0"}
    environment = os.environ | rehearse
    if not options.rehearse:
        probe = "import sys, torch; sys.exit('no CUDA device: see --rehearse' if not torch.cuda.is_available() else 0)"
        run("a CUDA device", "-c", probe, environment=environment)
    run("machine", "-m", "fastscore", "info", environment=environment)
    checks = ("tests/test_graph.py",) if options.rehearse else CHECKS  # the tests run the others anyway
    run("correctness", "-m", "pytest", "-q", "-p", "no:cacheprovider", *checks, environment=environment)
    if not options.rehearse:
        sanitize(environment)
    bench = "-m", "pytest", "benchmarks/bench_kernels.py", "-q", "-s", "-p", "no:cacheprovider"
    run("measurements", *bench, environment=environment)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / "benchmarks" / "results").glob("*"):
            shutil.copy(path, options.out)


if __name__ == "__main__":
    main()
