"""A schedule's ends may move under a living density: they may be set, and a schedule may learn them."""

from __future__ import annotations

from ..process.schedules import SAME_END, Schedule, settings_of
from .nodes import FittedNodes


class ScheduleEnds:
    """Where a schedule ended when nodes were placed, so that they can follow it."""

    def __init__(self, schedule: Schedule) -> None:
        self.settings, self.range = settings_of(schedule), schedule.log_snr_range

    def follow(self, schedule: Schedule, nodes: FittedNodes) -> FittedNodes:
        """Return the nodes, stretched where the schedule's ends have moved since.

        Estimates stay unbiased, since any nodes are right; error bars calibrated for other nodes may not be.
        """
        now = settings_of(schedule)
        if now is not None and now == self.settings:
            return nodes
        self.settings, ends = now, schedule.log_snr_range
        if max(abs(a - b) for a, b in zip(ends, self.range)) <= SAME_END:
            return nodes
        self.range = ends
        return nodes.stretched(*schedule.range_for(*nodes.scales.tolist()))
