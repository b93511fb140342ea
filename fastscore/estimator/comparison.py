"""What a comparison returns: paired differences of log-densities, with their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .common_noise import refuse_common_noise, warn_of_common_noise
from .curve import ends, truncation, truncation_in_words
from .joining import list_of
from .part import Part
from .rules import group_of
from .samples import Samples
from .statistics import GroupSums, draw_jump, draw_sum, draw_variance, freedom_of_pairs, shift_variance, widened


@dataclass(frozen=True, eq=False)
class Comparison:
    """A paired difference of log-densities, and its standard error: `difference, stderr = density.compare(...)`.

    Of one density under two conditions, or of two densities (`fastscore.compare_densities`), on the same data.

    Attributes:
        difference: log p(x | a) - log p(x | b), or log p_a(x) - log p_b(x), of each sample, nats, shape (B,).
        stderr: its standard error, nats, shape (B,). Where two networks alike tell components of the data apart, a few
            draws make the difference, and +- 1.96 of it may cover fewer than 95 % of single samples; that of `mean` is
            honest.
        jump, sample_index: as in `Estimate`.
        ends: each of the two integrands at the ends of its range, as in `Estimate`, shape (B, 4, 7).

    What lies beyond the ranges of log-SNR is the references' and in no error here; `truncation_per_sample` estimates
    it.
    """

    difference: Tensor
    stderr: Tensor
    jump: Tensor
    sample_index: Tensor
    ends: Tensor

    @classmethod
    def cat(cls, comparisons: Sequence[Comparison]) -> Comparison:
        """Return the comparison of the samples of several, in their order, as one call on all of them has it.

            >>> batches = zip(data.split(100), torch.arange(len(data)).split(100))
            >>> parts = [density.compare(x, a, b, sample_index=index) for x, index in batches]
            >>> Comparison.cat(parts).mean()

        Arguments:
            comparisons: one at least, on one device, of the same two things with one `nfe` and one `seed`.

        Raises:
            TypeError: for what is no list of comparisons.
            ValueError: for none, and where samples of two batches have one `sample_index`, as they have without one.
        """
        parts = list_of(Comparison, "comparisons", comparisons)
        refuse_common_noise([part.sample_index for part in parts])
        return cls(**{each.name: torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)})

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.difference, self.stderr))

    def mean(self) -> tuple[float, float]:
        """Return the batch mean of the difference and its standard error as an estimate of the data's, nats.

        As `Estimate.mean`, it warns of samples that were given the same `sample_index`.
        """
        warn_of_common_noise(self.sample_index)
        return self._mean()

    def _mean(self) -> tuple[float, float]:
        return GroupSums.of(self.difference, self.jump, group_of(self.sample_index)).told()

    def numpy(self) -> dict[str, np.ndarray]:
        """Return what is known of each sample in copies on the host, each of shape (B,).

        difference, stderr and truncation in nats, sample_index int64.
        """
        found = {name: getattr(self, name) for name in ("difference", "stderr", "sample_index")}
        found["truncation"] = self.truncation_per_sample
        return {name: value.detach().cpu().numpy().copy() for name, value in found.items()}

    @cached_property
    def truncation_per_sample(self) -> Tensor:
        """An estimate, for each sample, of what lies outside of the ranges of log-SNR, nats, shape (B,).

        It is the sum of what both integrands say, as in two estimates. What they have in common beyond the ranges
        cancels in the difference, so that the sum errs on the large side; their difference inside shows no rate at
        which it goes on. Infinite where a range holds fewer than four draws, of which `compare_densities` warns.
        """
        return torch.stack([truncation(side) for side in self.ends.split(2, 1)]).sum(0)

    @cached_property
    def truncation(self) -> float:
        """The largest of `truncation_per_sample`, nats."""
        return float(self.truncation_per_sample.max())

    def __repr__(self) -> str:
        mean, error = self._mean()
        return (
            f"Comparison({len(self.difference)} samples, difference {mean:.4g} +- {error:.2g} nats, "
            f"stderr {float(self.stderr.mean()):.2g} per sample, {truncation_in_words(self.truncation)})"
        )


class Differences:
    """Sums up the draws of a comparison, part by part.

    Arguments:
        samples: that are compared.
        slowest: decay that is reckoned with at the noisy and at the clean end of either, see
            `FittedNodes.slowest_decay`.
    """

    def __init__(self, samples: Samples, slowest: tuple[tuple[float, float], ...]) -> None:
        self.samples, self.slowest = samples, slowest
        self._sums = torch.empty(3, len(samples), dtype=torch.float64, device=samples.device)
        self._ends = torch.empty(len(samples), 4, 7, dtype=torch.float64, device=samples.device)

    def put(self, part: Part, difference: Tensor, second: Tensor, chosen: Tensor) -> None:
        """Put in f of the one minus that of the other, and the other's, (b, N), for the samples at some places."""
        f, rule = part.block(difference), part.rule
        variance, nu = draw_variance(f, rule)
        share = variance / draw_variance(part.block(second), rule)[0].clamp(min=1e-300)
        nu = freedom_of_pairs(nu, share, rule.paired.to(nu.dtype).mean(), f.shape[-1])
        numbers = draw_sum(f, rule), widened(variance, nu), draw_jump(f, rule)
        self._sums[:, chosen] = torch.stack([part.flat(each) for each in numbers])

    def put_ends(self, side: int, part: Part, f: Tensor, chosen: Tensor) -> None:
        """Put in f of the first (0) or of the second (1) itself, (b, N), which says what lies beyond its range."""
        found = ends(part.block(f), part.ends, self.slowest[side])
        self._ends[chosen, 2 * side : 2 * side + 2] = part.flat(found)

    def put_conditions(self, part: Part) -> None:
        """Put in what two conditions gave: the difference of f and both, (b, 3, N)."""
        difference, *sides = part.f.unbind(1)
        self.put(part, difference, sides[1], part.samples)
        for side, f in enumerate(sides):
            self.put_ends(side, part, f, part.samples)

    def told(self, outside: Tensor | float = 0.0) -> Comparison:
        """Return the comparison, with what two log-densities differ by beside their integrals."""
        difference, variance, jump = self._sums
        told = torch.stack([difference + outside, (variance + shift_variance(jump)).sqrt()]).to(self.samples.x.dtype)
        return Comparison(*told, jump, self.samples.index, self._ends)
