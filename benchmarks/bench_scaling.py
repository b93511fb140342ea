"""How time and memory grow with samples, evaluations, dimensions, width and processes.

Time is that of one thread's processor (time.process_time): other work lengthens it less than the clock's. Sizes take
turns, and the least of each one's times counts, since whatever else the machine does, or a processor that slows down,
can only lengthen a run. The exponent is the slope of log time over log size, start-up included; a slope of 1 is linear.
Of several processes the slowest counts. Peaks are those of all tensors, beside a budget of 64 MB.
"""

import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import mlp

import fastscore as fs
from fastscore.support.memory import peak_bytes

SAMPLES, NFE, D, WIDTH = 64, 128, 64, 256
SIZES = {
    "samples": [256, 512, 1024, 2048],
    "evaluations": [512, 1024, 2048, 4096],
    "dimensions": [64, 128, 256, 512],
    "width": [128, 256, 512, 1024],
}
REPEATS, OF_PROCESSES = 5, 2
BUDGET = 64_000_000  # a quarter of it keeps what all draws share, at every size


def problem(axis: str, size: int):
    """Return a density, its data and the evaluations a sample, everything but `axis` at its usual size."""
    at = {"samples": SAMPLES, "evaluations": NFE, "dimensions": D, "width": WIDTH} | {axis: size}
    density = fs.ScoreDensity(mlp(at["dimensions"], at["width"]), fs.LogSNR(-8, 8), "eps")
    return density, torch.randn(at["samples"], at["dimensions"]), at["evaluations"]


def processor_seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def slope(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit([math.log(s) for s in sizes], [math.log(v) for v in values], 1)[0])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("axis", SIZES)
def test_growth(benchmark, table, axis):
    runs, peaks = [], []
    for size in SIZES[axis]:
        density, x, nfe = problem(axis, size)
        run = partial(density.estimate, x, nfe=nfe, memory=BUDGET)
        assert bool(run().log_prob.isfinite().all())
        peaks.append(peak_bytes(run))
        runs.append(run)
    in_turns = [[processor_seconds(run) for run in runs] for _ in range(REPEATS)]
    spent = [min(times) for times in zip(*in_turns)]
    benchmark.pedantic(runs[-1], rounds=1)
    for size, seconds, peak in zip(SIZES[axis], spent, peaks):
        _, x, nfe = problem(axis, size)
        row = {"axis": axis, "size": size, "B x S": len(x) * nfe, "processor seconds": seconds}
        row |= {"tensors' peak, MB": peak / 1e6, "budget, MB": BUDGET / 1e6}
        table("scaling", row | {"B x S x d, MB": 4e-6 * x.numel() * nfe})
    exponent = slope(SIZES[axis], spent)
    table("scaling_exponents", {"axis": axis, "from": SIZES[axis][0], "to": SIZES[axis][-1], "exponent": exponent,
                                "peak, last over first": peaks[-1] / peaks[0]})  # fmt: skip
    benchmark.extra_info.update(exponent=exponent, peaks=peaks, nfe=nfe)
    if axis in ("samples", "evaluations"):
        # A least time repeats to a tenth here, which is 0.05 in the slope over a factor of eight; half of that more.
        assert exponent < 1.08  # what does not grow, such as making the plan, makes it less than one
        # Of the budget a third is the most that values take which wait to be summed, and they grow with evaluations.
        assert max(peaks) < BUDGET / 2
    if axis == "samples":  # chunks of about the same size, whatever their number: what grows is a sum a sample
        assert peaks[-1] < 1.3 * peaks[0]


WORKER = """
import sys, time, torch, fastscore as fs
sys.path.insert(0, {folder!r})
from networks import mlp
torch.set_num_threads(1)
rank, ranks, samples = map(int, sys.argv[1:])
density = fs.ScoreDensity(mlp(64, 256), fs.LogSNR(-8, 8), "eps")
index = torch.arange(samples)[rank::ranks]
x = torch.randn(samples, 64, generator=torch.Generator().manual_seed(0))[index]
density.estimate(x[:8], nfe=64)
start = time.process_time()
result = density.estimate(x, nfe=256, sample_index=index)
print(time.process_time() - start, float(result.log_prob.sum()))
"""


def test_processes(benchmark, table):
    """Every process evaluates its share: the work of all together stays that of one, and so does the sum.

    As many run at once in every case, where one does all the work its copies, so that the clock and the caches that
    they share on this machine are the same.
    """
    folder, samples, rows = str(Path(__file__).parent), 2048, []

    def shares(ranks: int) -> list[tuple[float, float]]:
        command = [sys.executable, "-c", WORKER.format(folder=folder)]
        workers = [
            subprocess.Popen([*command, str(i % ranks), str(ranks), str(samples)], stdout=subprocess.PIPE, text=True)
            for i in range(counts[-1])
        ]
        return [tuple(map(float, w.communicate()[0].split())) for w in workers]

    counts = [n for n in (1, 2, 4) if n <= (os.cpu_count() or 1)]
    in_turns = [[shares(ranks) for ranks in counts] for _ in range(OF_PROCESSES)]
    for ranks, runs in zip(counts, zip(*in_turns)):
        longest = min(max(spent for spent, _ in run) for run in runs)
        rows.append((ranks, longest, sum(found for _, found in runs[0][:ranks])))
    benchmark.pedantic(lambda: shares(1), rounds=1)
    for ranks, longest, total in rows:
        row = {"processes": ranks, "samples": samples, "processor seconds of the slowest": longest}
        table("scaling_processes", row | {"over one": rows[0][1] / longest})
        # float32 sums of 2,048 samples in another order
        assert total == pytest.approx(rows[0][2], rel=1e-5)
    exponent = -slope([r for r, *_ in rows], [s for _, s, _ in rows]) if len(rows) > 1 else float("nan")
    benchmark.extra_info.update(exponent=exponent)
    table("scaling_exponents", {"axis": "processes", "from": 1, "to": rows[-1][0], "exponent": exponent,
                                "peak, last over first": None})  # fmt: skip
    if len(rows) > 1:
        assert abs(exponent - 1) < 0.15  # two times that repeat to a tenth each: 0.14
