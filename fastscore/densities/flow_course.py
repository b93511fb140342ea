"""A path by a row program's tangents, without a graph; on a GPU a grid that comes again is one CUDA graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..estimator.graphs import Run
from ..estimator.samples import Samples
from ..program.row_program import RowProgram
from ..support import memory
from .flow_ends import seen_at, truncation
from .flow_frame import Course, Frame
from .flow_program import Grid, ProgramField
from .flow_replay import depends_on, why_not


class ProgramCourse(NamedTuple):
    """The paths of a frame by a program, which has tangents."""

    frame: Frame
    program: RowProgram

    def midpoint(self, samples: Samples, rows: int, times: Tensor, steps: list[float], beyond: bool) -> Course:
        """Integrate by the midpoint rule.

        Arguments:
            rows: for how many samples a graph is made.
            times: where every step starts and its middle, in turns.
            steps: how long they are.
            beyond: whether the course has what lies beyond its ends.
        """
        grid = self.frame.grid(torch.cat([times, self.frame.both_ends()[1:]]) if beyond else times)

        def run(samples: Samples) -> tuple[Tensor, ...]:
            return self._along(samples, grid, steps, beyond)

        log_prob, end, *found = self._replayed(run, samples, rows, grid, ("course", *steps, beyond))
        return Course(log_prob, end, len(grid), found[0] if found else None)

    def truncation(self, samples: Samples, rows: int, end: Tensor) -> tuple[Tensor, int]:
        """Return what lies beyond both ends of paths that end there, (B,), and how often the network was called."""
        grid = self.frame.grid(self.frame.both_ends())

        def run(samples: Samples, end: Tensor) -> tuple[Tensor, ...]:
            field = self._field(samples)
            at_clean, at_noisy = field.points(grid)
            _, clean = seen_at(field, at_clean, self.frame.start(samples))
            return (truncation(field, clean, at_noisy, end).to(end.dtype),)

        (found,) = self._replayed(run, samples, rows, grid, ("ends",), end)
        return found, len(grid)

    def _along(self, samples: Samples, grid: Grid, steps: list[float], beyond: bool) -> tuple[Tensor, ...]:
        """Return the log-density and the end of the path, and what lies beyond its ends if the grid has them."""
        field = self._field(samples)
        points, y, clean = field.points(grid), self.frame.start(samples), None
        change = torch.zeros_like(y[:, :1])
        for step, at_start, at_middle in zip(steps, points, points):
            if beyond and clean is None:
                velocity, clean = seen_at(field, at_start, y)
            else:
                velocity = field.velocity(at_start, y)
            velocity, rate = field.at(at_middle, torch.add(y, velocity, alpha=step / 2))
            y, change = torch.add(y, velocity, alpha=step), torch.add(change, rate[:, None], alpha=step)
        log_prob = self.frame.log_prob(samples, change)
        if clean is None:
            return log_prob, y
        return log_prob, y, truncation(field, clean, next(points), y).to(y.dtype)

    def _field(self, samples: Samples) -> ProgramField:
        return ProgramField(self.frame.density, samples, self.program, self.frame.scale)

    def _in_parts(self, run: Run, samples: Samples, *given: Tensor) -> tuple[Tensor, ...]:
        """Return run(samples, *given), on a CPU for so many samples at once that tangents stay near the caches."""
        widest = max([samples.x.shape[1], *(core.width for core in self.program.matched.cores if core is not None)])
        bytes_of_one = (1 + samples.x.shape[1]) * widest * self.program.dtype.itemsize
        most = max(1, memory.CPU_CALL // bytes_of_one)
        if samples.device.type != "cpu" or len(samples) <= most:
            return run(samples, *given)
        size = memory.even(len(samples), most)
        parts = [slice(start, start + size) for start in range(0, len(samples), size)]
        found = [run(samples.select(part), *(each[part] for each in given)) for part in parts]
        return tuple(map(torch.cat, zip(*found)))

    def _replayed(
        self, run: Run, samples: Samples, rows: int, grid: Grid, what: tuple, *given: Tensor
    ) -> tuple[Tensor, ...]:
        """Return run(samples, *given), on a GPU by a graph if the same call comes again."""
        density, *numbers = self.frame
        density.flows.reason = why_not(samples, grid)
        if density.flows.reason is not None:
            return self._in_parts(run, samples, *given)
        key = what, *numbers, depends_on(density, samples, self.program, grid, rows)
        return density.flows.call(key, run, samples, *given, rows=rows)
