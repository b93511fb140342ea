"""What a comparison returns: paired differences of log-densities, with their errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .curve import ends, truncation
from .part import Part
from .samples import Samples
from .statistics import GroupSums, draw_jump, draw_sum, draw_variance, shift_variance, widened


@dataclass(frozen=True)
class Comparison:
    """A paired difference of log-densities, and its standard error: `difference, stderr = density.compare(...)`.

    Of one density under two conditions, or of two densities (`fastscore.compare_densities`), on the same data.

    Attributes:
        difference: log p(x | a) - log p(x | b), or log p_a(x) - log p_b(x), of each sample, nats, shape (B,).
        stderr: its standard error, nats, shape (B,).
        jump, group: as in `Estimate`.
        ends: the difference of both integrands at the ends of their range, as in `Estimate`, shape (B, 2, 7); each
            integrand at the ends of its own where they have two ranges, shape (B, 4, 7).

    What lies beyond the ranges of log-SNR is the references' and in no error here; `truncation_per_sample` estimates
    it.
    """

    difference: Tensor
    stderr: Tensor
    jump: Tensor
    group: Tensor
    ends: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.difference, self.stderr))

    def mean(self) -> tuple[float, float]:
        """Return the batch mean of the difference and its standard error as an estimate of the data's, nats."""
        return GroupSums.of(self.difference, self.jump, self.group).told()

    @cached_property
    def truncation_per_sample(self) -> Tensor:
        """An estimate, for each sample, of what lies outside of the ranges of log-SNR, nats, shape (B,)."""
        return truncation(self.ends)

    @cached_property
    def truncation(self) -> float:
        """The largest of `truncation_per_sample`, nats."""
        return float(self.truncation_per_sample.max())

    def __repr__(self) -> str:
        mean, error = self.mean()
        return (
            f"Comparison({len(self.difference)} samples, difference {mean:.4g} +- {error:.2g} nats, "
            f"stderr {float(self.stderr.mean()):.2g} per sample, largest truncation about {self.truncation:.2g})"
        )


class Differences:
    """Sums up the draws of a comparison, part by part.

    Arguments:
        samples: that are compared.
        slowest: decay that is reckoned with at the noisy and at the clean end, see `FittedNodes.slowest_decay`.
    """

    def __init__(self, samples: Samples, slowest: tuple[float, float]) -> None:
        self.samples, self.slowest = samples, slowest
        self._sums = torch.empty(3, len(samples), dtype=torch.float64, device=samples.device)
        self._ends = torch.empty(len(samples), 2, 7, dtype=torch.float64, device=samples.device)

    def put(self, part: Part, f: Tensor, chosen: Tensor) -> None:
        """Put in f of the one minus that of the other, (b, N), for the samples at some places."""
        block = part.block(f)
        numbers = draw_sum(block, part.rule), widened(*draw_variance(block, part.rule)), draw_jump(block, part.rule)
        self._sums[:, chosen] = torch.stack([part.flat(each) for each in numbers])
        self._ends[chosen] = part.flat(ends(block, part.ends, self.slowest))

    def told(self, outside: Tensor | float = 0.0, ends: Tensor | None = None) -> Comparison:
        """Return the comparison, with what two log-densities differ by beside their integrals."""
        difference, variance, jump = self._sums
        told = torch.stack([difference + outside, (variance + shift_variance(jump)).sqrt()]).to(self.samples.x.dtype)
        return Comparison(*told, jump, self.samples.group, self._ends if ends is None else ends)
