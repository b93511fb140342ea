"""`make gpu-check` without a GPU: every line of it runs, in Triton's interpreter, and records nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


def gpu_check(*options):
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "gpu_check.py"), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


def test_rehearsal(tmp_path):
    results = ROOT / "benchmarks" / "results"
    before = {path: path.read_bytes() for path in results.iterdir()}
    done = gpu_check("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for step in ("machine", "correctness", "measurements"):
        assert f"== {step}: passed" in done.stdout
    for table in ("ceilings", "kernels", "precisions", "gradient", "sweep", "thin"):
        assert f" {table} " in done.stdout
    assert {path: path.read_bytes() for path in results.iterdir()} == before


def test_without_a_gpu_it_says_so():
    if os.path.exists("/dev/nvidia0"):
        pytest.skip("there is a GPU")
    done = gpu_check()
    assert done.returncode == 1
    assert "no CUDA device: see --rehearse" in done.stderr
