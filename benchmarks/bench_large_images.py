"""Images of 49,152 numbers within a memory budget: `fit`, and estimates with each control, beside the bare network.

The U-Net of 32 x 32 pixels is asked for 128 x 128, where it is no good model, and takes the time of one.
"""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from image_networks import PREDICTS, SCHEDULE, load
from photographs import HELD_OUT, TRAINING, dequantized, patches

import fastscore as fs
from fastscore.support.memory import parse_bytes, peak_bytes, steady_heap

SIZE, SAMPLES, TRAINING_PATCHES, ROWS = 128, 2, 400, 8
BUDGET, FIT_EVALUATIONS = "512MB", 2000

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


def timed(run):
    """Return the processor's seconds and the peak of tensors in bytes, of two runs."""
    peak = peak_bytes(run)
    start = time.process_time()
    run()
    return time.process_time() - start, peak


def test_large_images_stay_within_the_budget(benchmark, table):
    x = dequantized(patches(SIZE, HELD_OUT, SAMPLES, seed=1)[0], torch.Generator().manual_seed(1))
    training = dequantized(patches(SIZE, TRAINING, TRAINING_PATCHES, seed=2)[0], torch.Generator().manual_seed(2))
    network, rows = load("unet", 32), x[:1].expand(ROWS, -1, -1, -1).contiguous()
    bare = min(timed(lambda: network(rows, torch.zeros(ROWS)))[0] for _ in range(5)) / ROWS
    steady_heap()
    density = fs.ScoreDensity(network, SCHEDULE, PREDICTS)
    start = time.process_time()
    peak = peak_bytes(
        lambda: density.fit(training, reference="images", evaluations=FIT_EVALUATIONS, memory=BUDGET, progress=False)
    )
    spent = time.process_time() - start
    row = {"call": "fit", "evaluations": FIT_EVALUATIONS, "peak, MB": peak / 1e6}
    table("large_images", row | {"time / bare forwards": spent / (FIT_EVALUATIONS * bare), "stderr, bits": None})
    assert peak < parse_bytes(BUDGET) + 6 * 8 * TRAINING_PATCHES * x[0].numel()
    for control in ("reference", "self"):
        for nfe in (64, 256):
            found = density.estimate(x, nfe=nfe, control=control, progress=False)
            seconds, peak = timed(partial(density.estimate, x, nfe=nfe, control=control, memory=BUDGET, progress=False))
            spent = float(found.nfe.sum()) * bare
            row = {"call": f'estimate, control="{control}"', "evaluations": nfe, "peak, MB": peak / 1e6}
            bits = float(found.bits_per_dim_stderr().mean())
            table("large_images", row | {"time / bare forwards": seconds / spent, "stderr, bits": bits})
            assert peak < parse_bytes(BUDGET), row
    benchmark.pedantic(lambda: network(rows, torch.zeros(ROWS)), rounds=1)
