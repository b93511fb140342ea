"""Whether data fill their space: constant and linearly dependent columns make a density that is infinite.

Data on a subspace have no density in the whole space. What a schedule's least noise makes of them has one, and an
estimate is about that number: every degenerate dimension adds about log(1 / (sigma sqrt(2 pi))) - 1/2 nats at the least
noise sigma, and more with a schedule that starts at less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schedules import Schedule
from .warn import warn

RELATIVE = (
    1e-6  # range of a column, of its largest value, and spread of a direction, at which float32 data are constant
)
MAX_DIM = 1024  # for linear dependence, an eigenvalue problem of d x d
ROWS = 4096  # that linear dependence is looked for in


def warn_if_degenerate(x: Tensor, schedule: Schedule) -> None:
    """Warn where columns of the data (N, d) are constant, copies or other linear combinations of others.

    Dependence is looked for where N > d and d <= `MAX_DIM`; constant columns and copies always.
    """
    constant, dependent = count_degenerate(x)
    if not constant + dependent:
        return
    d = x.shape[1]
    parts = [f"{constant} constant"] * bool(constant) + [f"{dependent} linearly dependent on others"] * bool(dependent)
    least = math.exp(-schedule.log_snr_range[1] / 2)
    warn(
        f"of the data's {d} dimensions {' and '.join(parts)}: in them the density is infinite, and log_prob "
        f"tells about the schedule's least noise (standard deviation {least:.2g}) instead of the data; "
        "drop these dimensions, or add noise (dequantize) before training"
    )


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
        dependent = d - len(torch.unique(some.mT.float() @ _fixed_normal(n).to(x.device)))
    return int((~varying).sum()), dependent


def _fixed_normal(n: int) -> Tensor:
    """Return the same n random numbers at every call: columns with the same sum of products with them are copies."""
    return torch.randn(n, generator=torch.Generator().manual_seed(0), device="cpu")
