"""An estimate in one CUDA graph: the launches of a whole call become one.

A graph runs the same kernels on the same memory again. Everything that may be another at the next call therefore has
memory of its own here: the data, their conditions, and the tables of a plan, into which those of another seed are
copied. Parameters of the network and of the reference are read where they lie, and what the network makes of the times
and of its weights is evaluated inside the graph, so that a step of an optimizer counts, however it was written.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from ..program.settings import of_matrix_products
from ..reference.picking import Picked
from ..support.memory import peak_bytes
from .estimate import Estimate
from .estimator import Estimator
from .graphs import FIRST, ONE_CAPTURE, Graph, places_of
from .methods import DENSITY
from .plan import Plan
from .planner import Wanted
from .round import Numbers, Round
from .samples import Samples, deferred

KEPT = 8
GRAPHS = 32  # shares of the memory that all graphs of a density may keep: a quarter


class Replay:
    """One estimate of a fixed shape, again and again; on a CPU without a graph, with the same answer.

    Arguments:
        estimator: what is evaluated; it stays.
        samples: data of the shape to come, and the conditions.
        plan: of the first seed.
    """

    def __init__(self, estimator: Estimator, samples: Samples, plan: Plan) -> None:
        self.estimator, self.model, self.nbytes = estimator, estimator.network.model, 0
        self.graph: Graph | None = None
        if samples.x.is_cuda:
            self.samples = replace(samples, x=samples.x.clone(), conds=tuple(cond.copy() for cond in samples.conds))
            self.plan, self._loaded = plan.copy(samples), plan
            self._lock = threading.Lock()
            self._capture()

    def __call__(self, samples: Samples, plan: Plan) -> tuple[Round, Numbers]:
        """Return a round and its numbers, the caller's own, for other data and conditions of the same shape."""
        if self.graph is None:
            return self._run(samples, plan)
        with self._lock:
            self.graph.follow()
            self.samples.x.copy_(samples.x)
            for own, given in zip(self.samples.conds, samples.conds):
                own.copy_(given)
            if plan is not self._loaded:
                self.plan.copy_(plan, samples)
                self._loaded = plan
            self.graph.replay()
            found, numbers = self.graph.found
            return found.copy(self.plan.log_snr(self.samples)), numbers.copy()

    def _run(self, samples: Samples, plan: Plan) -> tuple[Round, Numbers]:
        found = self.estimator.evaluate(samples, plan, _nobody)
        return found, self.estimator.numbers(found, samples)

    def _capture(self) -> None:
        self.graph = Graph(lambda: self._run(self.samples, self.plan), self.samples.device)


class Replays:
    """The newest replays of a density: a call that comes for the second time is captured, and replayed from then on.

    A graph is used once its first replay has given what the call itself gives. They are no state: a copy of a density
    makes its own.

    Attributes:
        reason: why the last call ran by itself; None if it was replayed.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, Replay | str] = OrderedDict()
        self._last: Last | None = None
        self.reason: str | None = None

    def __reduce__(self) -> tuple:
        return Replays, ()

    def again(self, parts: tuple, samples: Samples, wanted: Wanted) -> Last | None:
        """Return the last call if it was replayed, this one asks for the same, and all is as it was; None else.

        It spares what else comes between a checked call and its replay: programs, a plan and the search for a graph.

        Arguments:
            parts: what the call is made of, the same objects or not.
        """
        last = self._last
        return last if last is not None and last.holds(parts, samples, wanted) else None

    def find(self, parts: tuple, estimator: Estimator, samples: Samples, plan: Plan, wanted: Wanted) -> Replay | None:
        """Return the replay of such a call, None where it has to run by itself; `parts` as in `again`."""
        self.reason, self._last = why_not(estimator, samples, plan), None
        if self.reason is not None:
            return None
        key, network, most = depends_on(estimator, samples, plan), estimator.network, GRAPHS * plan.chunks.kept
        found = self._seen.get(key)
        if found == FIRST:
            found = _capture(estimator, samples, plan)
        self._seen.pop(key, None)
        kept = list(self._seen.items())
        for other in [k for k, each in kept if isinstance(each, Replay) and each.model is not network.model]:
            self._seen.pop(other, None)
        self._seen[key] = FIRST if found is None else found
        while len(self._seen) > KEPT or sum(getattr(kept, "nbytes", 0) for kept in self._seen.values()) > most:
            self._seen.popitem(last=False)
        replay = found if isinstance(found, Replay) else None
        self.reason = None if replay else self._seen.get(key)
        if replay is not None:
            self._last = Last(parts, wanted, estimator, plan, replay, key, estimator.nodes.values(), _around(samples))
        return replay


class Last(NamedTuple):
    """The last replayed call: what it asked for, what came of that, and all that it depended on."""

    parts: tuple
    wanted: Wanted
    estimator: Estimator
    plan: Plan
    replay: Replay
    key: Hashable
    nodes: tuple[bytes, ...]
    around: Hashable

    def __call__(self, samples: Samples) -> Estimate:
        found, numbers = self.replay(samples, self.plan)
        return self.estimator.report(found, samples, self.wanted, numbers)

    def holds(self, parts: tuple, samples: Samples, wanted: Wanted) -> bool:
        """Return whether a call asks for the same, and would get the same programs, plan and graph."""
        estimator, plan = self.estimator, self.plan
        return (
            all(map(is_, parts, self.parts))
            and wanted == self.wanted
            and _around(samples) == self.around
            and estimator.nodes.values() == self.nodes
            and plan.draws.rules.hold()
            and not any(program.watch.changed() for program in estimator.programs)
            and why_not(estimator, samples, plan) is None
            and depends_on(estimator, samples, plan) == self.key
        )


def why_not(estimator: Estimator, samples: Samples, plan: Plan) -> str | None:
    """Return the reason why such a call is not replayed as one CUDA graph, None if there is none."""
    if not samples.x.is_cuda:
        return "the data are not on a GPU"
    if os.environ.get("FASTSCORE_GRAPHS") == "0":
        return "FASTSCORE_GRAPHS=0 is set"
    if not deferred(samples.device):
        return "FASTSCORE_CHECK=now is set, and looks at every chunk"
    if torch.cuda.is_current_stream_capturing():
        return "the caller captures a graph already"
    if estimator.method is not DENSITY:
        return f"the method is {estimator.method.name!r}"
    if samples.mask is not None:
        return "a mask is given"
    if isinstance(estimator.reference, Picked):
        return "the reference is fitted to every sample's own draws"
    if any(program is None for program in estimator.programs):
        return "the network is no row program, and what it reads may change between two calls"
    if any(isinstance(v, Tensor) and not v.is_cuda for cond in samples.conds for v in cond.shared.values()):
        return "a condition lies on the host"
    cuts = plan.layout(samples).cuts
    if any(len(cut.spans) > 1 or cut.at_once < len(cut.here) for cut in cuts):
        return "it is evaluated in several chunks"
    return None


def depends_on(estimator: Estimator, samples: Samples, plan: Plan) -> Hashable:
    """Return what the graph of a call depends on, beside the numbers that it reads where they lie."""
    model = estimator.network.model
    read = [*model.parameters(), *model.buffers()] if None in estimator.programs else []
    read += [tensor for program in estimator.programs if program is not None for tensor in program.reads()]
    conditions = tuple(
        (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, type(value), value)
        for cond in samples.conds
        for name, value in sorted((cond.per_sample | cond.shared).items())
    )
    return (
        plan.family,
        samples.index.numpy().tobytes(),
        plan.layout(samples).stack is None,
        tuple(map(id, estimator.programs)),
        places_of(read),
        places_of(own := estimator.reference.tensors()),
        tuple(None if q.is_inference() else q._version for q in own),
        conditions,
        torch.are_deterministic_algorithms_enabled(),
        of_matrix_products(),
    )


def _around(samples: Samples) -> Hashable:
    """Return what else a call's programs and plan were chosen by: the form of the data, and the modes of PyTorch."""
    return (
        *(samples.shape, samples.x.shape, samples.x.dtype, samples.device, samples.mask is None),
        tuple(cond.structure and cond.structure.key for cond in samples.conds),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled(samples.device.type),
    )


def _nobody(count: int) -> None:
    """Hear of a chunk's samples, for a call that shows no progress."""


def _capture(estimator: Estimator, samples: Samples, plan: Plan) -> Replay | str:
    """Return a replay that gives what the call gives, or the reason why there is none."""
    kept = plan.nbytes() + peak_bytes(lambda: estimator.numbers(estimator.evaluate(samples, plan, _nobody), samples))
    if kept > (most := GRAPHS * plan.chunks.kept):
        return f"it would keep {kept:,} bytes, and {most:,} are the graphs' share of the memory"
    try:
        with ONE_CAPTURE:
            found = Replay(estimator, samples, plan)
    except RuntimeError as problem:  # what synchronizes, or does not fit into memory
        return f"the capture failed: {str(problem).splitlines()[0]}"
    _, (expected, _) = found._run(samples, plan)
    _, (told, _) = found(samples, plan)
    if not torch.allclose(told, expected, rtol=1e-4, atol=1e-4, equal_nan=True):
        return "its replay gave other numbers"
    found.nbytes = kept
    return found
