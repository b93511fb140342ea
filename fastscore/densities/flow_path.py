"""The path of the probability-flow ODE for some samples, from the clean end of the schedule to the noisy one."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace

import torch
from torch import Tensor

from ..density import ScoreDensity
from ..estimator.samples import Samples
from ..program.row_program import RowProgram
from ..support.recompute import recomputed
from .flow_course import ProgramCourse
from .flow_ends import seen_at, truncation
from .flow_field import Field, Time, kinds, rademacher
from .flow_frame import Course, Frame

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")  # of torchdiffeq


class Flow:
    """The integral for some samples, by one solver or another; log-densities are (B, columns), a column a probe.

    Arguments:
        density, samples, trace, probes, seed: as `probability_flow_log_prob` has checked them.
        program: whose tangents give the trace where no gradient is wanted; backward passes do without one.
    """

    def __init__(
        self,
        density: ScoreDensity,
        samples: Samples,
        trace: str,
        probes: int,
        seed: int,
        program: RowProgram | None = None,
    ) -> None:
        self.frame, self.samples, self.trace, self.seed = Frame.of(density), samples, trace, seed
        self.probes = min(probes, kinds(samples.x.shape[1]))  # all that there are give the exact trace
        self.course = None if program is None else ProgramCourse(self.frame, program)
        self.rows = len(samples)  # that a graph is made for

    def select(self, chosen: slice | Tensor, on_host: Tensor | None = None) -> Flow:
        """Return the flow of some of the samples; probes are keyed by sample, so they stay the same.

        On a GPU a graph is made for a power of two of them, so that few graphs are there for any number.

        Arguments:
            on_host: which they are, once more on the CPU, where that is known.
        """
        found = self._of(self.samples.select(chosen, on_host))
        found.rows = min(self.rows, 1 << (len(found.samples) - 1).bit_length())
        return found

    def on(self, x: Tensor) -> Flow:
        """Return the flow of the same samples with other data."""
        return self._of(replace(self.samples, x=x))

    def midpoint(self, steps: int, beyond: bool = False) -> Course:
        """Integrate by the midpoint rule, which wants the rate in the middle of a step only: half of the traces.

        All that the times decide is evaluated once, before the first step.

        Arguments:
            beyond: whether the course should have `truncation`, which no gradient goes through.
        """
        cuts = self.frame.steps(steps)
        times, lengths = torch.stack([cuts[:-1], (cuts[:-1] + cuts[1:]) / 2], 1).flatten(), cuts.diff().tolist()
        beyond = beyond and not torch.is_grad_enabled()
        if self.course is not None and not torch.is_grad_enabled():
            return self.course.midpoint(self.samples, self.rows, times, lengths, beyond)
        self._not_replayed()
        field = self._field()
        (y, change), clean = self._start(), None
        points = field.times(torch.cat([times, self.frame.both_ends()[1:]]) if beyond else times)
        for step, at_start, at_middle in zip(lengths, points, points):
            if beyond and clean is None:
                velocity, clean = seen_at(field, at_start, y)
            else:
                velocity = self._velocity(field, at_start, y)
            velocity, rate = field.at(at_middle, torch.add(y, velocity, alpha=step / 2))
            y, change = torch.add(y, velocity, alpha=step), torch.add(change, rate, alpha=step)
        log_prob = self.frame.log_prob(self.samples, change)
        left = None if clean is None else truncation(field, clean, next(points), y).to(y.dtype)
        return Course(log_prob, y, field.nfe, left)

    def solve(
        self, odeint: Callable[..., tuple[Tensor, Tensor]], method: str, steps: int, rtol: float, atol: float
    ) -> Course:
        """Integrate by a solver of torchdiffeq."""
        self._not_replayed()
        grid, field = self.frame.steps(steps).to(self.samples.x), self._field()
        # An adaptive solver would step past the end and interpolate, where no network was trained.
        options = {"step_t": grid[1:]} if method in ADAPTIVE else None
        y, change = odeint(field, self._start(), grid, rtol=rtol, atol=atol, method=method, options=options)
        return Course(self.frame.log_prob(self.samples, change[-1]), y[-1], field.nfe)

    def truncation(self, end: Tensor) -> tuple[Tensor, int]:
        """Return what lies beyond both ends of paths that end there, (B,), and how often the network was called."""
        if self.course is not None:
            return self.course.truncation(self.samples, self.rows, end)
        field = self._field()
        at_clean, at_noisy = field.times(self.frame.both_ends())
        _, clean = seen_at(field, at_clean, self._start()[0])
        return truncation(field, clean, at_noisy, end).to(end.dtype), field.nfe

    def _not_replayed(self) -> None:
        self.frame.density.flows.reason = (
            "a gradient is wanted, or a solver of torchdiffeq integrates"
            if self.course is not None
            else "backward passes take the trace, and not tangents of a row program"
        )

    @staticmethod
    def _velocity(field: Field, time: Time, y: Tensor) -> Tensor:
        """Return the velocity alone; for a backward pass nothing but y is kept of it."""
        if not torch.is_grad_enabled():
            return field.velocity(time, y)
        return recomputed(field.density.model, field.velocity, time, y)

    def _of(self, samples: Samples) -> Flow:
        found = copy(self)
        found.samples = samples
        return found

    def _field(self) -> Field:
        signs = rademacher(self.samples, self.seed, self.probes) if self.trace == "hutchinson" else None
        return Field(self.frame.density, self.samples, signs, self.frame.ends, self.frame.scale)

    def _start(self) -> tuple[Tensor, Tensor]:
        x = self.samples.x
        return self.frame.start(self.samples), x.new_zeros(len(x), 1 if self.trace == "exact" else self.probes)
