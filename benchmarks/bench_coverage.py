"""Whether 1.96 standard errors cover: for typical and odd points of exact networks, fitted or not, with either noise.

The settings are those of `tests/test_coverage.py`, with other data and seeds, enough to tell 95 % from 97 %.
"""

from __future__ import annotations

import pytest
import torch
from mixtures import MIXTURES, ExactEps
from test_coverage import KINDS, NFES, SCHEDULES, points

import fastscore as fs

FITS, SEEDS = 5, 50
WAYS = {"not fitted": (False, "independent"), "fitted": (True, "independent"), "fitted, Sobol": (True, "sobol")}

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MIXTURES)
def test_intervals_cover(name: str, way: str, benchmark, table) -> None:
    mixture, schedule, generator = MIXTURES[name], SCHEDULES[name], torch.Generator().manual_seed(7)
    fitted, noise = WAYS[way]
    found = {nfe: [] for nfe in NFES}
    for fit in range(FITS):
        density = fs.ScoreDensity(ExactEps(mixture, schedule), schedule, "eps")
        if fitted:
            data = mixture.sample(1000, torch.Generator().manual_seed(500 + fit))
            density.fit(data, seed=50 + fit, progress=False)
        density.noise = noise
        x = points(mixture, generator)
        for nfe in NFES:
            found[nfe].append(
                torch.stack([errors(density, x, mixture.log_prob(x), nfe, s, generator) for s in range(SEEDS)])
            )
    for nfe, each in found.items():
        table("coverage", row(name, way, nfe, torch.stack(each)))
    benchmark.pedantic(lambda: density.estimate(x, nfe=NFES[-1], progress=False), rounds=1)


def errors(density: fs.ScoreDensity, x, truth, nfe: int, seed: int, generator) -> torch.Tensor:
    """Return error, stderr, truncation, and variance in means of every point, float64, (4, B)."""
    # Scattered over the data set, so that all groups of nodes take part.
    index = torch.randperm(100_000, generator=generator)[: len(x)]
    told = density.estimate(x, nfe=nfe, seed=1000 + seed, sample_index=index, progress=False)
    return torch.stack(
        [
            told.log_prob.double() - truth,
            told.stderr.double(),
            told.truncation_per_sample.double(),
            told.variance.double(),
        ]
    )


def row(name: str, way: str, nfe: int, found: torch.Tensor) -> dict[str, object]:
    """Return a row of the table, of errors and the like of shape (fits, seeds, 4, points)."""
    error, stderr, truncation, variance = found.unbind(2)
    alone = error.abs() < 1.96 * stderr
    said = error.abs() < 1.96 * stderr + truncation
    told: dict[str, object] = {"target": name, "density": way, "evaluations": nfe}
    start = 0
    for kind, count in KINDS.items():
        here = slice(start, start + count)
        told[kind], told[f"{kind}, its error"] = share(alone[..., here])
        told[f"{kind}, with truncation"] = share(said[..., here])[0]
        start += count
    typical = slice(0, KINDS["typical"])
    mean = error[..., typical].mean(-1)
    stated = variance[..., typical].sum(-1).sqrt() / KINDS["typical"]
    told["mean's error, nats"] = float(mean.mean())
    told["its own error"] = float(mean.std() / mean.numel() ** 0.5)
    told["truncation, nats"] = float(truncation[..., typical].mean())
    told["means covered"] = float((mean.abs() < 1.96 * stated + truncation[..., typical].mean(-1)).double().mean())
    return told


def share(inside: torch.Tensor) -> tuple[float, float]:
    """Return which share of intervals covers and its standard error, between points, of (fits, seeds, points)."""
    of_point = inside.double().mean(1).flatten()
    return float(of_point.mean()), float(of_point.std() / len(of_point) ** 0.5)
