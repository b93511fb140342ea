"""Climb every method's ladder of efforts on one problem, in turns, until it reaches the smallest error or its time.

Seconds are the process's own (`time.process_time`) in one thread, which a busy neighbour disturbs least; each is the
median of up to three runs, and the runs of all methods at a level alternate. The error of a method that draws random
numbers is that over the seeds it ran.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field

import torch
from peers import Method
from race_targets import Problem

SEEDS = 3
QUICK = 0.2  # seconds; a longer run is not repeated
RUNS = 3  # so many times the problem's cap is what all efforts of a method may take together
STOPPED_BIAS = "error no longer falls"
STALLED = 0.9  # of the error of two efforts before: a method whose error falls less has a bias and stops


@dataclass
class Rung:
    """One effort of one method."""

    effort: object
    rmse: float
    forward: float
    backward: float
    seconds: float


@dataclass
class Climb:
    """A method on its way up, what its next effort may be expected to take (seconds), and why it stopped."""

    method: Method
    cap: float
    rungs: list[Rung] = field(default_factory=list)
    spent: float = 0.0
    stopped: str = ""

    def seconds_without(self, threshold: float) -> float:
        """Return how long the method is known to run without reaching a threshold: infinitely, where it has a bias."""
        if self.stopped == STOPPED_BIAS:
            return math.inf
        return max((rung.seconds for rung in self.rungs if rung.rmse > threshold), default=self.cap)

    def first(self, threshold: float) -> Rung | None:
        """Return the least effort with an error of at most `threshold`, nats."""
        reached = [rung for rung in self.rungs if rung.rmse <= threshold]
        return min(reached, key=lambda rung: rung.seconds, default=None)


@dataclass
class _Level:
    """The runs of one method at one effort."""

    climb: Climb
    effort: object
    errors: list = field(default_factory=list)
    seconds: list = field(default_factory=list)
    passes: tuple = (0.0, 0.0)

    def run(self, problem: Problem, seed: int) -> None:
        start = time.process_time()
        found = self.climb.method.run(problem.x, self.effort, seed)
        self.seconds.append(time.process_time() - start)
        self.climb.spent += self.seconds[-1]
        self.errors.append(found.log_prob.double() - problem.truth)
        self.passes = found.forward, found.backward

    def rung(self) -> Rung:
        rmse = float(torch.stack(self.errors).square().mean().sqrt())
        return Rung(self.effort, rmse, *self.passes, statistics.median(self.seconds))


def race(problem: Problem, methods: list[Method]) -> list[Climb]:
    """Return every method's climb."""
    climbs = [Climb(method, problem.cap) for method in methods]
    for climb in climbs:
        # Imports, probes and caches are nobody's seconds; who needs too long for two points does not start.
        started = _first_run(climb.method, problem) < climb.cap
        climb.stopped = "" if started else f"not started: two points take over {climb.cap} s"
    for level in range(max(len(method.ladder) for method in methods)):
        running = [_Level(c, c.method.ladder[level]) for c in climbs if _goes_on(c, level, problem)]
        for seed in range(SEEDS):
            for one in running:
                if seed == 0 or one.seconds[0] < QUICK:
                    one.run(problem, seed)
        for one in running:
            one.climb.rungs.append(one.rung())
    for climb in climbs:
        climb.stopped = climb.stopped or "end of its ladder"
    return climbs


def _first_run(method: Method, problem: Problem) -> float:
    start = time.process_time()
    method.run(problem.x[:2], method.ladder[0], 0)
    return time.process_time() - start


def _goes_on(climb: Climb, level: int, problem: Problem) -> bool:
    """Return whether a method runs its next effort; the first always does."""
    if climb.stopped or not climb.rungs:
        return not climb.stopped
    last = climb.rungs[-1]
    if last.rmse <= problem.thresholds[-1]:
        climb.stopped = "reached the last"
    elif level >= len(climb.method.ladder):
        climb.stopped = "end of its ladder"
    elif _growth(climb) * last.seconds > climb.cap or climb.spent > RUNS * climb.cap:
        climb.stopped = "time"
    elif len(climb.rungs) > 3 and last.rmse > STALLED * climb.rungs[-3].rmse:
        climb.stopped = STOPPED_BIAS
    return not climb.stopped


def _growth(climb: Climb) -> float:
    """Return how much longer the next effort should take; a solver's first tolerances may hardly make it step."""
    if len(climb.rungs) < 2:
        return 2.0
    return min(max(climb.rungs[-1].seconds / climb.rungs[-2].seconds, 1.2), 4.0 if climb.method.random else 2.0)
