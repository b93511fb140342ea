"""Draws, and the tables of their rows: what every sample meets at each of them, made once for samples that share nodes.

A draw is one place on the log-SNR axis with one noise. It owns one row of the tables, or two where it is an antithetic
pair. A row's numbers depend on the schedule and on what the network predicts, not on any sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import noise
from ..ops.select import runnable
from ..process.network import cast_time
from ..process.predictions import coefficients
from ..program.row_program import RowProgram, Timed
from .network import Network
from .rules import FixedRules, Rule, Rules
from .samples import Samples


@dataclass(frozen=True)
class Draws:
    """The draws of one estimate: where (a rule for each group of samples), which noise (kind, seed and round)."""

    rules: Rules | FixedRules
    noise: str
    seed: int
    round: int = 0

    def __len__(self) -> int:
        return self.rules.draws

    def points(self, span: range, d: int, device: torch.device) -> Tensor:
        """Return the noise words of some draws, which samples of all groups share."""
        return noise.points(self.noise, self.seed, span, len(self), d, device, self.round)

    def keys(self, index: Tensor, d: int) -> Tensor:
        """Return the words of samples with these indices, which all draws share, (B, 2, d)."""
        return noise.sample_keys(self.noise, self.seed, index, d, self.round)


@dataclass(frozen=True)
class Rows:
    """Per-row tables of some consecutive draws, on the device of the data; a paired draw owns two rows."""

    draws: int
    draw: Tensor  # index of the row's draw among these, int64, (R,)
    share: Tensor  # 1, or 1/2 for the rows of a pair, (R,)
    points: Tensor  # the row's noise words, int32, (R, d)
    sign: Tensor  # -1 for an antithetic twin, (R,)
    time: Tensor
    alpha: Tensor  # float64, as sigma
    sigma: Tensor
    coefficients: tuple[Tensor, Tensor, Tensor]
    backends: tuple[str, ...]  # that can run, in order
    per_call: int  # how many rows the network gets in one call; all if 0
    timed: tuple[Timed | None, ...] = ()  # row programs with what they need at these times, one a condition

    @property
    def nbytes(self) -> int:
        """Bytes of what every row has, without the words that the rows of all groups share."""
        own = self.draw, self.share, self.sign, self.time, self.alpha, self.sigma, *self.coefficients
        return sum(tensor.nbytes for tensor in own)

    @property
    def backend(self) -> str:
        """Who makes the noise, and the residual where no kernel does everything."""
        return self.backends[0]

    @classmethod
    def of(cls, network: Network, rule: Rule, points: Tensor, span: range, x: Tensor, per_call: int = 0) -> Rows:
        """Return the rows of some draws of a rule; `points` are the draws' noise words, (len(span), d)."""
        part, device, schedule = slice(span.start, span.stop), x.device, network.schedule
        paired, time = rule.paired[part], rule.time[part]
        alpha, sigma = schedule.alpha_sigma(time)
        numbers = torch.stack([alpha, sigma, *coefficients(network.predicts, schedule, time)])
        draw, twin = _rows_of(paired)
        share = (1 / (1 + paired.to(torch.float64)))[draw]
        # One copy to the device for everything that is a number.
        table = torch.cat([numbers[:, draw], torch.where(twin, -1.0, 1.0)[None].double(), share[None]]).to(device)
        rounded, draw_here = table.to(x), draw.to(device)
        return cls(
            draws=len(span),
            draw=draw_here,
            share=rounded[6],
            points=points[draw_here] if len(draw) > len(span) else points,
            sign=rounded[5],
            time=time[draw].to(device),
            alpha=table[0],
            sigma=table[1],
            coefficients=tuple(rounded[2:5]),
            backends=runnable(device, x.dtype, network.backend),
            per_call=per_call,
        )

    def with_programs(self, network: Network, programs: tuple[RowProgram | None, ...], samples: Samples) -> Rows:
        """Return the same rows with the programs' tables at their times, differentiable if autograd is on."""
        return with_programs([self], network, programs, samples)[0]


def with_programs(
    many: Sequence[Rows], network: Network, programs: tuple[RowProgram | None, ...], samples: Samples
) -> list[Rows]:
    """Return rows with the programs' tables at their times, which are evaluated for all of them together."""
    if not any(programs):
        return list(many)
    times = [cast_time(rows.time, samples.x.dtype, network.time_dtype) for rows in many]
    timed = [
        program.at_each(times, cond.shared) if program else [None] * len(many)
        for program, cond in zip(programs, samples.conds)
    ]
    return [replace(rows, timed=own) for rows, own in zip(many, zip(*timed))]


def _rows_of(paired: Tensor) -> tuple[Tensor, Tensor]:
    """Return the draw of every row, int64, (R,), and whether it is the second of a pair."""
    draw = torch.arange(len(paired), device="cpu").repeat_interleave(1 + paired.long())
    return draw, torch.cat([torch.zeros(1, dtype=torch.bool, device="cpu"), draw[1:] == draw[:-1]])
