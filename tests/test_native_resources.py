"""Gates without a GPU: nvcc compiles every CUDA kernel within its recorded resources."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")
import native_resources
import sass
import traced_kernels

pytestmark = pytest.mark.slow

RECORDED = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "native_resources.json").read_text())


def rows(found):
    return {(row["kernel"], row["architecture"]): row for row in found["rows"]}


@pytest.fixture(scope="module")
def measured():
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt, of binutils, is not there")
    with native_resources.library() as path:
        if path is None:
            assert os.environ.get("FASTSCORE_REQUIRE_CUDA") != "1", "the installed package has no CUDA kernels"
            pytest.skip("no CUDA kernels: neither installed nor in a wheel that FASTSCORE_WHEEL names")
        return native_resources.measure(path)


def test_names_are_those_of_kernels(measured):
    assert len(rows(measured)) == len(measured["rows"]), "two kernels bear one name"
    assert rows(measured).keys() == rows(RECORDED).keys(), "record them: benchmarks/native_resources.py says how"


def test_resources_are_the_recorded_ones(measured):
    if measured["nvcc"] != RECORDED["nvcc"]:
        pytest.skip(f"recorded with nvcc {RECORDED['nvcc']}, this wheel is of {measured['nvcc']}")
    assert exceeded(measured, RECORDED) == []


def test_a_row_takes_no_more_than_recorded(measured):
    if measured["nvcc"] != RECORDED["nvcc"]:
        pytest.skip(f"recorded with nvcc {RECORDED['nvcc']}, this wheel is of {measured['nvcc']}")
    assert len(measured["traces"]) == len(RECORDED["traces"]), "record them: benchmarks/native_resources.py says how"
    assert traced_kernels.exceeded(measured["traces"], RECORDED["traces"]) == []


def test_kernels_of_fused_steps_are_traced_and_hardly_spill(measured):
    traced = {row["kernel"].partition("<")[0] for row in measured["traces"]}
    for row in measured["rows"]:
        if row["kernel"].startswith(tuple(traced_kernels.LIMITS)) and row["architecture"] == "sm_90a":
            assert row["kernel"].partition("<")[0] in traced, f"{row['kernel']} has no row in traced_kernels.CASES"
            assert row["stack"] <= traced_kernels.MOST_STACK, row["kernel"]


def exceeded(found, recorded):
    """Return one line for every resource that is above its recorded value, or matrix instruction that is lost."""
    lines = []
    for key, old in rows(recorded).items():
        new = rows(found)[key]
        exact = [c for c in ("registers", "stack", "shared", "ldl", "stl") if new[c] > old[c]]
        longer = [c for c in ("instructions", "loop") if new[c] > 1.02 * old[c]]
        lost = [c for c in ("hgmma", "hmma") if bool(new[c]) != bool(old[c])]
        lines += [f"{' on '.join(key)}: {c} {old[c]} -> {new[c]}" for c in exact + longer + lost]
    return lines


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        ({}, []),
        ({"registers": 39, "instructions": 1020}, []),
        ({"registers": 41}, ["f on sm_80: registers 40 -> 41"]),
        ({"stack": 8, "ldl": 2}, ["f on sm_80: stack 0 -> 8", "f on sm_80: ldl 0 -> 2"]),
        ({"instructions": 1021}, ["f on sm_80: instructions 1000 -> 1021"]),
        ({"hmma": 0}, ["f on sm_80: hmma 16 -> 0"]),
    ],
)
def test_a_planted_change_is_reported(change, reported):
    row = dict.fromkeys(native_resources.COLUMNS, 0) | {"kernel": "f", "architecture": "sm_80", "registers": 40}
    row |= {"instructions": 1000, "hmma": 16}
    assert exceeded({"rows": [row | change]}, {"rows": [row]}) == reported


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("fastscore::(anonymous namespace)::copy_kernel(float*, long, float)", "copy_kernel"),
        ("void fastscore::mlp_kernel<64, (fastscore::Noise)1>(fastscore::Parameters)", "mlp_kernel<64, (Noise)1>"),
        ("void f<int (*)(int)>(int (*)(int))", "f<int (*)(int)>"),
    ],
)
def test_names_are_short(name, short):
    assert native_resources._short(name) == short


def test_instructions_are_counted(monkeypatch):
    usage = "arch = sm_90a\n Function k:\n  REG:24 STACK:16 SHARED:8 LOCAL:0\n"
    code = """arch = sm_90a
        Function : k
        /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x00000a0000017a02 */
        /*0010*/              @!P0 LDL R2, [R1] ;               /* 0x0000000001027983 */
        /*0020*/                   HGMMA.64x8x16.F32.BF16 R4, gdesc[UR4], R4 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   EXIT ;
        /*0050*/                   BRA 0x50;
        /*0060*/                   NOP;
"""
    monkeypatch.setattr(sass, "dump", lambda flag, path: usage if "usage" in flag else code)
    counts = {"hgmma": 1, "hmma": 0, "ldl": 1, "stl": 0, "instructions": 6, "loop": 3}
    assert sass.kernels(Path("x")) == {("sm_90a", "k"): {"registers": 24, "stack": 16, "shared": 8} | counts}


@pytest.mark.skipif(shutil.which("sh") is None, reason="there is no sh")
@pytest.mark.parametrize(
    ("says", "status", "expected"),
    [
        ("", 0, 0),
        ("ptxas info    : Used 168 registers, used 1 barriers", 0, 0),
        (
            "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to",
            0,
            1,
        ),
        (
            "ptxas info    : (C7518) Potential Performance Loss: wgmma.mma_async instructions are serialized due to",
            0,
            1,
        ),
        ("error: no such file", 2, 2),
    ],
)
def test_serialized_products_fail_the_build(says, status, expected):
    launcher = Path(__file__).parents[1] / "csrc" / "strict_nvcc.sh"
    command = ["sh", launcher, "sh", "-c", f"echo '{says}' >&2; exit {status}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == expected
    assert says in done.stderr
    assert ("error: matrix products are serialized" in done.stderr) == (expected == 1)
