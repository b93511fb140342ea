"""A schedule's ends may move under a living density: they may be set, and a schedule may learn them."""

from __future__ import annotations

import math

from ..process.schedules import SAME_END, Schedule, settings_of
from .nodes import FittedNodes

Range = tuple[float, float]


class ScheduleEnds:
    """Where a schedule ends for the data that nodes were placed for, so that they can follow it.

    Arguments:
        nodes: which are placed by this schedule.
    """

    def __init__(self, schedule: Schedule, nodes: FittedNodes) -> None:
        self.settings, self.placed, self.made = settings_of(schedule), nodes, nodes
        self.range = self.home = _range_of(schedule, nodes)

    def follow(self, schedule: Schedule, nodes: FittedNodes) -> FittedNodes:
        """Return the nodes, stretched where the schedule's ends have moved since, and as they were where they are back.

        Estimates stay unbiased, since any nodes are right; error bars calibrated for other nodes may not be.

        Raises:
            ValueError: if the ends are not finite, or the noisy one is not below the clean one.
        """
        now = settings_of(schedule)
        if now is not None and now == self.settings:
            return nodes
        if nodes is not self.placed and nodes is not self.made:  # others were put in their place
            self.placed, self.home = nodes, self.range
        self.settings, ends = None, _range_of(schedule, self.placed)
        if not (all(map(math.isfinite, ends)) and ends[0] < ends[1]):
            raise ValueError(
                f"the range of log-SNR must go up from the noisy end to the clean one, got {ends} of {schedule!r}, "
                "whose ends have moved since the density was made; set its time_range to (least noisy, noisiest)"
            )
        if not _same(ends, self.range):
            self.range = ends
            nodes = self.made = self.placed if _same(ends, self.home) else self.placed.stretched(*ends)
        self.settings = now
        return nodes


def _range_of(schedule: Schedule, nodes: FittedNodes) -> Range:
    return schedule.range_for(*nodes.scales.tolist())


def _same(one: Range, other: Range) -> bool:
    return max(abs(a - b) for a, b in zip(one, other)) <= SAME_END
