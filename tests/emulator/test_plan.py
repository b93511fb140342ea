"""What the compiled kernels would be launched with fits every device: shared memory, and registers as compiled."""

import itertools
import json
from pathlib import Path

import pytest
from emulator import build as builder
from emulator.comparison import HOPPER, Module, load

from fastscore.ops.cuda import DATA, WIDTHS

pytestmark = pytest.mark.slow
RESOURCES = Path(__file__).parents[2] / "benchmarks" / "results" / "native_resources.json"
DEVICES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
LINEARS, VECTORS = (2, 3, 5, 8, 14, 26), (0, 1, 7, 15, 40)  # weights, and vectors of a row


@pytest.fixture(scope="module")
def plan():
    return Module(load(builder.CSRC, "sm90_density_mlp"), HOPPER).plan


def registers(hidden, data, hopper):
    """Return what the widest instance of a kernel takes a thread, as recorded of the compiled binary."""
    family = "wide" if hidden > 256 else f"<{hidden}, {data}>"
    found = [
        row["registers"]
        for row in json.loads(RESOURCES.read_text())["rows"]
        if family in row["kernel"] and row["kernel"].startswith("sm90_density" if hopper else "sm80_density")
    ]
    assert found, (hidden, data, hopper)
    return max(found)


def test_every_plan_fits_its_device(plan):
    largest, planned = {}, 0
    sizes = itertools.product(WIDTHS, DATA, LINEARS, VECTORS, DEVICES.items())
    for hidden, data, linears, vectors, (capability, limit) in sizes:
        if hidden == 512 and data != 128:
            continue  # `cuda.shape_of` pads dimensions to 128 there
        found = plan(hidden, data, linears, vectors * hidden + 8 * data, capability, limit)
        if isinstance(found, str):
            continue
        planned, shared, threads = planned + 1, found["shared_bytes"], found["threads"]
        assert shared <= limit, (hidden, data, linears, vectors, capability)
        assert threads * registers(hidden, data, capability == 90) <= 65_536
        largest[capability] = max(largest.get(capability, 0), shared / limit)
    # A grid that meets both answers, and a ring of weights, which takes all that is left.
    assert planned > 600
    assert largest[90] > 0.95
