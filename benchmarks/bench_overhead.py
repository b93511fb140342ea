"""What an estimate costs beside its network: `estimate` against the bare forward passes for the same B x S rows.

Both run in turns in the same process. The bare passes get the fastest of several chunk sizes; rows and times are made
beforehand and not timed. Overhead is the ratio of the medians.
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from networks import mlp, unet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastscore as fs


@dataclass(frozen=True)
class Case:
    """A network and the number of rows, B samples by S evaluations."""

    model: nn.Module
    shape: tuple[int, ...]
    samples: int
    nfe: int
    chunks: tuple[int, ...]
    rounds: int

    @property
    def rows(self) -> int:
        return self.samples * self.nfe


CASES = {
    "MLP 3 x 512, d = 64": lambda: Case(mlp(64, 512), (64,), 256, 256, (512, 1024, 2048, 4096), 7),
    "UNet2DModel, 3 x 32 x 32": lambda: Case(unet(), (3, 32, 32), 8, 64, (16, 32), 2),
}


def bare_forwards(case: Case, chunk: int):
    """Return a function that runs the network on as many rows as the estimate does."""
    x_t = torch.randn(chunk, *case.shape)
    t = torch.rand(chunk)

    @torch.no_grad()
    def run():
        for _ in range(case.rows // chunk):
            case.model(x_t, t)

    return run


def seconds(run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", CASES)
def test_overhead(benchmark, table, name):
    case = CASES[name]()
    density, x = fs.ScoreDensity(case.model, fs.LogSNR(-8, 8), "eps"), torch.randn(case.samples, *case.shape)
    estimate = partial(density.estimate, x, nfe=case.nfe, control="reference")
    found = estimate()
    # Correct before timed: another path through the same formula, at another chunk size, agrees to rounding.
    again = density.log_prob(x[:2], nfe=case.nfe, memory="200MB").detach()
    torch.testing.assert_close(again, found.log_prob[:2], rtol=1e-4, atol=1e-2)

    bare = {chunk: bare_forwards(case, chunk) for chunk in case.chunks}
    spent = {chunk: [] for chunk in bare}

    def in_turns():
        for chunk, run in bare.items():
            spent[chunk].append(seconds(run))

    benchmark.pedantic(estimate, setup=in_turns, rounds=case.rounds, warmup_rounds=1)
    chunk, best = min(((c, statistics.median(s[1:])) for c, s in spent.items()), key=lambda pair: pair[1])
    row = {
        "network": name,
        "rows": case.rows,
        "bare forwards, s": best,
        "their chunk": chunk,
        "estimate, s": benchmark.stats.stats.median,
        "ratio": benchmark.stats.stats.median / best,
    }
    table("overhead", row)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        case.model(torch.randn(1, *case.shape), torch.rand(1))
    # Beside the network a row writes its noise and x_t and reads them and the prediction again, four bytes each.
    bytes_per_row = 4 * 5 * torch.Size(case.shape).numel()
    benchmark.extra_info.update(
        row, nfe=case.nfe, flops=counter.get_total_flops() * case.rows, bytes=bytes_per_row * case.rows
    )


PEAK = """
import sys, torch, fastscore as fs
from fastscore.support.memory import peak_bytes
sys.path.insert(0, {folder!r})
from networks import unet

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10

density, x = fs.ScoreDensity(unet(), fs.LogSNR(-8, 8), "eps"), torch.randn(8, 3, 32, 32)
density.estimate(x[:1], nfe=8, memory="30MB")  # what the libraries allocate once
before = peak()
density.estimate(x, nfe=32, memory={budget})
process = peak() - before
print(process, peak_bytes(lambda: density.estimate(x, nfe=32, memory={budget})))
"""
LIBRARIES = 100_000_000  # scratch and kernels that oneDNN and the allocator keep for a batch size they have not seen


@pytest.mark.parametrize("budget", [50_000_000, 200_000_000])
def test_peak_memory(benchmark, table, budget):
    script = PEAK.format(folder=str(Path(__file__).parent), budget=budget)
    run = benchmark.pedantic(
        lambda: subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True), rounds=1
    )
    process, tensors = (int(number) for number in run.stdout.split())
    assert tensors < budget
    assert process < budget + LIBRARIES
    row = {"network": "UNet2DModel, 3 x 32 x 32", "budget, MB": budget / 1e6, "tensors' peak, MB": tensors / 1e6}
    table("memory", row | {"process's growth, MB": process / 1e6})
