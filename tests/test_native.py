"""The module of the CUDA kernels, where the installed package has it: it answers on any machine, and runs on a GPU."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from steps import PYTHON

import fastscore
from fastscore.ops import select

MODULE = select.native()


@pytest.fixture
def native():
    if isinstance(MODULE, str):
        assert os.environ.get("FASTSCORE_REQUIRE_CUDA") != "1", f"fastscore._C is {MODULE}"
        pytest.skip(f"fastscore._C is {MODULE}")
    return MODULE


def gpu(native):
    return native.why_not(0) is None


def test_the_package_under_test_is_the_installed_one(native):
    if os.environ.get("FASTSCORE_REQUIRE_CUDA") != "1":
        pytest.skip("an editable install leaves the package in its folder")
    for module in (fastscore, native):
        assert Path(module.__file__).is_relative_to(sys.prefix)


def test_it_tells_how_it_was_built(native):
    about = native.build_info()
    assert about.keys() == {"architectures", "toolkit", "nvcc", "C++ compiler"}
    assert {"80-real", "90a-real", "90-virtual"} <= set(about["architectures"].split())
    assert about["toolkit"] == "CUDA " + ".".join(about["nvcc"].split(".")[:2])


def test_it_tells_what_can_run(native):
    found = native.runtime()
    assert all(isinstance(text, str) and text for pair in found.items() for text in pair)
    if gpu(native):
        assert ": can run, with " in found["cuda:0"]
    else:
        assert found.get("kernels", found.get("cuda:0", "")).endswith(f"cannot run: {native.why_not(0)}")
    assert native.why_not(99)


def test_a_machine_without_a_driver(native):
    if native.runtime()["driver"] != "none":
        pytest.skip("there is a driver")
    assert native.why_not(0) == "no NVIDIA driver is installed"
    with pytest.raises(RuntimeError, match=r"^cudaGetDevice failed: .*\(cudaErrorInsufficientDriver\)$"):
        native.density_mlp(64, 16, 2, [0] * 9, [0] * 6, [0] * 8, b"", 0, 0)


def test_arguments_of_a_wrong_length_are_refused(native):
    if not gpu(native):
        pytest.skip(native.why_not(0))
    message = r"^density_mlp takes 9 addresses, 6 sizes and 8 operands, got 8, 6 and 8$"
    with pytest.raises(RuntimeError, match=message):
        native.density_mlp(64, 16, 2, [0] * 8, [0] * 6, [0] * 8, b"", 0, 0)
    with pytest.raises(RuntimeError, match=r"^cudaSetDevice\(99\) failed: .*\(cudaErrorInvalidDevice\)$"):
        native.density_mlp(64, 16, 2, [0] * 9, [0] * 6, [0] * 8, b"", 99, 0)


LOAD = """
import sys, time
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
start = time.perf_counter()
loader = ExtensionFileLoader("_C", sys.argv[1])
module = module_from_spec(spec_from_loader("_C", loader))
loader.exec_module(module)
seconds = time.perf_counter() - start
"""


def load(native, then, **env):
    """Load the module alone in another process, and return what a line of code prints there."""
    command = [*PYTHON, "-c", LOAD + then, native.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | env).stdout.strip()


def test_importing_it_is_quick_and_asks_no_driver(native):
    maps = "open('/proc/self/maps').read()"
    seconds, *loaded = load(native, f"print(seconds, 'torch' in sys.modules, 'libcuda.so' in {maps})").split()
    assert float(seconds) < 0.5
    assert loaded == ["False", "False"]


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler to make a driver's stand-in with")
@pytest.mark.parametrize(
    ("version", "initialized", "reason"),
    [
        (12040, 0, "the kernels need a driver of CUDA 13.0 (580 or newer), found one of CUDA 12.4; update it"),
        (13000, 100, "no CUDA-capable device is detected"),
    ],
)
def test_the_reasons_of_a_driver_that_cannot_run_them(native, tmp_path, version, initialized, reason):
    code = f"int cuInit(unsigned flags) {{ return {initialized}; }}"
    code += f"int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}"
    (tmp_path / "driver.c").write_text(code)
    library = tmp_path / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    assert load(native, "print(module.why_not(0))", LD_LIBRARY_PATH=str(tmp_path)).startswith(reason)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda:1", torch.float32, "no driver for GPU 1"),
        ("cuda:0", torch.float32, None),
        ("cuda:0", torch.float64, "its kernels sum in float32, got torch.float64"),
        ("cpu", torch.float32, "needs tensors on a CUDA device, got cpu"),
    ],
)
def test_the_choice_passes_the_reason_on(monkeypatch, device, dtype, reason):
    kernels = types.SimpleNamespace(why_not=lambda index: f"no driver for GPU {index}" if index else None)
    monkeypatch.setattr(select, "native", lambda: kernels)
    monkeypatch.setattr(select, "triton_version", lambda: "3.9.0")
    assert select._cuda_why_not(torch.device(device), dtype) == reason


def test_the_choice_says_how_to_get_the_module(monkeypatch):
    monkeypatch.setattr(select, "native", lambda: select.PURE_WHEEL)
    reason = select._cuda_why_not(torch.device("cuda:0"), torch.float32)
    assert reason.startswith("fastscore._C is absent: this wheel is pure Python; ")
    with pytest.raises(ValueError, match=r"cuda: fastscore\._C is absent"):
        select.select(torch.device("cuda:0"), torch.float32, "cuda")
