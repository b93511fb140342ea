"""Images of 49,152 numbers within a memory budget: `fit`, and estimates with each control, beside the bare network.

The U-Net of 32 x 32 pixels is asked for 128 x 128, where it is no good model, and takes the time of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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


def seconds(run: Callable[[], object]) -> float:
    """Return the processor's seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def beside(run: Callable[[], object], bare: Callable[[], object]) -> tuple[float, float]:
    """Return the processor's seconds of a run, and of bare forwards: the mean of those before it and after it.

    A machine's clock may change within minutes.
    """
    before = min(seconds(bare) for _ in range(5))
    spent = seconds(run)
    return spent, (before + min(seconds(bare) for _ in range(5))) / 2


def test_large_images_stay_within_the_budget(benchmark, table):
    x = dequantized(patches(SIZE, HELD_OUT, SAMPLES, seed=1)[0], torch.Generator().manual_seed(1))
    training = dequantized(patches(SIZE, TRAINING, TRAINING_PATCHES, seed=2)[0], torch.Generator().manual_seed(2))
    network, rows = load("unet", 32), x[:1].expand(ROWS, -1, -1, -1).contiguous()
    forward = torch.no_grad()(partial(network, rows, torch.zeros(ROWS)))
    steady_heap()
    density = fs.ScoreDensity(network, SCHEDULE, PREDICTS)
    fit = partial(density.fit, training, reference="images", evaluations=FIT_EVALUATIONS, memory=BUDGET, progress=False)
    peak = 0

    def measured() -> None:
        nonlocal peak
        peak = peak_bytes(fit)

    spent, bare = beside(measured, forward)
    row = {"call": "fit", "evaluations": FIT_EVALUATIONS, "peak, MB": peak / 1e6}
    ratio = spent / (FIT_EVALUATIONS / ROWS * bare)
    table("large_images", row | {"time / bare forwards": ratio, "stderr, bits": None})
    assert peak < parse_bytes(BUDGET) + 6 * 8 * TRAINING_PATCHES * x[0].numel()
    for control in ("reference", "self"):
        for nfe in (64, 256):
            found = density.estimate(x, nfe=nfe, control=control, progress=False)
            estimate = partial(density.estimate, x, nfe=nfe, control=control, memory=BUDGET, progress=False)
            peak = peak_bytes(estimate)
            spent, bare = beside(estimate, forward)
            ratio = spent / (float(found.nfe.sum()) / ROWS * bare)
            row = {"call": f'estimate, control="{control}"', "evaluations": nfe, "peak, MB": peak / 1e6}
            bits = float(found.bits_per_dim_stderr().mean())
            table("large_images", row | {"time / bare forwards": ratio, "stderr, bits": bits})
            assert peak < parse_bytes(BUDGET), row
    benchmark.pedantic(forward, rounds=1)
