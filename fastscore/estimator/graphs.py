"""CUDA graphs: what was launched once on fixed memory runs again as one launch, and the newest of them are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ..support.memory import budget_bytes, peak_bytes
from .samples import Samples

KEPT = 16  # of one density
SHARE = 8  # of the memory that a call may take: an eighth is what they all keep together
ONE_CAPTURE = threading.Lock()  # what a second thread warms up meanwhile would have to wait for the first
FIRST = "it was called for the first time"
_KIND = attrgetter("shape", "dtype")

Run = Callable[..., tuple[Tensor, ...]]


class Graph:
    """A function on fixed memory as one CUDA graph; `found` is what it returned at capture, and what a replay writes.

    Arguments:
        run: what to capture. It is called three times, and stays with all that it holds, since a graph has addresses.
        device: where it runs.
    """

    def __init__(self, run: Callable[[], Any], device: torch.device) -> None:
        self.device, self._run = device, run
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels and fills caches, which a capture must not do
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            self._stream, self._graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            # What other threads do with the device meanwhile, such as pinning memory, is no part of the graph.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self.found = run()

    def follow(self) -> None:
        """Let what the caller's stream does next come after the last call's copies on another one."""
        now = torch.cuda.current_stream(self.device)
        if now != self._stream:
            now.wait_stream(self._stream)
            self._stream = now

    def replay(self) -> None:
        self._graph.replay()


class Captured:
    """A function of samples and tensors as one graph, on memory of its own for a number of samples or fewer.

    Arguments:
        run: of samples and tensors, each with one row a sample; so is every tensor that it returns, or shared by all.
        samples, given: an example.
        rows: for how many samples.

    Attributes:
        nbytes: what it keeps, as measured by who made it.
    """

    def __init__(self, run: Run, samples: Samples, given: tuple[Tensor, ...], rows: int) -> None:
        every = torch.arange(rows, device=samples.device) % len(samples)
        own = samples.select(every, torch.arange(rows, device="cpu") % len(samples))
        self.samples = own = replace(own, conds=tuple(cond.copy() for cond in own.conds))
        self.given = tuple(each[every] for each in given)
        self.nbytes = 0
        self.graph, self._lock = Graph(lambda: run(self.samples, *self.given), samples.device), threading.Lock()

    def __call__(self, samples: Samples, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what the function returns for other data of the same form, the caller's own."""
        count, own = len(samples), self.samples
        with self._lock:
            self.graph.follow()
            own.x[:count].copy_(samples.x)
            if own.mask is not None:
                own.mask[:count].copy_(samples.mask)
            for mine, cond in zip(own.conds, samples.conds):
                replace(mine, per_sample={k: v[:count] for k, v in mine.per_sample.items()}).copy_(cond)
            for mine, value in zip(self.given, given):
                mine[:count].copy_(value)
            self.graph.replay()
            return tuple(each[:count].clone() for each in self.graph.found)


class Graphs:
    """The newest graphs of a density's calls: one that comes for the second time is captured, and replayed later on.

    A graph is used once its first replay has given what the call itself gives. They are no state: a copy of a density
    makes its own.

    Attributes:
        reason: why the last call ran by itself; None if it was replayed.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, Captured | str] = OrderedDict()
        self.reason: str | None = None

    def __reduce__(self) -> tuple:
        return Graphs, ()

    def call(self, key: Hashable, run: Run, samples: Samples, *given: Tensor, rows: int) -> tuple[Tensor, ...]:
        """Return run(samples, *given), by a graph where there is one.

        Arguments:
            key: all that the graph depends on, beside what it reads where it lies: parameters, and data.
            rows: how many samples a graph is made for; fewer go into the same.
        """
        found = self._seen.get(key)
        if found == FIRST:
            found = self._captured(run, samples, given, rows)
        self._seen.pop(key, None)
        self._seen[key] = FIRST if found is None else found
        while len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        if isinstance(found, Captured):
            self.reason = None
            return found(samples, given)
        self.reason = FIRST if found is None else found
        return run(samples, *given)

    def graphs(self) -> list[Captured]:
        """Return those that are kept, the oldest first."""
        return [found for found in self._seen.values() if isinstance(found, Captured)]

    def _captured(self, run: Run, samples: Samples, given: tuple[Tensor, ...], rows: int) -> Captured | str:
        """Return a graph that gives what the call gives, in whose favour older ones go; or why there is none."""
        expected: list[tuple[Tensor, ...]] = []
        kept = peak_bytes(lambda: expected.append(run(samples, *given))) * rows // len(samples)
        if kept > (most := budget_bytes(None, samples.device) // SHARE):
            return f"it would keep {kept:,} bytes, and {most:,} are the graphs' share of the memory"
        for key in [key for key, each in self._seen.items() if isinstance(each, Captured)]:
            if kept + sum(each.nbytes for each in self.graphs()) > most:
                self._seen.pop(key)
        try:
            with ONE_CAPTURE:
                captured = Captured(run, samples, given, rows)
        except RuntimeError as problem:  # what synchronizes, or does not fit into memory
            return f"the capture failed: {str(problem).splitlines()[0]}"
        for told, wanted in zip(captured(samples, given), expected[0], strict=True):
            if not torch.allclose(told, wanted, rtol=1e-4, atol=1e-4, equal_nan=True):
                return "its replay gave other numbers"
        captured.nbytes = kept
        return captured


def places_of(read: list[Tensor]) -> Hashable:
    """Return what a graph has of tensors that it reads: where and how they lie; of a number on the host, its value."""
    places = tuple(map(Tensor.data_ptr, read)), tuple(map(Tensor.stride, read))
    return *places, tuple(map(_KIND, read)), tuple(str(tensor.tolist()) for tensor in read if not tensor.is_cuda)
