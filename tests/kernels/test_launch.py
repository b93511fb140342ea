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
from fastscore.kernels import control, launch

from fastscore.ops import triton as backend
from fastscore.ops.task import Task

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


def work(family=random_networks.adaln, width=256, depth=3, d=50, reference="diagonal", precision="bf16"):
    return random_networks.problem(family, width, depth, d, reference, precision).packed()[0]


def chosen(capability, **network):
    return launch.Config.from_heuristic(work(**network), launch.Device(capability, SHARED[capability]))


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


def test_what_no_launch_fits_is_refused_with_numbers():
    # A weight of 256 x 256 bfloat16 and its operand of 16 x 256, and 1 KB each for a vector and a sum.
    message = "it takes 141,312 bytes of shared memory at least, the device grants 101,376"
    with pytest.raises(launch.NoRoom, match=message):
        chosen(86)
    assert chosen(80).stages == 1


def test_the_predicate_says_what_the_launch_would(monkeypatch):
    monkeypatch.setattr(launch.Device, "of", classmethod(lambda cls, device: cls(86, SHARED[86])))
    monkeypatch.setattr(backend, "precision", lambda dtype: "bf16")  # the interpreter's is another
    backend._room.cache_clear()
    for width, reason in ((256, "it takes 141,312 bytes"), (128, None)):
        network = random_networks.problem(random_networks.adaln, width, 3, 50, "diagonal", "bf16")
        shapes, levels = tuple(tuple(w.shape) for w in network.weights), ("r",) * len(network.tables)
        found = backend.why_not_fused(Task(network.code, shapes, levels, 50, 1, False, torch.bfloat16, CPU))
        assert (found is None) if reason is None else found.startswith(reason)
    assert backend.why_not_control(300, False, 128, CPU).endswith("the device grants 101,376")
    backend._room.cache_clear()


def test_a_reference_alone_has_to_fit_too():
    assert control.why_not(5, True, 128, 101_376) is None  # 100,352 as compiled
    assert control.why_not(128, False, 128, 65_536) is None
    assert "takes 131,072 bytes" in control.why_not(129, False, 128, 101_376)
