"""Variance of log p(x) times evaluations on photographs: a U-Net and a transformer, the plain formula and fastscore.

A product of variance and evaluations that does not depend on the evaluations is what a number of evaluations has to be
divided by for a wanted variance. It needs no truth: it is the spread of each sample's estimates over seeds. That all
methods estimate the same number is asserted, by their means over the samples.
"""

from __future__ import annotations

import time

import pytest
import torch
from image_methods import Method, methods
from image_networks import SIZES, load
from photographs import HELD_OUT, TRAINING, dequantized, patches
from torch import Tensor

SAMPLES, SEEDS = 16, 4
EVALUATIONS = (64, 256, 1024)
TRAINING_PATCHES = 2000
BEST, UNIFORM = "plain, learned schedule", "plain, low-discrepancy times"
NETWORKS = [(kind, size) for kind, sizes in SIZES.items() for size in sizes]

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize(("kind", "size"), NETWORKS, ids=lambda value: str(value))
def test_images(kind: str, size: int, benchmark, table) -> None:
    x = dequantized(patches(size, HELD_OUT, SAMPLES, seed=1)[0], torch.Generator().manual_seed(1))
    training = dequantized(patches(size, TRAINING, TRAINING_PATCHES, seed=2)[0], torch.Generator().manual_seed(2))
    network = load(kind, size)
    found = {}
    for method in methods(network, training, EVALUATIONS):
        method.run(x[:2], method.evaluations[0], 0)  # probes are nobody's seconds
        for nfe in method.evaluations:
            found[method.name, nfe] = measured(method, x, nfe)
    check_means(found)
    for (name, nfe), (log_prob, seconds) in found.items():
        table("images", row(kind, size, name, nfe, log_prob, seconds, found))
    benchmark.pedantic(lambda: network(x, torch.zeros(len(x))), rounds=1)


def measured(method: Method, x: Tensor, nfe: int) -> tuple[Tensor, float]:
    """Return the estimates of some seeds, (SEEDS, B), and the processor's seconds a sample."""
    start = time.process_time()
    found = torch.stack([method.run(x, nfe, seed) for seed in range(SEEDS)])
    return found, (time.process_time() - start) / found.numel()


def check_means(found: dict[tuple[str, int], tuple[Tensor, float]]) -> None:
    """Assert that every way to the integral has the mean of the most accurate one, to four standard errors."""
    best, error = mean(found["fastscore, self, fitted", EVALUATIONS[-1]][0])
    for (name, nfe), (log_prob, _) in found.items():
        if name != "plain, all timesteps":  # which is another number, the bound of a table
            own, own_error = mean(log_prob)
            assert abs(own - best) < 4 * (own_error**2 + error**2) ** 0.5, (name, nfe, own, own_error, best, error)


def mean(log_prob: Tensor) -> tuple[float, float]:
    """Return the mean over samples and seeds, and its standard error by the spread over seeds, of 3 or more degrees."""
    own = log_prob.mean(1)
    return float(own.mean()), float(log_prob.var(0).mean() / log_prob.numel()) ** 0.5


def row(kind, size, name, nfe, log_prob, seconds, found) -> dict:
    variance = nfe * log_prob.var(0)
    v = float(variance.mean())
    ratios = {}
    for column, other in (("uniform / this", UNIFORM), ("learned / this", BEST)):
        peer = found[other, nfe if (other, nfe) in found else EVALUATIONS[-1]][0]
        ratios[column] = max(nfe, EVALUATIONS[0]) * float(peer.var(0).mean()) / v if nfe in EVALUATIONS else None
    d = 3 * size * size
    return {
        "network": f"{kind}, {size} x {size} x 3",
        "method": name,
        "evaluations": nfe,
        "variance x evaluations": v,
        "its error": float(variance.std()) / len(variance) ** 0.5,
        **ratios,
        "bits per dimension": 7 - mean(log_prob)[0] / d / 0.6931471805599453,
        "processor ms / sample": 1000 * seconds,
    }
