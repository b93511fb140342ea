"""What a comparison returns: paired differences of log-densities, with their errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from .statistics import GroupSums


@dataclass(frozen=True)
class Comparison:
    """A paired difference of log-densities, and its standard error: `difference, stderr = density.compare(...)`.

    Of one density under two conditions, or of two densities (`fastscore.compare_densities`), on the same data.

    Attributes:
        difference: log p(x | a) - log p(x | b), or log p_a(x) - log p_b(x), of each sample, nats, shape (B,).
        stderr: its standard error, nats, shape (B,).
        jump, group: as in `Estimate`.

    What lies beyond the ranges of log-SNR is the references' and in no error here: `Estimate.truncation_per_sample` of
    either density says how much that is.
    """

    difference: Tensor
    stderr: Tensor
    jump: Tensor
    group: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.difference, self.stderr))

    def mean(self) -> tuple[float, float]:
        """Return the batch mean of the difference and its standard error as an estimate of the data's, nats."""
        return GroupSums.of(self.difference, self.jump, self.group).told()

    def __repr__(self) -> str:
        mean, error = self.mean()
        return (
            f"Comparison({len(self.difference)} samples, difference {mean:.4g} +- {error:.2g} nats, "
            f"stderr {float(self.stderr.mean()):.2g} per sample)"
        )
