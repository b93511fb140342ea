"""What docs/kernels.md says of which kernel takes which network, and of what none takes, is what the code says."""

import kernel_cover
import pytest
import wide_prediction
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


def test_the_page_says_what_is_predicted_of_wide_networks():
    page, (times, rate) = " ".join(kernel_cover.PAGE.read_text().split()), wide_prediction.measured()
    *known, last = times
    fitted = wide_prediction.compiled(known, [times[w] for w in known], rate, last)
    assert f"{fitted:.1f} ms at width {last}, of three narrower ones, where {times[last]} were" in page
    assert abs(fitted / times[last] - 1) < 0.05  # else the line would be no reason for a prediction
    peer = wide_prediction.compiled(list(times), list(times.values()), rate, 1024)
    assert f"in a CUDA graph {peer:.0f} ms" in page
    cluster, panels = wide_prediction.KERNELS
    for kernel, width in ((cluster, 1024), (panels, 1024), (panels, 512)):
        low, high = wide_prediction.span(kernel, width)
        assert f"would take {low:.0f} to {high:.0f} ms" in page, (kernel.name, width)
