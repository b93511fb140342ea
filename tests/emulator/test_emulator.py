"""The emulator against numpy, family by family of instructions, and that it reports what breaks their rules."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import exact_normal
from emulator.build import ADVERSARIAL, CSRC, IN_ORDER, RANDOM, build

KERNELS = sorted((Path(__file__).parent / "kernels").glob("*.cu"))
SCHEDULES = [(0, IN_ORDER), (1, RANDOM), (2, RANDOM), (3, ADVERSARIAL), (4, ADVERSARIAL)]
LAUNCH_FAILURE, INVALID_CONFIGURATION = 719, 9

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator is compiled with g++")


@pytest.fixture(scope="module")
def lib():
    return build(KERNELS)


def aligned(values):
    """A copy at a multiple of 16 bytes, as allocations of the GPU are."""
    values = np.ascontiguousarray(values)
    memory = np.zeros(values.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    copy = memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


def bf16(values):
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def floats(halves):
    return (halves.astype(np.uint32) << 16).view(np.float32)


def image(matrix):
    """Bytes of shared memory: blocks of 64 columns, in each the rows of 128 bytes, with the 128-byte swizzle."""
    rows, columns = matrix.shape
    row, column = np.mgrid[:rows, :columns]
    address = column // 64 * rows * 128 + row * 128 + column % 64 * 2
    address ^= (address >> 7 & 7) << 4
    out = np.zeros(matrix.size, np.uint16)
    out[address // 2] = matrix
    return aligned(out)


def random_bf16(*shape, seed=0):
    return bf16(np.random.default_rng(seed).standard_normal(shape))


def close_to_product(out, a, b):
    return np.allclose(out, floats(a) @ floats(b).T, rtol=1e-5, atol=1e-4)


def wgmma(lib, n, in_registers=True, planted=0):
    a, b, out = random_bf16(64, 192, seed=1), random_bf16(n, 192, seed=2), np.zeros((64, n), np.float32)
    a_image, b_image = image(a), image(b)
    arrays = [pointer(array) for array in (a, a_image, b_image, out)]
    status = lib.run_wgmma(n, ctypes.c_bool(in_registers), *arrays, planted)
    return status, out, close_to_product(out, a, b)


def mma(lib, planted=0):
    a, b, out = random_bf16(64, 64, seed=1), random_bf16(64, 64, seed=2), np.zeros((64, 64), np.float32)
    b_image = image(b)
    status = lib.run_mma(pointer(a), pointer(b_image), pointer(out), planted)
    return status, out, close_to_product(out, a, b)


def proxy(lib, planted=0):
    a, b, out = random_bf16(64, 64, seed=1), random_bf16(64, 64, seed=2), np.zeros((64, 64), np.float32)
    a_aligned, b_aligned = aligned(a), aligned(b)
    status = lib.run_proxy(pointer(a_aligned), pointer(b_aligned), pointer(out), planted)
    return status, out, close_to_product(out, a, b)


def ring(lib, cluster=1, planted=0, count=11, blocks=4):
    tiles = aligned(np.random.default_rng(3).standard_normal((count, 128)).astype(np.float32))
    out = np.zeros((blocks, 128), np.float32)
    status = lib.run_ring(cluster, pointer(tiles), count, pointer(out), blocks, planted)
    return status, out, np.allclose(out, tiles.sum(0), atol=1e-5)


def barriers(lib, planted=0):
    values, out = np.random.default_rng(4).standard_normal(128).astype(np.float32), np.zeros(128, np.float32)
    status = lib.run_barriers(pointer(values), pointer(out), planted)
    expected = values[np.arange(128) ^ 32] + values.reshape(4, 32).sum(1).repeat(32)
    return status, out, np.allclose(out, expected, atol=1e-5)


def remote(lib, planted=0):
    values, out = np.random.default_rng(6).standard_normal(256).astype(np.float32), np.zeros(256, np.float32)
    status = lib.run_remote(pointer(values), pointer(out), planted)
    return status, out, np.allclose(out, values + 4 * values.reshape(2, 128)[::-1].reshape(-1), atol=1e-5)


@pytest.mark.parametrize(("seed", "schedule"), SCHEDULES)
@pytest.mark.parametrize("in_registers", [True, False])
@pytest.mark.parametrize("n", [16, 32, 64, 128, 256])
def test_wgmma(lib, n, in_registers, seed, schedule):
    lib.emulator_seed(seed, schedule)
    status, _, right = wgmma(lib, n, in_registers)
    assert (status, lib.emulator_error()) == (0, b"")
    assert right


@pytest.mark.parametrize(("seed", "schedule"), SCHEDULES)
@pytest.mark.parametrize("case", [mma, proxy, barriers, ring, remote])
def test_right_kernels(lib, case, seed, schedule):
    lib.emulator_seed(seed, schedule)
    status, _, right = case(lib)
    assert (status, lib.emulator_error()) == (0, b"")
    assert right


@pytest.mark.parametrize("schedule", [RANDOM, ADVERSARIAL])
@pytest.mark.parametrize("seed", range(10))
def test_multicast_over_a_cluster(lib, seed, schedule):
    lib.emulator_seed(seed, schedule)
    status, _, right = ring(lib, cluster=2)
    assert (status, lib.emulator_error()) == (0, b"")
    assert right


def test_conversions(lib):
    rng = np.random.default_rng(5)
    some = np.float32([0, -0.0, 1, 65504, 65519.996, 65520, 1e30, 6e-8, 2.9e-8, 5.96e-8, 6.1e-5, -6.0e-5, np.inf])
    # Ties of both formats, and numbers of every size a float16 has.
    ties = np.float32([1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-25, 3 * 2.0**-25])
    wide = rng.standard_normal(1024 - len(some) - len(ties)) * np.exp2(
        rng.uniform(-28, 18, 1024 - len(some) - len(ties))
    )
    x = np.concatenate([some, ties, wide]).astype(np.float32)
    packed, unpacked = np.zeros((1024, 2), np.uint32), np.zeros((1024, 2), np.float32)
    functions = np.zeros((1024, 6), np.float32)
    assert lib.run_convert(8, pointer(x), pointer(packed), pointer(unpacked), pointer(functions)) == 0
    pairs = np.stack([x, x[::-1]], 1)
    with np.errstate(all="ignore"):
        half = pairs.astype(np.float16)
        expected = [np.tanh(x), np.exp2(x), np.log2(x), np.sqrt(x), 1 / np.sqrt(x), 1 / x]
    assert np.array_equal(packed[:, 0], bf16(pairs).view(np.uint32)[:, 0])
    assert np.array_equal(packed[:, 1], half.view(np.uint32)[:, 0])
    assert np.array_equal(unpacked, half.astype(np.float32))
    np.testing.assert_allclose(functions, np.stack(expected, 1), rtol=1e-5)


def test_noise(lib):
    samples, rows, d = 64, 32, 16
    rng = np.random.default_rng(6)
    keys = aligned(rng.integers(0, 2**32, (samples, 2, d), np.uint32))
    points = aligned(rng.integers(0, 2**32, (rows, d), np.uint32))
    keys[:, :, -1] = points[:, -1] = 0  # a dimension beyond the data
    keys[0], points[:4] = [[0], [1]], np.array([[0], [2**31 - 1], [2**31], [2**32 - 1]])  # both ends and the middle
    eps = np.zeros((samples, rows, d), np.float32)
    assert lib.run_noise(samples, rows, pointer(keys), pointer(points), pointer(eps)) == 0
    words = (points[None] ^ keys[:, None, 0]) * keys[:, None, 1]
    exact = exact_normal(torch.from_numpy(words.view(np.int32))).numpy() * np.where(np.arange(rows) % 2, -1, 1)[:, None]
    np.testing.assert_allclose(eps, exact, rtol=6e-7, atol=0)
    assert np.abs(eps[1:, :, -1]).max() < 3e-10


# Mistake, kernel, what the error says. The order of the enumerations in kernels/*.cu.
VIOLATIONS = {
    "no commit": (wgmma, dict(n=64, planted=3), "wgmma_wait before wgmma_commit"),
    "no fence": (wgmma, dict(n=64, planted=4), "wgmma without wgmma_fence"),
    "other descriptor": (wgmma, dict(n=64, planted=5), "another thread of the warpgroup"),
    "misaligned row": (mma, dict(planted=2), "thread 70 (warp 2, lane 6): ldmatrix_x4 at 0x"),
    "divergent mma": (mma, dict(planted=3), "other lanes of the warp are in"),
    "no proxy fence": (proxy, dict(planted=1), "without fence_proxy_async"),
    "store after the proxy fence": (proxy, dict(planted=2), "which thread 5 wrote without fence_proxy_async"),
    "no release": (ring, dict(planted=3), "lanes in mbarrier_wait(0x"),
    "over-arrive": (ring, dict(planted=4), "already has its 1 arrivals"),
    "out of bounds": (ring, dict(planted=5), "is outside the 1584 bytes of shared memory"),
    "misaligned load": (ring, dict(planted=6), "load_shared at 0x"),
    "misaligned copy": (ring, dict(planted=7), "is not aligned to 16 bytes"),
    "copy over a barrier": (ring, dict(planted=8), "overwrites the mbarrier at"),
    "no initialisation": (ring, dict(planted=9), "where no mbarrier was initialised"),
    "setmaxnreg by three warps": (ring, dict(planted=10), "lanes in registers_decrease(0x18"),
    "copy of what is not fenced": (remote, dict(planted=2), "bulk_copy_remote reads 0x"),
    "no such CTA": (remote, dict(planted=4), "no CTA 2 in a cluster of 2"),
    "other count": (barriers, dict(planted=2), "threads where others gave"),
    "one warp missing": (barriers, dict(planted=3), "32 lanes in named_barrier_sync(0x1, 64)"),
    "divergent shuffle": (barriers, dict(planted=4), "other lanes of the warp are in"),
}


@pytest.mark.parametrize("schedule", [IN_ORDER, RANDOM, ADVERSARIAL])
@pytest.mark.parametrize("mistake", VIOLATIONS)
def test_violations_are_reported(lib, mistake, schedule):
    case, arguments, message = VIOLATIONS[mistake]
    lib.emulator_seed(1, schedule)
    status, _, _ = case(lib, **arguments)
    error = lib.emulator_error().decode()
    assert status == LAUNCH_FAILURE
    assert message in error, error
    assert error.startswith(f"{case.__name__}_kernel"), error


@pytest.mark.parametrize(
    ("case", "arguments"),
    [
        (wgmma, dict(n=64, planted=1)),  # no wait for the copy
        (wgmma, dict(n=64, planted=2)),  # no wait for the product
        (mma, dict(planted=1)),  # no wait for cp.async
        (barriers, dict(planted=1)),  # no barrier
        (remote, dict(planted=1)),  # no wait for the partner's
        (ring, dict(planted=1, count=3)),  # no wait for the copy; no stage is used twice
    ],
)
def test_a_missing_wait_gives_nan(lib, case, arguments):
    lib.emulator_seed(0, IN_ORDER)
    _, out, _ = case(lib, **arguments)
    assert np.isnan(out).any()


@pytest.mark.parametrize(
    ("mistake", "cluster"),
    [(2, 1), (11, 2), (12, 2)],  # no wait for an empty stage, no last cluster_sync, no first one
)
def test_races_are_found_by_some_schedule(lib, mistake, cluster):
    wrong = 0
    for seed in range(20):
        lib.emulator_seed(seed, ADVERSARIAL)
        status, _, right = ring(lib, cluster, mistake)
        wrong += status != 0 or not right
    assert wrong > 0


def test_a_source_that_is_overwritten_is_found(lib):
    found = 0
    for seed in range(5):  # the adversary lets copies wait
        lib.emulator_seed(seed, ADVERSARIAL)
        status, _, right = remote(lib, 3)
        found += status != 0 or not right
    assert found > 0


def test_configurations_are_checked(lib):
    values, out = np.zeros(128, np.float32), np.zeros(128, np.float32)

    def launch(threads, shared_bytes):
        return lib.run_barriers_configured(threads, shared_bytes, pointer(values), pointer(out))

    assert launch(128, 512) == 0
    assert launch(100, 512) == INVALID_CONFIGURATION
    assert b"whole warps" in lib.emulator_error()
    assert launch(128, 60 << 10) == INVALID_CONFIGURATION  # the attribute was set to less, or not at all
    assert b"cudaFuncSetAttribute" in lib.emulator_error()
    assert launch(128, 228 << 10) == INVALID_CONFIGURATION
    assert ring(lib, cluster=2, blocks=3)[0] == INVALID_CONFIGURATION
    assert b"does not divide the grid" in lib.emulator_error()


def test_other_devices_lack_instructions(lib):
    lib.emulator_device(8, 0, 108)
    try:
        assert wgmma(lib, 64)[0] == LAUNCH_FAILURE
        assert b"needs compute capability 9" in lib.emulator_error()
        assert mma(lib)[0] == 0
    finally:
        lib.emulator_device(9, 0, 132)


def disassembler():
    """Cuobjdump of the toolkit, or the one that comes with Triton."""
    triton = importlib.util.find_spec("triton")
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(folder))


# Of every kernel, what the wrappers must become on an H100.
INSTRUCTIONS = {
    "wgmma": [*(f"HGMMA.64x{n}x16.F32.BF16" for n in (16, 32, 64, 128, 256)), "UBLKCP", "SYNCS", "WARPGROUP.ARRIVE"],
    "ring": [
        "UBLKCP.S.G.MULTICAST",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT",
        "USETMAXREG",
        "UCGABAR",
        "SYNCS.ARRIVE.TRANS64.RED",
        "LDS",
    ],
    "mma": ["LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "HMMA.16816.F32.BF16"],
    "proxy": ["STS.128", "FENCE.VIEW.ASYNC", "HGMMA.64x64x16.F32.BF16", "BAR.SYNC"],
    "remote": ["UBLKCP.S.S", "STAS.64", "SYNCS.PHASECHK.TRANS64.TRYWAIT"],
    "barriers": ["BAR.SYNC", "LDS", "STS", "SHFL.BFLY"],
    "convert": ["F2FP.BF16", "F2FP.F16", "MUFU.TANH", "MUFU.EX2", "MUFU.LG2", "MUFU.RSQ"],
    "noise": ["I2FP.F32.S32", "MUFU.LG2", "MUFU.SQRT"],
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_the_same_kernels_assemble(source, tmp_path):
    cubin = tmp_path / "kernel.cubin"
    arguments = ["-std=c++20", "-Xptxas", "-v", "-I", str(CSRC), "-cubin", "-o", str(cubin), str(source)]
    result = subprocess.run(["nvcc", "-arch=sm_90a", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"warning|\(C\d+\)", result.stderr), result.stderr
    assert not re.search(r"[1-9]\d* bytes (stack frame|spill)", result.stderr), result.stderr
    if tool := disassembler():
        sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        # Only cluster_sync throws away the L1 cache: mbarrier_wait is in the innermost loops.
        assert sass.count("CCTL.IVALL") <= sass.count("UCGABAR_WAIT")
        if source.stem == "noise":
            # Between the first element and the last there is no branch and no select: their chains run side by side.
            chains = sass[sass.index("I2FP") : sass.rindex("MUFU.SQRT")]
            assert not re.search(r"\b(BRA|FSEL|BSYNC|BSSY)\b", chains), chains
        missing = [instruction for instruction in INSTRUCTIONS[source.stem] if instruction not in sass]
        assert not missing, missing
    # An older architecture gets empty bodies where it lacks the instructions.
    result = subprocess.run(["nvcc", "-arch=sm_80", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
