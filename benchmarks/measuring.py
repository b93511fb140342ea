"""How a benchmark measures on a GPU: device time, wall time, CUDA graphs, and rows whose numbers are kept one by one.

With FASTSCORE_REHEARSE=1 every line runs on a few rows on a CPU, Triton's kernels in its interpreter; no number counts.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
from markdown import cell
from steps import report, said

REHEARSING = os.environ.get("FASTSCORE_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSING else "cuda"
if REHEARSING:  # steps are forked: what tracing a network imports, three seconds of a CPU, is imported once for all
    import torch._dynamo
    import torch._export.passes
    import torch._inductor.utils
    import torch.export._trace


class Row(dict):
    """A row of a table: each number is printed and reported as soon as it is measured, and a failing one says why.

    Arguments:
        table: the table's name.
        part: what the row is of its step's, where a step measures several.
        names: the first columns, which say what the row is about.
    """

    def __init__(self, table: str, part: str = "", **names: object):
        super().__init__(names)
        self.table, self.part, self.failed = table, part, {}

    def measure(self, column: str, run: Callable[[], object]) -> None:
        """Set a column to what a function returns, or to None if it raises; the other columns go on."""
        try:
            self[column] = run()
        except Exception as error:  # whatever a kernel, a compiler or a peer raises
            self[column] = None
            self.failed[column] = said(error)
        print(f"  {column}: {self.failed.get(column) or cell(self[column])}")
        self.tell()

    def beside(self, what: str, run: Callable[[], object]) -> None:
        """Measure what stands beside "ms", in milliseconds, and how many times as long it takes."""
        self["beside"] = what
        self.measure("its ms", run)
        self.ratio("its / ours", "its ms", "ms")

    def ratio(self, column: str, above: str, below: str) -> None:
        """Set a column to the ratio of two others, where both were measured."""
        if self.get(above) and self.get(below):
            self[column] = self[above] / self[below]
            self.tell()

    def tell(self) -> None:
        """Report the row as it is."""
        report(table=self.table, part=self.part, row=self, failed=self.failed)


def below(value: float, limit: float, what: str) -> float:
    """Return a value, or raise ValueError if it is not below its limit: what is wrong has no time."""
    if not value < limit:
        raise ValueError(f"{what} is {value:.2g}, less than {limit:.2g} is allowed")
    return value


def synchronize() -> None:
    if not REHEARSING:
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Return the median device time of run(), in milliseconds; wall time in a rehearsal."""
    if REHEARSING:
        return wall(run, 1)
    for _ in range(3):
        run()
    spent = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end))
    return statistics.median(spent)


def once(run: Callable[[], object]) -> float:
    """Return the wall time of run() with the device's work, in milliseconds."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def wall(run: Callable[[], object], rounds: int = 7) -> float:
    """Return the median wall time of run(), in milliseconds; two calls before do not count."""
    if REHEARSING:
        return once(run)
    return statistics.median([once(run) for _ in range(rounds + 2)][2:])


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """Return run() as the replay of one CUDA graph."""
    if REHEARSING:
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peak_megabytes(run: Callable[[], object]) -> float:
    """Return how much tensors on the GPU grow while run() works, in 10^6 bytes."""
    if REHEARSING:
        run()
        return 0.0
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
