"""Whether data fill their space: constant and linearly dependent columns make a density that is infinite.

Data on a subspace have no density in the whole space. What a schedule's least noise makes of them has one, and an
estimate is about that number: every degenerate dimension adds about log(1 / (sigma sqrt(2 pi))) - 1/2 nats at the least
noise sigma, and more with a schedule that starts at less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..process.masks import inside
from ..process.schedules import Schedule
from ..reference.gaussians import Reference
from ..support.warn import warn
from .samples import Samples

# Range of a column, of its largest value, and spread of a direction, at which float32 data are constant.
RELATIVE = 1e-6
COPY = 1e-5  # of a column's spread, by which a copy in float32, scaled and shifted, may differ
FAR_OUT = 10.0  # standard deviations; outliers are further, and are not most samples
CLUSTERED = 0.01  # share of the data in clusters, below which these are outliers
FAR = 10.0  # times, by which a direction is narrower than the least noise; decorrelated pixels come near to it
MAX_DIM = 1024  # for linear dependence, an eigenvalue problem of d x d
ROWS = 4096  # that linear dependence is looked for in


def warn_if_out_of_range(x: Tensor, reference: Reference, log_snr_range: tuple[float, float]) -> None:
    """Warn where data (N, d) are narrower than the least noise of a range of log-SNR, and where wider than the most.

    There the network is asked about next to nothing, and no integrand shows how far the reference is from the data. A
    direction across the dimensions counts where it is narrower than a tenth of the least noise, and a Gaussian of the
    reference that was fitted to the data where it is narrower in most of its own directions.
    """
    (smallest, largest), (most, least) = reference.scales(), (math.exp(-end / 2) for end in log_snr_range)
    across, d = narrowest_direction(x), x.shape[1]
    spread, remedy = x.detach().double().std(0) if d else x.new_empty(0), "scale the data as they were in training"
    where = "in {} of {} dimensions" if d else "in dimensions that do not count in every sample"
    if largest > most:
        wide = max(int((spread > most).sum()), 1)  # the reference's widest is one of them
        _warn_of_range(largest, "above the most noise", most, where.format(wide, d), remedy)
    if smallest < least or across < least / FAR:
        narrow = int((spread < least).sum())
        where = where.format(narrow, d) if narrow or not d else f"in a direction across the {d} dimensions"
        of_levels = ", or, where they are dequantized 8-bit levels, take fastscore.discrete_log_prob of the levels"
        _warn_of_range(min(smallest, across), "below the least noise", least, where, remedy + of_levels)
    elif reference.components > 1:
        _warn_of_clusters(reference, least)


def _warn_of_range(size: float, how: str, noise: float, where: str, remedy: str) -> None:
    warn(
        f"the data have a standard deviation of {size:.2g}, {how} of the schedule, {noise:.2g}, {where}: there "
        "log_prob is the fitted reference's and not the network's, with an error that neither stderr nor truncation "
        f"shows; {remedy}"
    )


def _warn_of_clusters(reference: Reference, least: float) -> None:
    """Warn of Gaussians of a mixture that the least noise blurs, though the data as a whole are wider."""
    widths = reference.variance.sqrt().median(1).values
    narrow, weight = widths < least, reference.weight
    share = float(weight[narrow].sum() / weight.sum())
    if share >= CLUSTERED:
        size = float(widths[narrow].median())
        warn(
            f"{share:.0%} of the data are of clusters with a standard deviation of {size:.2g}, "
            f"below the least noise of the schedule, {least:.2g}: within them log_prob is mostly the fitted "
            "reference's and not the network's, with an error that stderr does not show and truncation not in full; "
            "take a schedule that begins with less noise"
        )


def are_far(samples: Samples, reference: Reference) -> bool:
    """Return whether most samples lie far outside of what a reference was fitted to, as data of another scale do."""
    return reference.mean.shape[1] > 1 and _distance(samples, reference) > FAR_OUT


def warn_of_far(samples: Samples, reference: Reference) -> None:
    """Say how far outside of what the reference was fitted to most samples lie."""
    distance = _distance(samples, reference)
    warn(
        f"most samples are {distance:.3g} standard deviations of the fitted reference from its mean, in every "
        "dimension on average: is the scale of x another than that of the data in training and in fit?"
    )


def _distance(samples: Samples, reference: Reference) -> float:
    """Return the median over samples of the distance from the reference's mean, in its widest standard deviation."""
    mean = reference.weight @ reference.mean  # of a mixture as a whole, as its scales are
    y = inside(reference.turn(samples.x.detach().double()) - mean, samples.mask)
    return float((y.square().sum(1) / samples.dims).median()) ** 0.5 / reference.scales()[1]


def narrowest_direction(x: Tensor) -> float:
    """Return the least standard deviation of data (N, d) along any direction, inf where they are too few to tell."""
    n, d = len(x), x.shape[1]
    if not 1 < d <= min(MAX_DIM, n - 1):
        return math.inf
    return max(float(torch.linalg.eigvalsh(x.detach().double().mT.cov())[0]), 0.0) ** 0.5


def warn_if_degenerate(x: Tensor, schedule: Schedule) -> bool:
    """Warn where columns of the data (N, d) are constant or combinations of others, and return whether any are.

    Dependence is looked for where N > d and d <= `MAX_DIM`; constant columns and copies always.
    """
    constant, dependent = count_degenerate(x)
    if not constant + dependent:
        return False
    d = x.shape[1]
    parts = [f"{constant} constant"] * bool(constant) + [f"{dependent} linearly dependent on others"] * bool(dependent)
    least = math.exp(-schedule.log_snr_range[1] / 2)
    spread = x.detach().double().std(0)
    narrow = int(((spread < least) & (spread > RELATIVE * x.abs().amax(0))).sum())
    warn(
        f"of the data's {d} dimensions {' and '.join(parts)}: in them the density is infinite, and log_prob "
        f"tells about the schedule's least noise (standard deviation {least:.2g}) instead of the data; "
        "drop these dimensions, or add noise (dequantize) before training"
        + f"; beside these, {narrow} narrower than that noise, where log_prob is the fitted reference's"
        * bool(narrow)
    )
    return True


def count_degenerate(x: Tensor) -> tuple[int, int]:
    """Return how many columns are constant, and how many more dimensions linear combinations of the others take."""
    x = x.detach()
    low, high = x.aminmax(dim=0)
    varying = high - low > RELATIVE * torch.maximum(low.abs(), high.abs())
    if not bool(varying.any()):
        return len(varying), 0
    some = x[:: -(-len(x) // ROWS), varying].double()
    spread = some.std(0)
    # Scales apart are no dependence; a column that is constant in these rows alone is none either.
    some = ((some - some.mean(0)) / spread)[:, spread > 0]
    n, d = some.shape
    if n > d and 1 < d <= MAX_DIM:
        dependent = int((torch.linalg.eigvalsh(some.mT @ some / n) < RELATIVE**2 * d).sum())
    else:
        dependent = _count_copies(some)
    return int((~varying).sum()), dependent


def _count_copies(columns: Tensor) -> int:
    """Return how many standardized columns (N, d) are others, or others with the sign turned.

    Copies have the same sums of products with four fixed columns of random numbers, and stand next to each other when
    sorted by one of them; others differ in one of the four.
    """
    n = len(columns)
    drawn = torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    sums = columns.mT @ drawn.to(columns)
    sums = sums * sums[:, :1].sign()
    sums = sums[sums[:, 0].argsort()]
    return int((sums.diff(dim=0).abs() < COPY * n**0.5).all(1).sum())
