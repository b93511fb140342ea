"""The whole GPU job in one command: check every kernel, then measure all of them.

    make gpu-check                              on a machine with a GPU
    python benchmarks/gpu_check.py --rehearse   every line of it on a CPU, in Triton's interpreter, timing nothing

1. Versions, device, driver, and what each backend says.
2. Correctness: tests/kernels, tests/test_backends.py and tests/test_graph.py on the device, outputs filled with NaN
   beforehand. Nothing is timed unless all of it passes.
3. benchmarks/bench_kernels.py: ceilings, the fused kernel beside eager and compiled PyTorch, precisions, a sweep over
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
CHECKS = ("tests/kernels", "tests/test_backends.py", "tests/test_graph.py")


def run(title: str, *command: str, environment: dict) -> None:
    """Run a step; end the whole job with its exit code if it fails."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, "-P", *command], cwd=ROOT, env=environment).returncode
    print(f"== {title}: {'passed' if code == 0 else f'FAILED with exit code {code}'} in "
          f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    if code:
        sys.exit(code)


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
    bench = "-m", "pytest", "benchmarks/bench_kernels.py", "-q", "-s", "-p", "no:cacheprovider"
    run("measurements", *bench, environment=environment)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for path in (ROOT / "benchmarks" / "results").glob("*"):
            shutil.copy(path, options.out)


if __name__ == "__main__":
    main()
