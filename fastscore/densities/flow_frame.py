"""What the ODE's paths of a density have in common, whatever the samples and however they are integrated."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..density import ScoreDensity
from ..estimator.samples import Samples
from .flow_field import time_of
from .flow_program import Grid


class Course(NamedTuple):
    """A path: log-densities (B, columns), where it ends (B, d), and how often the network was called.

    `beyond` is what lies beyond both ends of the path, (B,), where it was asked for together with the path.
    """

    log_prob: Tensor
    end: Tensor
    nfe: int
    beyond: Tensor | None = None


class Frame(NamedTuple):
    """The density with the numbers that its paths start, run and end by.

    Attributes:
        scale: s, the standard deviation of the data.
        ends: the times of the clean and of the noisy end.
        variance: of the noise at the clean end.
    """

    density: ScoreDensity
    scale: float
    ends: tuple[float, float]
    variance: float

    @classmethod
    def of(cls, density: ScoreDensity) -> Frame:
        """Return the frame of a density whose reference lies where the data do."""
        lo, hi = density.log_snr_range
        smallest, largest = density.reference.scales()
        scale = math.sqrt(smallest * largest)
        clean, noisy = time_of(torch.tensor([hi, lo], dtype=torch.float64, device="cpu"), scale).tolist()
        return cls(density, scale, (clean, noisy), math.exp(-hi))

    def both_ends(self) -> Tensor:
        """Return the times of both ends, float64, on the host."""
        return torch.tensor(self.ends, dtype=torch.float64, device="cpu")

    def steps(self, count: int) -> Tensor:
        """Return the times that a path is cut at into so many steps, float64, on the host."""
        first, last = (math.sqrt(end) for end in self.ends)
        cuts = torch.linspace(first, last, count + 1, dtype=torch.float64, device="cpu").square()
        cuts[0], cuts[-1] = self.ends
        return cuts

    def grid(self, t: Tensor) -> Grid:
        """Return what the schedule says of times t of the path."""
        return Grid.of(self.density, self.scale, self.ends, t)

    def start(self, samples: Samples) -> Tensor:
        """Return where paths start, (B, d)."""
        y = samples.x * ((1 - self.ends[0]) / self.scale)
        return y if samples.mask is None else torch.where(samples.mask, y, samples.x)

    def log_prob(self, samples: Samples, change: Tensor) -> Tensor:
        """Return log-densities from the change of log(p / q) along paths, (B, columns)."""
        clean = self.density.reference.diffused(self.variance)
        return (clean.log_prob(samples.x, samples.mask)[:, None] + change).to(samples.x.dtype)
