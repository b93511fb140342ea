"""The table of docs/kernels.md that says which network which kernel takes is what the predicates of today say."""

import kernel_cover
import pytest
from emulator import build as builder
from emulator.comparison import HOPPER, Module, load

pytestmark = pytest.mark.slow


def test_the_page_says_what_the_kernels_cover():
    compiled = Module(load(builder.CSRC, "sm90_density_mlp"), HOPPER)
    found = kernel_cover.table(compiled)
    assert kernel_cover.parts(kernel_cover.PAGE.read_text())[1] == found, "python benchmarks/kernel_cover.py --write"
    rows = [line.split(" | ") for line in found.splitlines() if line.startswith("| ")][2:]
    # Whatever is not wider than 512 has a kernel on every device: Triton's.
    assert all(("no (" in cell) == row[1].startswith("1,024, ") for row in rows for cell in row[2:5])
    assert sum("no (" in cell for row in rows for cell in row[2:5]) == 9
