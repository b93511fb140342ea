"""The path of the probability-flow ODE for some samples, from the clean end of the schedule to the noisy one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..density import ScoreDensity
from ..estimator.samples import Samples
from .flow_ends import truncation
from .flow_field import Field, kinds, rademacher, time_of

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")  # of torchdiffeq


class Course(NamedTuple):
    """A path: log-densities (B, columns), where it ends (B, d), and how often the network was called."""

    log_prob: Tensor
    end: Tensor
    nfe: int


class Flow:
    """The integral for some samples, by one solver or another; log-densities are (B, columns), a column a probe."""

    def __init__(self, density: ScoreDensity, samples: Samples, trace: str, probes: int, seed: int) -> None:
        self.density, self.samples, self.trace, self.seed = density, samples, trace, seed
        self.probes = min(probes, kinds(samples.x.shape[1]))  # all that there are give the exact trace
        lo, hi = density.log_snr_range
        smallest, largest = density.reference.scales()
        self.scale = math.sqrt(smallest * largest)
        self.ends = time_of(torch.tensor([hi, lo], dtype=torch.float64, device="cpu"), self.scale)
        self.clean = density.reference.diffused(math.exp(-hi))

    def select(self, chosen: slice | Tensor) -> Flow:
        """Return the flow of some of the samples; probes are keyed by sample, so they stay the same."""
        return Flow(self.density, self.samples.select(chosen), self.trace, self.probes, self.seed)

    def on(self, x: Tensor) -> Flow:
        """Return the flow of the same samples with other data."""
        return Flow(self.density, replace(self.samples, x=x), self.trace, self.probes, self.seed)

    def midpoint(self, steps: int) -> Course:
        """Integrate by the midpoint rule, which wants the rate in the middle of a step only: half of the traces.

        All that the times decide is evaluated once, before the first step.
        """
        grid, field = self._grid(steps), self._field()
        table = field.table(torch.stack([grid[:-1], (grid[:-1] + grid[1:]) / 2], 1).flatten())
        y, change = self._start()
        for step, at_start, at_middle in zip(grid.diff().tolist(), table[::2], table[1::2]):
            velocity = checkpoint(field.velocity, at_start, y, use_reentrant=False)
            velocity, rate = field.at(at_middle, torch.add(y, velocity, alpha=step / 2))
            y, change = torch.add(y, velocity, alpha=step), torch.add(change, rate, alpha=step)
        return Course(self._log_prob(change), y, field.nfe)

    def solve(self, odeint, method: str, steps: int, rtol: float, atol: float) -> Course:
        """Integrate by a solver of torchdiffeq."""
        grid, field = self._grid(steps).to(self.samples.x), self._field()
        # An adaptive solver would step past the end and interpolate, where no network was trained.
        options = {"step_t": grid[1:]} if method in ADAPTIVE else None
        y, change = odeint(field, self._start(), grid, rtol=rtol, atol=atol, method=method, options=options)
        return Course(self._log_prob(change[-1]), y[-1], field.nfe)

    def truncation(self, end: Tensor) -> tuple[Tensor, int]:
        """Return what lies beyond both ends of paths that end there, (B,), and how often the network was called."""
        field = self._field()
        return truncation(field, self._start()[0], end).to(end.dtype), field.nfe

    def _field(self) -> Field:
        signs = rademacher(self.samples, self.seed, self.probes) if self.trace == "hutchinson" else None
        return Field(self.density, self.samples, signs, tuple(self.ends.tolist()), self.scale)

    def _grid(self, steps: int) -> Tensor:
        return torch.linspace(*self.ends.sqrt().tolist(), steps + 1, dtype=torch.float64, device="cpu").square()

    def _start(self) -> tuple[Tensor, Tensor]:
        x, mask = self.samples.x, self.samples.mask
        y = x * float((1 - self.ends[0]) / self.scale)
        columns = 1 if self.trace == "exact" else self.probes
        return y if mask is None else torch.where(mask, y, x), x.new_zeros(len(x), columns)

    def _log_prob(self, change: Tensor) -> Tensor:
        return (self.clean.log_prob(self.samples.x, self.samples.mask)[:, None] + change).to(self.samples.x.dtype)
