"""The memory budget: measured per row, kept by the estimate, and refused where one row does not fit."""

import re

import pytest
import torch
from torch import nn

import fastscore as fs
from fastscore.estimator.network_density import prepare
from fastscore.estimator.pilot import EM_NUMBERS, choose
from fastscore.support.memory import (
    Chunks,
    Footprint,
    RowCost,
    chunk_rows,
    footprint,
    parse_bytes,
    peak_bytes,
    plan_chunks,
    steady_heap,
)

CPU = torch.device("cpu")


def test_peak_bytes_counts_what_is_alive_at_once():
    def run():
        a = torch.ones(1000)  # 4000 bytes
        b = a + 1  # 8000 alive
        del a
        c = b * 2  # again 8000
        return c.view(10, 100)  # a view is no storage

    assert footprint(run) == Footprint(peak=8000, each=4000)
    assert peak_bytes(run) == 8000


def test_peak_bytes_leaves_weights_out_and_keeps_saved_activations():
    net, x = nn.Sequential(nn.Linear(64, 512), nn.SiLU(), nn.Linear(512, 64)), torch.randn(10, 64)
    with torch.no_grad():
        assert peak_bytes(lambda: net(x)) == 10 * 2 * 512 * 4
    assert peak_bytes(lambda: net(x)) == 10 * (2 * 512 + 64) * 4


@pytest.mark.parametrize(("text", "size"), [("512MB", 512 << 20), ("2 GB", 2 << 30), ("1.5K", 1536), (10, 10)])
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("bad", ["lots", "-5MB", 0, -1])
def test_bad_budgets(bad):
    with pytest.raises(ValueError, match="memory must be"):
        parse_bytes(bad)


def test_rows_follow_the_budget():
    assert chunk_rows(1000, 50_000, CPU) == 42
    assert chunk_rows(10**9, None, CPU) == 1
    with pytest.raises(
        ValueError, match="does not hold one row of this network, which takes 1,000 bytes; give memory >= 1000"
    ):
        chunk_rows(1000, 999, CPU)


def test_a_call_of_the_network_holds_5_megabytes_or_what_makes_its_operators_worth_calling():
    def rows(row, each, memory="100MB"):
        return plan_chunks(RowCost(row=row, each=each, draw=0), 0, 64, memory, CPU).per_call

    assert rows(65_500, 16 << 10) == (5 << 20) // (65_500 + 36)  # few large operators, and the sum's 36 bytes
    assert rows(65_500, 1 << 10) == 384  # many small ones: each writes 384 KiB
    # All that a smaller budget holds: 85 % of what the nodes' 192 and the sum's 36 bytes a draw leave of it.
    assert rows(65_500, 1 << 10, "20MB") == int(0.85 * ((20 << 20) - 64 * (192 + 36))) // 65_536


class Skips(nn.Module):
    """Many small layers, whose outputs all live until the end, as in a small U-Net; counts its rows a call."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(200))
        self.rows = []

    def forward(self, x, t):
        self.rows.append(len(x))
        kept = [x]
        for layer in self.layers:
            kept.append(layer(kept[-1]).tanh())
        return sum(kept) / len(kept)


@torch.no_grad()
def test_a_network_of_many_small_operators_is_called_with_more_rows():
    net = Skips()
    density = fs.ScoreDensity(net, fs.VP(), "eps", program=False)
    x = torch.randn(2048, 32)
    density.estimate(x, nfe=16)
    # An output is 128 bytes and 200 of them live at once: 5 MiB are 200 rows and would write 26 KB an operator. 384 KiB
    # are 3,072 rows, and the whole chunk of 36 MiB has 1,400.
    calls = net.rows[8:]  # without the probes of memory, of rows, of the least noise and of both ends
    assert sum(calls) == 2048 * 16
    assert max(calls) <= (36 << 20) // (200 * 128)
    assert min(calls) > 1000


@torch.no_grad()
def test_calls_of_a_chunk_are_equal(monkeypatch):
    net = Skips()
    chunks = Chunks(rows=21 * 16, per_call=15 * 16)
    monkeypatch.setattr("fastscore.estimator.planner.plan_chunks", lambda *_: chunks)
    fs.ScoreDensity(net, fs.VP(), "eps", program=False).estimate(torch.randn(42, 32), nfe=16)
    assert net.rows[8:] == [11 * 16, 10 * 16] * 2  # and not 15 and 6


class Wide(nn.Module):
    """A network whose activations are large, so that the budget decides."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 4096), nn.Linear(4096, 8)

    def forward(self, x, t):
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(("schedule", "predicts"), [(fs.VP(), "eps"), (fs.FlowMatching(), "flow")])
@pytest.mark.parametrize("rows", [4, 6, 40])
def test_a_first_call_asks_the_network_within_the_budget(schedule, predicts, rows):
    # A row writes 4,096 floats twice. Nothing asks for fewer than the four rows that the memory of one is measured on;
    # the checks of the network, which want 24 and more, take as many at once as the budget has.
    budget = rows * 2 * 4096 * 4 + 100_000  # weights of the draws and sums
    density = fs.ScoreDensity(Wide(), schedule, predicts, program=False)
    assert peak_bytes(lambda: density.estimate(torch.randn(3, 8), nfe=16, memory=budget)) < budget


class Identity(nn.Module):
    def forward(self, x, t):
        return x


class Narrow(nn.Linear):
    """A network that takes next to nothing, so that what every draw takes decides."""

    def __init__(self):
        super().__init__(8, 8)

    def forward(self, x, t):
        return super().forward(x)


@pytest.mark.parametrize("budget", [1 << 20, 8 << 20])
def test_estimate_stays_within_its_budget(budget):
    density, x = fs.ScoreDensity(Wide(), fs.LogSNR(-4, 4), "eps"), torch.randn(200, 8)
    density.estimate(x[:2], nfe=16)
    peak = peak_bytes(lambda: density.estimate(x, nfe=64, memory=budget))
    # Beside the chunk there are the data, their shifts and one number a draw: 200 x (8 x 4 x 3 + a few) bytes.
    assert budget / 4 < peak < budget + 200_000


@pytest.mark.parametrize("noise", ["independent", "sobol"])
@pytest.mark.parametrize("samples", [1, 40])
def test_so_does_one_of_many_evaluations(noise, samples):
    density = fs.ScoreDensity(Narrow(), fs.LogSNR(-4, 4), "eps", noise=noise)
    x, budget = torch.randn(samples, 8), 4 << 20
    density.estimate(x[:1], nfe=16)
    # 8,192 draws: their points, times, weights and sums are most of the budget, all of it counted.
    assert budget / 8 < peak_bytes(lambda: density.estimate(x, nfe=8192, memory=budget)) < budget
    least = r"memory=1048576 does not hold .*, and [\d,]+ bytes that the draws take; give memory >= (\d+) or a smaller"
    with pytest.raises(ValueError, match=least) as refused:
        density.estimate(x, nfe=8192, memory=1 << 20)
    enough = int(re.search(least, str(refused.value))[1])
    assert prepare(density, x, 8192, 0, None, enough, {})[1].chunks.rows >= 1  # plans, and is not refused


def test_noise_is_counted_where_it_is_kept_alone():
    """Unfitted, "auto" draws independent noise, whose points need not all be there at once."""
    x, budget = torch.randn(1, 784), 16 << 20  # Sobol's points of 8,192 draws in 784 dimensions take 25.7 MB
    auto, sobol = (fs.ScoreDensity(Identity(), fs.LogSNR(-4, 4), "eps", noise=noise) for noise in ("auto", "sobol"))
    assert peak_bytes(lambda: auto.estimate(x, nfe=8192, memory=budget)) < budget
    with pytest.raises(ValueError, match="bytes that the draws take"):
        sobol.estimate(x, nfe=8192, memory=budget)


def test_gradients_stay_within_the_budget_too():
    density, x = fs.ScoreDensity(Wide(), fs.LogSNR(-4, 4), "eps"), torch.randn(100, 8)
    weights = sum(p.numel() * p.element_size() for p in density.parameters())

    def run():
        density.log_prob(x, nfe=64, memory=2 << 20).sum().backward()

    run()
    density.zero_grad(set_to_none=True)
    # The backward pass of a chunk holds its activations and their gradients, and accumulates those of the weights.
    assert peak_bytes(run) < 2 * (2 << 20) + 4 * weights + 300_000


@pytest.mark.filterwarnings("ignore:on these data the network")
def test_so_does_a_fit():
    """Large images, whose mixtures have tables of every row: the pilot takes as many rows as the budget holds."""
    x = torch.randn(25, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    density, budget = fs.ScoreDensity(Scaled(), fs.VP(), "eps", program=False), 16 << 20
    x[:, :, :32] *= 0.1
    steady_heap()  # once a process
    peak = peak_bytes(lambda: density.fit(x, reference="images", evaluations=1600, memory=budget, progress=False))
    assert float(density.nodes.edges.diff().min()) < 1  # the pilot's bins
    # Beside the budget the samples are there, and the 20 that are not held out several times in float64.
    assert peak < budget + 6 * x.numel() * 8
    assert len(choose(10_000, x[0].numel(), 0)) * x[0].numel() <= 1.25 * EM_NUMBERS


class Scaled(nn.Module):
    def forward(self, x_t, t):
        return 0.5 * x_t
