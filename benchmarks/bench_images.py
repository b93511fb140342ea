"""Variance of log p(x) times evaluations on photographs: a U-Net and a transformer, what people use and fastscore.

The variance of a mean over independent draws falls as one over their number, so that their product says what a wanted
variance costs. It needs no truth: it is the spread of each sample's estimates over seeds. That all ways to the integral
have the same mean is asserted. The ODE's number is another one, and so is a table's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import image_variance
import pytest
import torch
from image_methods import Ways
from image_monai import monai
from image_networks import SIZES, load
from peers import Outcome
from photographs import HELD_OUT, TRAINING, dequantized, patches
from torch import Tensor

SAMPLES, SEEDS, RANKED = 16, 4, 64
EVALUATIONS, MOST = (64, 256), 1024
TRAINING_PATCHES = 4000
BEST, UNIFORM = "plain, learned schedule", "plain, low-discrepancy times"
OTHER_NUMBERS = ("ODE", "plain, all timesteps")
# What the two references say beyond the range of log-SNR, where the network is not asked, differs by less, in nats.
BEYOND = 0.05
NETWORKS = [(kind, size) for kind, sizes in SIZES.items() for size in sizes]

SHORT = "unet", 8, (UNIFORM, BEST, "fastscore, self, unfitted")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_images_in_short(benchmark, table) -> None:
    """The smallest network at 64 evaluations, by what it asks for: no other way may come near."""
    kind, size, names = SHORT
    x, training = held_out(size)[:SAMPLES], training_patches(size)
    by_name = {method.name: method for method in Ways(load(kind, size), training).methods((64,))}
    rows = [
        {"network": f"{kind}, {size} x {size} x 3", "method": name} | measured(by_name[name].run, x, 64)
        for name in names
    ]
    check_means(rows)
    for row in rows:
        row |= ratios(row, rows)
        table("images_in_short", {key: value for key, value in row.items() if key != "mean"})
    assert rows[-1]["learned / this"] > 5  # 16 by the whole table, to a quarter
    benchmark.pedantic(lambda: by_name[names[-1]].run(x, 64, 0), rounds=1)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "size"), NETWORKS)
def test_monai(kind: str, size: int, benchmark, table) -> None:
    """MONAI's own code beside the same sum in ours, whose noise is fresh at every timestep."""
    x, training = held_out(size)[:SAMPLES], training_patches(size)
    ways, likelihood = Ways(load(kind, size), training), monai(load(kind, size))
    sums = {method.name: method.run for method in ways.methods((64,)) if method.name.startswith("plain, all")}
    sums["plain, MONAI's DiffusionInferer"] = lambda x, _, seed: Outcome(*likelihood(x, seed))
    for name, run in sums.items():
        row = {"network": f"{kind}, {size} x {size} x 3", "method": name} | measured(run, x, 1000)
        mean, error = row.pop("mean")
        table("images_monai", row | {"nats": mean, "its stderr": error})
    benchmark.pedantic(lambda: likelihood(x[:1], 0), rounds=1)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "size"), NETWORKS)
def test_images(kind: str, size: int, benchmark, table) -> None:
    x, training = held_out(size), training_patches(size)
    ways, name = Ways(load(kind, size), training), f"{kind}, {size} x {size} x 3"
    rows = []
    for method in ways.methods(EVALUATIONS, MOST):
        for nfe in method.evaluations:
            rows.append({"network": name, "method": method.name} | measured(method.run, x[:SAMPLES], nfe))
    check_means(rows)
    for row in rows:
        row |= ratios(row, rows)
        table("images", {key: value for key, value in row.items() if key != "mean"})
    for way, values in image_variance.variances(ways, x[:SAMPLES], 256).items():
        table(
            "images_variance", {"network": name, "method": way, "log-SNR": image_variance.centres(), "density": values}
        )
    found = ways.fitted.estimate(x, nfe=256, control="self", progress=False)
    bits = found.bits_per_dim(bins=256, low=-1, high=1).tolist()
    table("images_ranked", {"network": name, "size": size, "bits per dimension": bits})
    benchmark.pedantic(lambda: ways.network(x, torch.zeros(len(x))), rounds=1)


def held_out(size: int) -> Tensor:
    return dequantized(patches(size, HELD_OUT, RANKED, seed=1)[0], torch.Generator().manual_seed(1))


def training_patches(size: int) -> Tensor:
    return dequantized(patches(size, TRAINING, TRAINING_PATCHES, seed=2)[0], torch.Generator().manual_seed(2))


def measured(run: Callable[[Tensor, int, int], Outcome], x: Tensor, nfe: int) -> dict:
    """Return what the estimates of some seeds say, and the processor's milliseconds a sample."""
    run(x[:2], nfe or 64, 0)  # probes and tables are nobody's seconds
    start = time.process_time()
    found = [run(x, nfe, seed) for seed in range(SEEDS)]
    seconds = (time.process_time() - start) / SEEDS / len(x)
    log_prob, spent = torch.stack([one.log_prob for one in found]), found[0].forward
    variance = log_prob.var(0) * spent
    return {
        "evaluations": spent,
        "variance x evaluations": float(variance.mean()),
        "its error": float(variance.std()) / len(x) ** 0.5,
        "ms a sample": 1000 * seconds,
        "mean": (float(log_prob.mean()), float(log_prob.var(0).mean() / log_prob.numel()) ** 0.5),
    }


def check_means(rows: list[dict]) -> None:
    """Assert that every way to the integral has the mean of the most accurate one, to four standard errors."""
    best, error = rows[-1]["mean"]
    for row in (row for row in rows if not row["method"].startswith(OTHER_NUMBERS)):
        own, own_error = row["mean"]
        assert abs(own - best) < 4 * (own_error**2 + error**2) ** 0.5 + BEYOND, (row, best, error)


def ratios(row: dict, rows: list[dict]) -> dict:
    """Return how many times the evaluations and the time the plain formula takes, at as many of them or the most."""
    found = {}
    for column, peer in (("uniform / this", UNIFORM), ("learned / this", BEST)):
        of_peer = {other["evaluations"]: other for other in rows if other["method"] == peer}
        other = of_peer[row["evaluations"] if row["evaluations"] in of_peer else MOST]
        found[column] = other["variance x evaluations"] / row["variance x evaluations"]
        if peer == BEST:
            slower = row["ms a sample"] / row["evaluations"] / (other["ms a sample"] / other["evaluations"])
            found["learned / this, in time"] = found[column] / slower
    return found
