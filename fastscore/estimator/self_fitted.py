"""The integrand with a reference that is fitted to every sample's own residuals: `control="self"` of an estimate.

A sample's residual vectors and their noise are kept until its last draw, in the basis of its reference; then
`fastscore.estimator.self_fit` takes them, as many entries at once as stay near the caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..ops import definitions as ops
from ..program.row_program import RowProgram
from ..reference.picking import Picked
from ..support import memory
from .integrand import cost_of_row, predictions
from .network import Network
from .rows import Rows
from .samples import Samples
from .self_fit import FOLDS, Hats, departure, fit

FEWEST_DRAWS = 64  # of which coefficients are fitted; below, their own noise is more than what they take away
BLOCK = 1 << 18  # draws times entries, of which some twenty tensors are there at once
MOST_ENTRIES = 512  # whose equations are solved at once


def self_fitted(
    network: Network, samples: Samples, keys: Tensor, each: Iterable[Rows], reference: Picked, draws: int
) -> Tensor:
    """Return f of all draws of some samples, (b, N), whose mean is that of f under the picked reference.

    Arguments:
        each: rows of consecutive draws, one a draw; all of them together are the draws.
    """
    x, count = samples.x, FOLDS * -(-draws // FOLDS)
    component, _, y = reference.pick(x)
    noise, residual = torch.zeros(2, count, *x.shape, dtype=x.dtype, device=x.device)
    levels, start = [], 0
    for rows in each:
        span = slice(start, start := start + rows.draws)
        found = vectors(network, samples, keys, rows, reference)
        for kept, own in zip((noise, residual), found):
            kept[span] = reference.coordinates(own, component).transpose(0, 1)
        levels.append(rows.exact[:2])
    alpha, sigma = torch.cat(levels, 1)
    counts = (torch.arange(count, device=x.device) < draws).to(x)
    alpha, sigma = (torch.cat([v, v[-1:].expand(count - draws)]) for v in (alpha, sigma))
    hats = Hats.of(2 * (alpha / sigma).log(), counts, network.log_snr_range)
    variance = reference.variance[component].expand_as(x)
    f = x.new_zeros(count, len(x))
    for some, entries in blocks(*x.shape, count):
        of_block = some, entries
        own = noise[:, some, entries], residual[:, some, entries]
        f[:, some] += block_values(*own, y[of_block], variance[of_block], alpha, sigma, hats)
    if reference.told is not None:
        f -= reference.course_apart(x, alpha, sigma).to(f)
    return f[:draws].T


def vectors(network: Network, samples: Samples, keys: Tensor, rows: Rows, reference: Picked) -> tuple[Tensor, Tensor]:
    """Return the noise of every row and the residual eps - eps_hat of the network, (B, R, d) each."""
    x, (a, b, c) = samples.x, rows.coefficients
    words = keys, rows.points, rows.sign
    x_t, eps = ops.perturb(x, *words, rows.rounded[0], rows.rounded[1], backend=rows.backend)
    (prediction,) = predictions(network, samples, x_t, rows)
    return eps, torch.addcmul(a[:, None] * eps, b[:, None], x[:, None]).sub_(prediction).mul_(c[:, None])


def blocks(samples: int, d: int, draws: int) -> Iterator[tuple[slice, slice]]:
    """Yield samples and entries that are fitted at once: of several samples all, or of one sample some."""
    most = max(1, min(MOST_ENTRIES, BLOCK // draws))
    together, entries = max(1, most // d), min(d, most)
    for start in range(0, samples, together):
        for first in range(0, d, entries):
            yield slice(start, start + together), slice(first, first + entries)


def block_values(
    z: Tensor, residual: Tensor, y: Tensor, variance: Tensor, alpha: Tensor, sigma: Tensor, hats: Hats
) -> Tensor:
    """Return what some entries of some samples add to f, (N, b).

    Arguments:
        z, residual: noise and the network's residual, (N, b, n).
        y, variance: of the reference: coordinates of x less its mean, and the variances there, float64, (b, n).
        alpha, sigma: of the draws, float64, (N,).
    """
    shape = z.shape
    z, residual = z.flatten(1), residual.flatten(1)
    y, variance, alpha, sigma = y.flatten().to(z), variance.flatten().to(z), alpha[:, None].to(z), sigma[:, None].to(z)
    signal = alpha.square() * variance
    total = signal + sigma.square()
    keep, mean = signal / total, -(alpha * sigma) * y / total
    own = torch.addcmul(mean, keep, z)
    rest = residual - own
    f = rest * torch.add(rest, own, alpha=2)
    f -= departure(z, keep, mean, *fit(z, rest, hats))
    return f.unflatten(1, shape[1:]).sum(2)


def self_fit_cost(
    network: Network, samples: Samples, programs: tuple[RowProgram | None, ...], reference: Picked
) -> memory.RowCost:
    """Return the memory of one row, of what is kept of a sample's draw until its last one, and of a block's fit."""
    x = samples.x
    cost = cost_of_row(network, samples, programs, reference, vectors)
    draws = FOLDS * max(1, BLOCK // MOST_ENTRIES // FOLDS)
    vector, entry = x.new_zeros(draws, 1, MOST_ENTRIES), x.new_zeros(1, MOST_ENTRIES, dtype=torch.float64)
    level = entry.new_ones(draws)
    hats = Hats.of(level, level.to(x), network.log_snr_range)
    work = memory.peak_bytes(lambda: block_values(vector, vector, entry, entry + 1, level, level, hats))
    return cost._replace(kept=2 * x.shape[1] * x.element_size(), work=work)
