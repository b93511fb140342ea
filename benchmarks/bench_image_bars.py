"""Whether the error bars of images cover: a learned U-Net, whose own integral a hundred times the evaluations tell."""

from __future__ import annotations

import image_methods
import pytest
import torch
from image_networks import load
from photographs import HELD_OUT, TRAINING, dequantized, patches

SAMPLES = {8: 24, 16: 8}
EVALUATIONS, SEEDS = (64, 256), 25
TRUTH, TRUTH_SEEDS = 4096, 6  # 96 times 256: its error is a tenth of theirs

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("size", SAMPLES)
def test_bars_of_a_unet_cover(size: int, benchmark, table) -> None:
    x = dequantized(patches(size, HELD_OUT, SAMPLES[size], seed=1)[0], torch.Generator().manual_seed(1))
    training = dequantized(patches(size, TRAINING, 4000, seed=2)[0], torch.Generator().manual_seed(2))
    ways = image_methods.Ways(load("unet", size), training)
    for name, density in (("self, unfitted", ways.unfitted), ("self, fitted", ways.fitted)):
        # Each by itself: what lies beyond the range of log-SNR is the reference's, and truncation is in no bar.
        long = [density.estimate(x, nfe=TRUTH, seed=1000 + seed, progress=False) for seed in range(TRUTH_SEEDS)]
        truth = torch.stack([each.log_prob for each in long]).double().mean(0)
        known = torch.stack([each.variance for each in long]).mean(0) / TRUTH_SEEDS
        for nfe in EVALUATIONS:
            found = [density.estimate(x, nfe=nfe, seed=seed, control="self", progress=False) for seed in range(SEEDS)]
            error = torch.stack([each.log_prob for each in found]).double() - truth
            stderr = torch.stack([each.stderr for each in found]).double()
            inside = error.abs() < 1.96 * (stderr.square() + known).sqrt()
            rms = float(error.square().mean().sqrt())
            row = {"network": f"unet, {size} x {size} x 3", "control": name, "evaluations": nfe}
            row |= {"intervals": inside.numel(), "covered": float(inside.double().mean())}
            row |= {"error, nats": rms, "stderr, nats": float(stderr.square().mean().sqrt())}
            table("image_bars", row | {"mean error, nats": float(error.mean())})
            # 200 to 600 intervals of 8 to 24 samples, whose calibration is common: 2 % at least.
            assert 0.90 <= row["covered"] <= 0.995, row
    benchmark.pedantic(lambda: ways.network(x, torch.zeros(len(x))), rounds=1)
