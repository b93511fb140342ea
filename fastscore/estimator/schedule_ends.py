"""A schedule's ends may move under a living density: they may be set, and a schedule may learn them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..process.schedules import SAME_END, Schedule
from ..process.settings import settings_of
from .nodes import FittedNodes

Range = tuple[float, float]


class ScheduleEnds:
    """Where a schedule ended when nodes were placed by it, so that they can follow its ends.

    Arguments:
        nodes: which are placed by this schedule.
    """

    def __init__(self, schedule: Schedule, nodes: FittedNodes) -> None:
        self.settings = settings_of(schedule)
        self._place(nodes, range_of(schedule, nodes.scales.tolist()))

    def __getstate__(self) -> dict[str, object]:
        # Settings hold functions and properties of a class, which no file takes; a copy asks for them anew.
        return self.__dict__ | {"settings": None}

    def follow(self, schedule: Schedule, nodes: FittedNodes) -> FittedNodes:
        """Return the nodes, moved where the schedule's ends have moved since, and as they were where they are back.

        Nodes of another schedule's density, whose `state_dict` was loaded, are moved likewise. Estimates stay unbiased,
        since any nodes are right; error bars calibrated for other nodes may not be.

        Raises:
            ValueError: if the ends are not finite, or the noisy one is not below the clean one.
        """
        now = settings_of(schedule)
        if nodes is not self.placed and nodes is not self.made:  # others were put in their place, for this schedule
            self._place(nodes, range_of(schedule, nodes.scales.tolist()))
        elif nodes.edges is not self.edges:  # others were loaded into it, of whatever schedule
            self._place(nodes, tuple(nodes.home.tolist()))
        elif now is not None and now == self.settings:
            return nodes
        self.settings, ends = None, range_of(schedule, self.placed.scales.tolist())
        if not _same(ends, self.range):
            refuse_upside_down(ends, schedule, self.placed.scales.tolist())
            nodes = self.made = self.placed if _same(ends, self.home) else self.placed.moved_to(*ends)
            self.range, self.edges = ends, nodes.edges
        self.settings = now
        return nodes

    def _place(self, nodes: FittedNodes, home: Range) -> None:
        self.placed, self.made, self.edges = nodes, nodes, nodes.edges
        self.range = self.home = home


def range_of(schedule: Schedule, scales: Sequence[float]) -> Range:
    """Return the range of log-SNR of a schedule for data of these scales, from the noisy end to the clean one.

    Of data that a `fit` found far narrower than the least noise, or far wider than the most, it is upside down: then
    the fitted reference stands for the network, and a warning says so.

    Raises:
        ValueError: if the ends are no numbers.
    """
    try:
        return schedule.range_for(*scales)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        given = getattr(schedule, "time_range", None)
        raise ValueError(
            f"the ends of {type(schedule).__name__} must be numbers that its log-SNR is known at, got time_range "
            f"{given!r}, of which it says: {error}; set its time_range to (least noisy, noisiest)"
        ) from error


def refuse_upside_down(ends: Range, schedule: Schedule, scales: Sequence[float]) -> None:
    """Raise ValueError for ends that are not finite, or the other way round."""
    if not (all(map(math.isfinite, ends)) and ends[0] < ends[1]):
        raise ValueError(
            f"the range of log-SNR must go up from the noisy end to the clean one, got {ends} of {schedule!r} for data "
            f"of scales {min(scales):.3g} to {max(scales):.3g}; set its time_range to (least noisy, noisiest), or give "
            "data that are not far below its least noise"
        )


def _same(one: Range, other: Range) -> bool:
    return all(abs(a - b) <= SAME_END for a, b in zip(one, other))  # False for NaN
