"""What is chosen for a network fits the device: by the formula, and by the compiled binary."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import fits
import random_networks
from fastscore.kernels import control, launch, occupancy, panels

from fastscore.ops import triton as backend
from fastscore.ops.task import Task

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def work(family=random_networks.adaln, width=256, depth=3, d=50, reference="diagonal", precision="bf16"):
    return random_networks.problem(family, width, depth, d, reference, precision).packed()[0]


def chosen(capability, **network):
    return launch.Config.from_heuristic(work(**network), launch.Device(capability, SHARED[capability]))


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("width", [16, 64, 128])
def test_layers_without_vectors_are_launched_as_those_with_biases(capability, width):
    for depth, precision in ((1, "bf16"), (2, "bf16"), (6, "bf16"), (3, "tf32")):
        network = {"width": width, "depth": depth, "precision": precision}
        found = chosen(capability, family=random_networks.bare, **network)
        assert found.shared_bytes(work(family=random_networks.bare, **network), capability) <= SHARED[capability]


@pytest.mark.slow
def test_what_is_chosen_for_random_networks_fits_as_compiled():
    # In another process: this one has Triton's interpreter in its place.
    script = [sys.executable, ROOT / "benchmarks" / "fits.py", "--json", "--count", "40"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert fits.exceeded(rows) == []
    shares = [row["shared"] / row["granted"] for row in rows if "shared" in row]
    assert len(shares) > 40
    assert max(shares) > 0.8  # a sample that never came near the limits would say nothing


@pytest.mark.parametrize(
    ("change", "reported"),
    [
        ({}, []),
        ({"shared": 101_377, "bound": 101_377}, ["seed 3, forward: 101377 bytes of 101376"]),
        ({"shared": 2048}, ["seed 3, forward: 2048 bytes, the bound is 1024"]),
        ({"registers": 65_537}, ["seed 3, forward: 65537 registers"]),
    ],
)
def test_a_planted_excess_is_reported(change, reported):
    row = {"seed": 3, "kernel": "forward", "granted": 101_376, "shared": 1024, "bound": 1024, "registers": 65_280}
    refused = {"seed": 4, "kernel": "forward", "refused": "no room"}
    assert fits.exceeded([row | change, refused]) == reported


@pytest.mark.parametrize("capability", SHARED)
def test_the_bound_of_every_choice_is_within_the_device(capability):
    device, generator, refused = launch.Device(capability, SHARED[capability]), random.Random(capability), 0
    for _ in range(100):
        asked = random_networks.random_problem(generator).packed()[0]
        bounds = [c.shared_bytes(asked, capability) for c in launch.Config.candidates(asked, capability)]
        try:
            config = launch.Config.from_heuristic(asked, device)
            assert config.shared_bytes(asked, capability) <= device.shared
        except launch.NoRoom:
            assert min(bounds) > device.shared
            refused += 1
    # Only width 256 in half precision, 128 KB a weight, asks for more than the smallest devices have.
    assert refused < (30 if SHARED[capability] < 128 << 10 else 5)


def test_width_256_takes_one_stage_where_two_do_not_fit():
    # Two linear maps a block, of 128 KB each, in flight at once: 283,648 bytes with two stages, as compiled.
    asked = work()
    first = next(launch.Config.candidates(asked, 90))
    assert first == launch.Config(32, 8, resident=False, stages=2)
    assert first.shared_bytes(asked, 90) == 283_648
    assert chosen(90) == launch.Config(32, 8, resident=False, stages=1)
    assert chosen(90, family=random_networks.single) == first


@pytest.mark.parametrize(("batch", "rows"), [(0, 3), (1, 1), (33, 7), (4096, 256), (100_000, 16)])
def test_programs_share_all_pairs_of_a_wide_network_and_are_no_more_than_run_at_once(batch, rows):
    asked = work(width=512)
    shape = panels.Panels.choose(asked, launch.Device(90, SHARED[90]))
    device = launch.Device(90, SHARED[90], H200)
    each, programs = shape.divide(asked, device, batch, rows, 255)
    pairs = -(-batch // shape.block_b) * rows
    assert each * (programs - 1) < max(1, pairs) <= each * programs
    assert programs <= 132


def test_two_saved_tiles_take_smaller_tiles_of_samples():
    for family, found in ((random_networks.two_tiles, (64, False)), (random_networks.single, (128, True))):
        config = chosen(90, family=family, width=128)
        assert (config.block_b, config.resident) == found


def test_what_no_launch_fits_is_refused_with_numbers():
    # A weight of 256 x 256 bfloat16 and its operand of 16 x 256, and 1 KB each for a vector and a sum.
    message = "it takes 141,312 bytes of shared memory at least, the device grants 101,376"
    with pytest.raises(launch.NoRoom, match=message):
        chosen(86)
    assert chosen(80).stages == 1


def test_the_predicate_says_what_the_launch_would(monkeypatch):
    monkeypatch.setattr(launch.Device, "of", classmethod(lambda cls, device: cls(86, SHARED[86])))
    monkeypatch.setattr(backend, "precision", lambda dtype: "bf16")  # the interpreter's is another
    backend._way.cache_clear()
    for width, reason, wide in ((128, None, False), (256, None, True), (512, None, True), (513, "hidden widths", None)):
        network = random_networks.problem(random_networks.adaln, width, 3, 50, "diagonal", "bf16")
        shapes, levels = tuple(tuple(w.shape) for w in network.weights), ("r",) * len(network.tables)
        asked = Task(network.code, shapes, levels, 50, 1, False, torch.bfloat16, CPU)
        found = backend.why_not_fused(asked)
        assert (found is None) if reason is None else found.startswith(reason)
        assert wide is None or backend._way(asked, "bf16") == (wide, False)
    # A reference that does not fit beside the network, or at all, is evaluated by itself.
    assert backend.why_not_control(300, False, 128, CPU).endswith("the device grants 101,376")
    narrow = asked._replace(
        shapes=((64, 50), (50, 64)), code=(("linear", 0), ("act", "silu"), ("linear", 1)), levels=()
    )
    assert backend._way(narrow, "bf16") == (False, False)
    assert backend._way(narrow._replace(components=10, full=True), "bf16") == (False, False)
    assert backend._way(narrow._replace(components=1000), "bf16") == (False, True)
    backend._way.cache_clear()


def test_a_reference_alone_has_to_fit_too():
    assert control.why_not(5, True, 128, 101_376) is None  # 100,352 as compiled
    assert control.why_not(128, False, 128, 65_536) is None
    assert "takes 131,072 bytes" in control.why_not(129, False, 128, 101_376)


H200 = occupancy.Multiprocessors(132, 233_472)
CASES = json.loads((ROOT / "benchmarks" / "results" / "aot.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("case", "at_once", "splits"),
    [
        # 64 tiles of 64 samples: 264 programs run at once, two a multiprocessor, for 256 of 64 rows.
        ("adaLN H=64 L=3 d=64, diagonal, bf16", 264, 4),
        ("adaLN H=128 L=3 d=64, diagonal, bf16", 132, 2),
        ("adaLN H=256 L=3 d=64, diagonal, bf16", 132, 1),
        ("plain H=128 L=3 d=64, diagonal, bf16", 132, 4),
        ("plain H=64 L=2 d=64, none, bf16", 396, 6),  # 384 programs; by 255 registers a thread it would be 264
    ],
)
def test_rows_are_split_by_what_runs_at_once(case, at_once, splits):
    row = next(row for row in CASES if row["case"] == case and row["sm"] == 90)
    found = H200.at_once(32 * row["warps"], row["shared"], row["registers"])
    assert found == at_once
    assert occupancy.best_splits(-(-4096 // row["samples"]), 256, found) == splits


def test_no_split_ends_sooner():
    for tiles, rows, at_once in (
        (1, 1, 1),
        (64, 256, 264),
        (32, 256, 132),
        (3, 7, 132),
        (500, 100, 132),
        (1, 1000, 264),
    ):
        length = [-(-tiles * n // at_once) * (-(-rows // n) + 1) for n in range(1, rows + 1)]
        found = occupancy.best_splits(tiles, rows, at_once)
        assert length[found - 1] == min(length)
        assert min(length) not in length[: found - 1], "fewer programs would do"


def test_a_launch_is_split_by_registers_once_they_are_known(monkeypatch):
    monkeypatch.setattr(occupancy, "_KNOWN", {})
    asked = work(random_networks.plain, 64, 2, 64, "none")
    device = launch.Device(90, SHARED[90], H200)
    config = launch.Config.from_heuristic(asked, device)
    assert config.split(asked, device, 4096, 256).splits == 4  # by 255 registers: 264 programs at once
    occupancy.remember((asked, config.kept, 90), None)  # Triton's interpreter
    assert config.split(asked, device, 4096, 256).splits == 4
    occupancy.remember((asked, config.kept, 90), type("Compiled", (), {"n_regs": 164}))
    assert config.split(asked, device, 4096, 256).splits == 6
    assert config.split(asked, launch.Device(90, SHARED[90]), 4096, 256).splits == 1
