"""Draws, and the tables of their rows: what every sample meets at each of them, made once for samples that share nodes.

A draw is one place on the log-SNR axis with one noise. It owns one row of the tables, or two where it is an antithetic
pair. A row's numbers depend on the schedule and on what the network predicts, not on any sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..ops import noise
from ..ops.select import runnable
from ..process.network import cast_time
from ..process.predictions import scales_and_coefficients
from ..program.row_program import RowProgram, Timed
from ..support.host import together
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
    """Per-row tables of some consecutive draws, on the device of the data; a paired draw owns two rows.

    Arguments:
        draws: how many.
        draw: index of the row's draw among these, int64, (R,).
        points: the row's noise words, int32, (R, d).
        time: as the network gets it, (R,).
        exact: alpha, sigma, the three coefficients of the prediction, sign (-1 for an antithetic twin), share (1, or
            1/2 for the rows of a pair) and time, unless it is an integer, of every row, float64, (7 or 8, R).
        rounded: the same in the dtype of the data.
        backends: that can run, in order.
        per_call: how many rows the network gets in one call; all if 0.
        timed: row programs with what they need at these times, one a condition.
        beside: where groups of samples are evaluated side by side, the samples of each and its own rows; time, exact
            and rounded then have an entry for every sample and row, (b, R), (8, b, R) and the like.
    """

    draws: int
    draw: Tensor
    points: Tensor
    time: Tensor
    exact: Tensor
    rounded: Tensor
    backends: tuple[str, ...]
    per_call: int
    timed: tuple[Timed | None, ...] = ()
    beside: tuple[tuple[Tensor, Rows], ...] = ()

    @property
    def alpha(self) -> Tensor:
        return self.exact[0]

    @property
    def sigma(self) -> Tensor:
        return self.exact[1]

    @property
    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(self.rounded[2:5])

    @property
    def sign(self) -> Tensor:
        return self.beside[0][1].sign if self.beside else self.rounded[5]  # the same for all groups, as is the share

    @property
    def share(self) -> Tensor:
        return self.beside[0][1].share if self.beside else self.rounded[6]

    @property
    def backend(self) -> str:
        """Who makes the noise, and the residual where no kernel does everything."""
        return self.backends[0]

    def tensors(self) -> list[Tensor]:
        """Return all that another seed changes, without the words that the rows of all groups share."""
        return [self.time, self.exact] + [self.rounded] * (self.rounded is not self.exact)

    @classmethod
    def of(
        cls, network: Network, rules: Sequence[Rule], points: Tensor, span: range, x: Tensor, per_call: int = 0
    ) -> list[Rows]:
        """Return the rows of some draws by several rules that have the same of them in pairs.

        Arguments:
            points: the draws' noise words, (len(span), d).
        """
        part, device, schedule = slice(span.start, span.stop), x.device, network.schedule
        time = torch.cat([rule.time[part] for rule in rules])
        draw, own = _rows_of(rules[0].paired[part].numpy())
        count, groups = len(draw), len(rules)
        every = torch.cat([draw + len(span) * group for group in range(groups)])
        scales, of_prediction = scales_and_coefficients(network.predicts, schedule, time)
        numbers = torch.stack([*scales, *of_prediction])[:, every]
        numbers, time = torch.cat([numbers, own.repeat(1, groups)]), time[every]
        if time.is_floating_point():  # a number like the others, rounded with them
            exact, here = together([torch.cat([numbers, time.double()[None]]), draw], device)
        else:
            exact, here, time = together([numbers, draw, time], device)
        rounded = exact.to(x)
        if time.is_floating_point():
            time = (rounded if network.time_dtype in (None, x.dtype) else exact)[len(numbers)]
        times = cast_time(time, x.dtype, network.time_dtype)
        return [
            cls(
                draws=len(span),
                draw=here,
                points=points[here] if count > len(span) else points,
                time=times[start : start + count],
                exact=exact[:, start : start + count],
                rounded=rounded[:, start : start + count],
                backends=runnable(device, x.dtype, network.backend),
                per_call=per_call,
            )
            for start in range(0, groups * count, count)
        ]

    @classmethod
    def side_by_side(cls, each: Sequence[Rows], members: Sequence[Tensor]) -> Rows:
        """Return the rows of several groups as those of all their samples: one call of the network is for all.

        Arguments:
            each: rows of the groups, of the same draws.
            members: which samples each has, int64, (m,); together every sample once.
        """
        sizes = torch.tensor([len(own) for own in members], device="cpu")
        group = torch.arange(len(each), device="cpu").repeat_interleave(sizes).to(members[0].device)
        group = torch.empty_like(group).scatter_(0, torch.cat(list(members)), group)
        exact, rounded = (torch.stack(table, 1)[:, group] for table in zip(*((r.exact, r.rounded) for r in each)))
        time = torch.stack([rows.time for rows in each])[group]
        return replace(each[0], time=time, exact=exact, rounded=rounded, beside=tuple(zip(members, each)))

    def with_programs(self, network: Network, programs: tuple[RowProgram | None, ...], samples: Samples) -> Rows:
        """Return the same rows with the programs' tables at their times, differentiable if autograd is on."""
        return with_programs([self], network, programs, samples)[0]


def with_programs(
    many: Sequence[Rows], network: Network, programs: tuple[RowProgram | None, ...], samples: Samples
) -> list[Rows]:
    """Return rows with the programs' tables at their times, which are evaluated for all of them together."""
    if not any(programs):
        return list(many)
    times = [rows.time for rows in many]
    timed = [
        program.at_each(times, cond.shared) if program else [None] * len(many)
        for program, cond in zip(programs, samples.conds)
    ]
    return [replace(rows, timed=own) for rows, own in zip(many, zip(*timed))]


def _rows_of(paired: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the draw of every row, int64, (R,), and its sign and share, float64, (2, R)."""
    draw = np.arange(len(paired)).repeat(1 + paired)
    twin = np.zeros(len(draw), dtype=bool)
    twin[1:] = draw[1:] == draw[:-1]
    return torch.from_numpy(draw), torch.from_numpy(np.stack([1.0 - 2 * twin, 1 / (1 + paired[draw])]))
