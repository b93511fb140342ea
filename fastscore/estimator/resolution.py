r"""Whether the least noise of a schedule resolves the data: else the integrand does not decay at the clean end.

Along a direction u in which the data's variance is c, the exact network of a Gaussian misses, at signal-to-noise ratio
s, a share of the noise:

.. math:: u\cdot(\epsilon - \hat\epsilon) = e\; u\cdot\epsilon - \mathrm{const}, \qquad e = \frac{s c}{1 + s c}

Where e is next to nothing at the clean end, the network takes the data for points, and how they are spread below that
noise no evaluation tells: the integrand goes on for log(1 / s c) units of log-SNR, at half a nat a unit for every such
direction. A reference that is as narrow there stands in for it; one that is wider does not. Directions are eigenvectors
of the misses' covariance over the noise, or the columns where there are too many dimensions for that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from ..process.predictions import coefficients
from ..reference.gaussians import Reference
from ..support.untouched import uncompiled
from ..support.warn import warn
from .asking import ask
from .network import Network
from .samples import Samples

# A direction is unresolved below this share e, where the data are narrower than a tenth of the least noise. (8-bit
# levels that are spread evenly and scaled to [-1, 1] have 0.05 under DDPM's linear table.) Above it the rate at which
# the integrand decays still shows how far it goes on (`curve.truncation`).
SHARE = 0.01
LIKE_IT = 3.0  # times the limit below which directions count beside one that is found: equal ones come out so far apart
WIDER = 10.0  # times the network's share that a reference has, to be wider than the network
PLAUSIBLE = 0.1  # mean square of the misses of data that are as narrow as the network says, at most
MAX_DIM = 64  # for directions; columns beyond
_COUNTED: ContextVar[bool] = ContextVar("whether somebody else counts what lies beyond the clean end", default=False)
TINY = 1e-30  # a standard deviation of data that needs less noise than any schedule has
ROWS, ROWS_PER_DIM = 32, 4  # with 4 d rows the smallest second moment of d equal ones comes out as a quarter of them


@contextmanager
def clean_end_counted() -> Iterator[None]:
    """Ask nothing inside: the caller counts by itself what lies beyond the clean end, as a bound of levels does."""
    token = _COUNTED.set(True)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def clean_end_is_asked() -> bool:
    """Return whether the clean end is the estimate's own affair."""
    return not _COUNTED.get()


def warn_if_unresolved(network: Network, samples: Samples, reference: Reference, rows_at_once: int) -> None:
    """Warn where the network takes the data for points at the least noise, and the reference does not.

    The first and the last sample are looked at, with 32 rows each, or 4 d up to d = 64.
    """
    two = [samples.select(slice(i, i + 1)) for i in {0, len(samples) - 1}]
    with uncompiled():
        counts = [count_unresolved(network, one, reference, rows_at_once) for one in two]
    count, of = max(counts)
    if not count:
        return
    highest = network.log_snr_range[1]
    said = (
        f"the integrand does not decay at the clean end: in {count} of {of} dimensions the data are far narrower than "
        f"the schedule's least noise (standard deviation {math.exp(-highest / 2):.2g}), and the reference is not; "
        "log_prob is too low there by an amount that neither stderr nor truncation shows; fit(data) a reference, or "
        "train with less noise"
    )
    if network.schedule.range_for(TINY, 1.0)[1] > highest:  # it has less noise, which this reference does not ask for
        said = said.replace("the schedule's least noise", "the least noise that a reference of this scale asks for")
        said = said.removesuffix(", or train with less noise")
    warn(said)


@torch.no_grad()
def count_unresolved(network: Network, one: Samples, reference: Reference, rows_at_once: int) -> tuple[int, int]:
    """Return in how many directions one sample is unresolved, and of how many."""
    d, highest = one.x.shape[1], network.log_snr_range[1]
    seen = torch.ones_like(one.x[0], dtype=torch.bool) if one.mask is None else one.mask[0]
    count = max(ROWS, ROWS_PER_DIM * d) if d <= MAX_DIM else ROWS
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(1, count, d, generator=generator, dtype=torch.float64, device="cpu").to(one.x)
    time = network.schedule.time(torch.full((count,), highest, dtype=torch.float64, device="cpu"))
    alpha, sigma = (v.to(one.device) for v in network.schedule.alpha_sigma(time))
    x_t = torch.where(seen, alpha.to(one.x)[:, None] * one.x[:, None] + sigma.to(one.x)[:, None] * eps, one.x[:, None])
    answers = ask(network, one, x_t, time.to(one.device), rows_at_once)
    a, b, c = (v.to(one.x)[:, None] for v in coefficients(network.predicts, network.schedule, time))
    missed = (c * (a * eps + b * one.x[:, None] - answers))[0, :, seen].double()
    # All rows are at one time, of which the reference needs one table.
    rows_mask = None if one.mask is None else one.mask[:, None]
    of_reference = reference.eps(x_t[0, :, None].double(), alpha[:1], sigma[:1], rows_mask)[:, 0]
    by_reference = (eps[0].double() - of_reference)[:, seen]
    return _count(missed, by_reference), int(seen.sum())


def _count(missed: Tensor, by_reference: Tensor) -> int:
    """Return along how many directions the network misses next to nothing of the noise, and the reference far more."""
    count, d = missed.shape
    if not bool(torch.isfinite(missed).all() & torch.isfinite(by_reference).all()):
        return 0  # the estimate itself refuses such answers
    if count >= ROWS_PER_DIM * d and bool(torch.isfinite(missed.mT.cov()).all()):
        _, basis = torch.linalg.eigh(missed.mT.cov().reshape(d, d))
        missed, by_reference = missed @ basis, by_reference @ basis
    share, other = missed.std(0), by_reference.std(0)
    narrower = (missed.square().mean(0) < PLAUSIBLE) & (other > WIDER * share)
    found = bool((narrower & (share < SHARE)).any())
    return int((narrower & (share < LIKE_IT * SHARE)).sum()) if found else 0
