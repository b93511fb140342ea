"""Mistakes planted in the CUDA kernels: the emulator's comparison with the definition has to catch every one."""

import ctypes
import shutil

import pytest
from emulator import build as builder
from emulator import test_density_mlp as check

pytestmark = pytest.mark.slow
PADDED = (50, 13, 2, 63, 5, 1, 1, 1, "diagonal")
NARROW = (64, 13, 2, 63, 5, 1, 1, 1, "diagonal")
STREAMED = (256, 64, 3, 63, 5, 1, 1, 1, "diagonal")
MISTAKES = {
    "wrong swizzle": ("sm80_density_mlp.cu", "(row % 8)", "(row % 4)", check.AMPERE, NARROW),
    "missing wait": ("sm90_density_mlp.cu", "ptx::wgmma_wait<0>();", "", check.HOPPER, NARROW),
    "unmasked padding": ("common/row_machine.cuh", "return !Padded ||", "return true ||", check.HOPPER, PADDED),
    "wrong fragment map": (
        "common/fragment.cuh", "(i >> 1) * 4 + row * 2", "(i >> 1) * 2 + row * 4", check.HOPPER, NARROW,
    ),
    "off-by-one draw": ("common/noise.cuh", "points + row * D", "points + row / 2 * D", check.HOPPER, NARROW),
    "stale weights": (
        "common/ring.cuh", "if (!resident) ptx::mbarrier_wait(", "if (false) ptx::mbarrier_wait(",
        check.HOPPER, STREAMED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_caught(name, tmp_path, monkeypatch):
    file, right, wrong, device, shape = MISTAKES[name]
    folder = tmp_path / "csrc"
    shutil.copytree(builder.CSRC, folder)
    text = (folder / file).read_text()
    assert right in text
    (folder / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(builder, "CSRC", folder)
    monkeypatch.setattr(builder, "INCLUDES", [*builder.INCLUDES[:2], "-I", str(folder)])
    monkeypatch.setattr(builder, "cache_folder", lambda: tmp_path / "cache")
    names = ("sm80_density_mlp.cu", "sm90_density_mlp.cu", "density_mlp.cpp")
    library = builder.build([*(folder / n for n in names), check.HERE / "density_mlp.cpp"])
    library.launch.restype = ctypes.c_char_p
    try:
        found = check.difference(library, device, *shape)
    except AssertionError:  # the emulator saw a rule of the hardware broken
        return
    assert not found < check.TOLERANCE  # NaN counts as caught
