r"""The exact trace of the ODE by a row program: tangents go through all layers beside the sample, in one pass.

The network's answer f and its Jacobian come together (`fastscore.ops.tangents`), so that with v = c_f f + c_y y, taken
at x_t = s y, the divergence is :math:`c_f\, s\, \mathrm{tr}(\partial f / \partial x_t) + c_y d`, without a graph and
without backward passes. All that the times of a grid decide is evaluated before the first step: schedule, tables of the
program, and the reference at every level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..density import ScoreDensity
from ..estimator.network_density import network_of
from ..estimator.samples import Samples
from ..ops import interpreter, tangents
from ..ops.instructions import NoProgram
from ..process.masks import inside
from ..process.network import cast_time
from ..process.taken_dtype import model_dtype
from ..program.row_program import RowProgram
from ..program.verification import ProgramMismatch
from ..reference.levels import Level
from .flow_field import TABLES, dot, numbers_of


@torch.no_grad()
def program_for(density: ScoreDensity, samples: Samples, trace: str) -> RowProgram | str:
    """Return the row program whose tangents give the ODE's trace, or why backward passes have to."""
    if trace != "exact":
        return f"the trace is {trace!r}"
    d, dtype = samples.x.shape[1], model_dtype(density.model, samples.x.dtype)
    try:
        return tangents.why_not(d, dtype) or _known(network_of(density).need_program(samples))
    except NoProgram as reason:
        return f"the network is no row program: {reason}"
    except ProgramMismatch as problem:  # the network itself is the truth
        return str(problem)


def _known(program: RowProgram) -> RowProgram | str:
    return tangents.why_no_rule(program.code) or program


class Grid:
    """Times of a path, and what the host knows of each.

    Arguments:
        numbers: t, scale, c_f and c_y of `flow_field.Time`, float64, (T, 4).
        own: the schedule's own times, (T,).
    """

    def __init__(self, numbers: Tensor, own: Tensor) -> None:
        self.numbers, self._own, self._there = numbers, own.double(), None

    @classmethod
    def of(cls, density: ScoreDensity, scale: float, ends: tuple[float, float], t: Tensor) -> Grid:
        """Return the grid of times t, (T,)."""
        return cls(*numbers_of(density, scale, ends, t))

    def __len__(self) -> int:
        return len(self.numbers)

    def on(self, device: torch.device) -> Tensor:
        """Return t and the schedule's own times on a device, where they stay, (2, T)."""
        if self._there is None or self._there.device != device:
            self._there = torch.stack([self.numbers[:, 0], self._own]).to(device)
        return self._there

    def key(self) -> bytes:
        """Return all numbers of the grid."""
        return self.numbers.numpy().tobytes() + self._own.numpy().tobytes()


class Point(NamedTuple):
    """A time of a grid: the numbers that it decides, and what program and reference are there."""

    t: float
    scale: float
    c_f: float
    c_y: float
    weights: list[Tensor]
    tables: Sequence[Tensor]
    level: Level


class ProgramField:
    """Velocity and the rate of log(p / q) along it, as `flow_field.Field`, without gradients.

    Arguments:
        density: network, schedule and reference.
        samples: whose conditions the network sees.
        program: of the network.
        scale: s, the standard deviation of the data.
    """

    exact = whole = True  # trace and Jacobians

    def __init__(self, density: ScoreDensity, samples: Samples, program: RowProgram, scale: float) -> None:
        self.density, self.samples, self.program = density, samples, program
        self.reference = density.reference.scaled(1 / scale).tensors()
        self.counted = samples.dims if samples.mask is None else samples.dims.to(samples.x)  # entries that count

    def points(self, grid: Grid) -> Iterator[Point]:
        """Yield the times of a grid in their order, some evaluated at once (`TABLES` bounds their memory)."""
        (cond,), program, x = self.samples.conds, self.program, self.samples.x
        widths = sum(width for _, width in program.matched.tables) + 4 * x.shape[1] * len(self.reference[0])
        size = max(1, TABLES // (widths * (len(x) if "br" in program.levels or self.samples.mask is not None else 1)))
        here = grid.on(x.device)
        for start in range(0, len(grid), size):
            some = slice(start, start + size)
            rows, (t, time) = grid.numbers[some].tolist(), here[:, some]
            timed = program.at(cast_time(time, x.dtype, self.density.time_dtype), cond.shared)
            weights, tables = timed.bind(cond.per_sample)
            each = [table.split(1, 1) if table.shape[1] > 1 else (table,) * len(rows) for table in tables]
            sigmas = [row[0] for row in rows]
            levels = Level.each(self.reference, 1 - t, t, sigmas, x.shape[1], x.dtype, self.samples.mask)
            for row, own, level in zip(rows, zip(*each) if each else [()] * len(rows), levels):
                yield Point(*row, weights, own, level)

    def velocity(self, point: Point, y: Tensor) -> Tensor:
        """Return the velocity alone, (B, d)."""
        output = interpreter.run(self.program.code, point.weights, point.tables, self._x_t(point, y))
        return self._velocity(point, output, y)

    def at(self, point: Point, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, d) and the rate of log(p / q), (B,)."""
        mask = self.samples.mask
        velocity, jacobian = self._with_jacobian(point, y)
        trace = inside(torch.diagonal(jacobian, dim1=0, dim2=-1)[:, 0], mask).sum(1)
        eps_q, divergence_q = point.level.eps_and_divergence(y, mask)
        gap = torch.sub(velocity, inside(eps_q - y, mask), alpha=1 / (1 - point.t))
        constant = point.c_y * self.counted - (divergence_q - self.counted) / (1 - point.t)
        rate = torch.add(constant, trace, alpha=point.c_f * point.scale)
        return velocity, torch.sub(rate, dot(gap, eps_q), alpha=1 / point.t)

    def noise_and_jacobian(self, point: Point, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the velocity, the noise seen in y, (B, d), and its Jacobian, entry (j, i) by y_i, (B, i, j)."""
        mask, rest = self.samples.mask, 1 - point.t
        velocity, jacobian = self._with_jacobian(point, y)
        own = rest * point.c_f * point.scale * jacobian[:, :, 0].transpose(0, 1)
        own = own + (1 + rest * point.c_y) * torch.eye(y.shape[1], dtype=y.dtype, device=y.device)
        if mask is not None:
            own = torch.where(mask[:, :, None] & mask[:, None], own, 0)
        return velocity, torch.add(inside(y, mask), velocity, alpha=rest), own

    def _with_jacobian(self, point: Point, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity, and df_j / dx_t,i at (i, b, 0, j), with one entry for all samples where that is so."""
        code = self.program.code
        output, found = tangents.run_with_tangents(code, point.weights, point.tables, self._x_t(point, y))
        return self._velocity(point, output, y), found.to(y.dtype)

    def _x_t(self, point: Point, y: Tensor) -> Tensor:
        x_t, mask = point.scale * y, self.samples.mask
        x_t = x_t if mask is None else torch.where(mask, x_t, y)
        return x_t[:, None].to(self.program.dtype)

    def _velocity(self, point: Point, output: Tensor, y: Tensor) -> Tensor:
        velocity = torch.add(point.c_f * output[:, 0].to(y.dtype), y, alpha=point.c_y)
        return inside(velocity, self.samples.mask)
