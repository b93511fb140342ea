"""How many times fewer evaluations fits to own draws need on photographs, measured closely: more patches, more seeds.

A gain is a ratio of two mean variances over patches, of which a few have a large part. Its error is the jackknife's
over the patches, in which both change together.
"""

from __future__ import annotations

import pytest
import torch
from bench_images import BEST, UNIFORM, held_out, training_patches
from image_methods import Ways
from image_networks import load
from torch import Tensor

SAMPLES, SEEDS = 32, 12
OWN = "fastscore, self, unfitted", "fastscore, self, fitted"

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("nfe", [64, 256])
@pytest.mark.parametrize("size", [16, 32])
def test_gains(size: int, nfe: int, benchmark, table) -> None:
    x, training = held_out(size)[:SAMPLES], training_patches(size)
    ways = Ways(load("unet", size), training)
    run = {method.name: method.run for method in ways.methods((nfe,))}
    variance = {}
    for name in (UNIFORM, BEST, *OWN):
        found = [run[name](x, nfe, seed) for seed in range(SEEDS)]
        variance[name] = torch.stack([one.log_prob for one in found]).double().var(0) * found[0].forward
    for name in OWN:
        row = {"network": f"unet, {size} x {size} x 3", "evaluations": nfe, "method": name}
        for column, peer in (("uniform / this", UNIFORM), ("learned / this", BEST)):
            row[column], row[f"{column}, its error"] = ratio(variance[peer], variance[name])
        table("images_gains", row)
        assert row["learned / this"] > 5  # 16 and more by the table
    benchmark.pedantic(lambda: run[OWN[0]](x[:2], nfe, 0), rounds=1)


def ratio(above: Tensor, below: Tensor) -> tuple[float, float]:
    """Return the ratio of two means over the same patches, and its standard error by the jackknife."""
    n = len(above)
    without = (above.sum() - above) / (below.sum() - below)
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return float(above.mean() / below.mean()), float(error)
