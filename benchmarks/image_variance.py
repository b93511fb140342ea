"""Where in log-SNR the variance of an estimate is, for the plain formula and for each control variate.

Neighbouring draws share almost the same log-SNR, so how far a draw's term lies off the mean of its two neighbours is
its noise, with 3/2 of its variance. Times the evaluations, and per unit of log-SNR, that does not depend on how many
there are.
"""

from __future__ import annotations

import torch
from image_methods import RANGE, Ways
from torch import Tensor

from fastscore.reference.picking import Picked

BINS = 25
SEEDS = 2


def variances(ways: Ways, x: Tensor, nfe: int) -> dict[str, list[float]]:
    """Return by way the variance times evaluations per unit of log-SNR in each bin, nats^2, averaged over samples."""
    found = {
        "plain, learned schedule": _plain(ways, x, nfe),
        "fastscore, unfitted": _own(ways.unfitted, x, nfe, "reference"),
        "fastscore, fitted": _own(ways.fitted, x, nfe, "reference"),
        "fastscore, self, unfitted": _own(ways.unfitted, x, nfe, "self"),
        "fastscore, self, fitted": _own(ways.fitted, x, nfe, "self"),
    }
    return {name: value.tolist() for name, value in found.items()}


def centres() -> list[float]:
    edges = torch.linspace(*RANGE, BINS + 1)
    return ((edges[1:] + edges[:-1]) / 2).tolist()


def _plain(ways: Ways, x: Tensor, nfe: int) -> Tensor:
    total, generator = torch.zeros(BINS, dtype=torch.float64), torch.Generator().manual_seed(5)
    for each in x:
        log_snr, weight, _ = ways.plain.learned(nfe, generator)
        f = ways.plain.residuals(each, log_snr, generator)
        total += _binned(log_snr, (0.5 * weight * f)[None]) * nfe / len(x)
    return total


def _own(density, x: Tensor, nfe: int, control: str) -> Tensor:
    total = torch.zeros(BINS, dtype=torch.float64)
    for seed in range(SEEDS):
        samples = density.check(x, None, {})
        wanted = density.wanted(nfe, seed, samples, None)._replace(noise="independent", control=control)
        reference = Picked.of(density.reference, samples.shape) if control == "self" else density.reference
        plan, programs = density._plan(samples, wanted, reference=reference)
        for part in plan.run(samples, programs, reference):
            assert part.stack is None  # up to 64 samples in a row have the same nodes
            total += _binned(part.rule.log_snr, 0.5 * part.rule.weight * part.f.double()) * nfe / len(x) / SEEDS
    return total


def _binned(log_snr: Tensor, terms: Tensor) -> Tensor:
    """Return the summed variance of terms (B, N) at ascending log-SNRs (N,) by bin, per unit of log-SNR."""
    bends = terms[:, 1:-1] - 0.5 * (terms[:, :-2] + terms[:, 2:])
    at = log_snr[1:-1].expand(bends.shape)
    lo, hi = RANGE
    k = ((at - lo) / (hi - lo) * BINS).long().clamp(0, BINS - 1)
    width = (hi - lo) / BINS
    return torch.zeros(BINS, dtype=torch.float64).index_add_(0, k.flatten(), (bends.square() / 1.5).flatten()) / width
