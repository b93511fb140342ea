"""A repeated ODE on a GPU: one graph and some copies, no wait, no crossing, and nothing stale is replayed.

The device is pretended: a captured graph runs the captured operations again on the same memory, as a CUDA graph does.
"""

import copy
import gc
import weakref

import pytest
import torch
from pretended_device import PretendedDevice
from test_plan import CHANGES, Net, data
from test_replay import Labelled, turned

import fastscore as fs
from fastscore.densities import flow_replay, flow_steps
from fastscore.densities.flow_program import Grid
from fastscore.estimator import graphs
from fastscore.reference.gaussians import Reference

GRID = {"method": "midpoint", "steps": 2}
# Launches of a repeated call, at most: the copy of x, the graph, copies of its three results, three that make infinity
# NaN, and eight small ones: constants, their sums, the log-determinant of the data's own transform.
REPEATED = 16


@pytest.fixture
def device():
    with PretendedDevice() as pretended:
        yield pretended


def make(schedule=None, **options):
    torch.manual_seed(0)
    return fs.ScoreDensity(Net().eval().cuda(), schedule or fs.VP(), **{"predicts": "eps"} | options)


def fresh(density, x, **options):
    return list(fs.probability_flow_log_prob(copy.deepcopy(density), x, **options))


def agree(density, x, **options):
    expected = fresh(density, x, **options)
    for _ in range(3):
        for found, wanted in zip(fs.probability_flow_log_prob(density, x, **options), expected):
            # The same operations; padded rows may make another kernel of a matrix product, of other roundings.
            torch.testing.assert_close(found.cpu(), wanted.cpu(), rtol=1e-5, atol=1e-5, equal_nan=True)


COUNTED = {
    "VP, eps": {},
    "a table": {"schedule": lambda: fs.DDPM.linear(100)},
    "EDM, denoiser": {"schedule": lambda: fs.VE(0.01, 50.0), "predicts": "denoiser"},
    "a mixture": {"reference": lambda: Reference(torch.ones(2) / 2, torch.randn(2, 5), torch.ones(2, 5))},
    "cosines": {"reference": lambda: Reference(torch.ones(1), torch.randn(1, 5), torch.ones(1, 5), factors=turned(5))},
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_repeated_grid_is_one_graph_without_crossings_or_waits(device, name):
    options = dict(COUNTED[name])
    schedule = options.pop("schedule", fs.VP)()
    if "reference" in options:
        options["reference"] = options["reference"]()
    density, x = make(schedule, **options), data(3).cuda()
    for steps in (2, 16):
        for _ in range(2):
            fs.probability_flow_log_prob(density, x, method="midpoint", steps=steps)
        with device.counting() as counts:
            found = fs.probability_flow_log_prob(density, x, method="midpoint", steps=steps)
        assert (counts.crossings, counts.waits) == (0, 0)
        assert counts.launches <= REPEATED
        assert density.flows.reason is None
        assert found.nfe.tolist() == [2 * steps + 1] * 3
    assert len(density.flows.graphs()) == 2
    expected = fresh(density, x, method="midpoint", steps=16)
    assert all(torch.equal(got, wanted) or got.isnan().all() for got, wanted in zip(found, expected))


@pytest.mark.filterwarnings("ignore")
def test_doubling_asks_once_a_grid(device, monkeypatch):
    density, x = make(fs.LogSNR(-4, 4)), data(6).cuda()
    monkeypatch.setattr(flow_steps, "MAX_STEPS", 16)
    small = float(fs.probability_flow_log_prob(density, x, error=1e-9).discretization.median())
    monkeypatch.setattr(flow_steps, "MAX_STEPS", 32)
    # All samples take 4, 8 and 16 steps, and with the smaller error three of them 32, in a graph for four.
    for error, grids, rows in ((1e3, 3, {6}), (small, 4, {4, 6})):
        for _ in range(2):
            found = fs.probability_flow_log_prob(density, x, error=error)
        with device.counting() as counts:
            again = fs.probability_flow_log_prob(density, x, error=error)
        assert all(map(torch.equal, again[:1] + again[2:], found[:1] + found[2:]))
        assert {len(each.samples) for each in density.flows.graphs()} == rows
        asked = grids - 1  # after every grid but the first: which samples go on
        assert counts.waits <= asked + 1  # and whether a warning is due
        assert counts.to_device <= 2  # which samples go on, twice where their number changes twice
        # Copies, graphs and small operations: some twenty a grid.
        assert counts.launches <= 30 * grids
    agree(density, x, error=error)


# What the host keeps of a reference follows every write that PyTorch counts; it does not count one through `.data`.
OWN_CHANGES = {
    name: change for name, change in CHANGES.items() if "numpy" not in name and name != "the reference written"
}
OWN_CHANGES["the reference written"] = lambda density: density.reference.variance.mul_(2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", OWN_CHANGES)
def test_nothing_stale_is_replayed_after(device, change):
    density, x = make(), data(4).cuda()
    for _ in range(2):
        fs.probability_flow_log_prob(density, x, **GRID)
    assert len(density.flows.graphs()) == 1
    OWN_CHANGES[change](density)
    agree(density, x.double() if change == "float64" else x, **GRID)


def test_data_shapes_masks_and_conditions_in_turns(device, monkeypatch):
    torch.manual_seed(0)
    density = fs.ScoreDensity(Labelled().eval().cuda(), fs.VP(), "eps")
    mask = torch.arange(30).reshape(6, 5) % 4 > 0
    for step in range(3):
        x, label, scale = data(6, seed=step).cuda(), torch.arange(6.0).cuda() + step, torch.full((), 1.0 + step).cuda()
        cond = {"label": fs.per_sample(label), "scale": fs.shared(scale)}
        agree(density, x, **GRID, cond=cond)
        agree(density, x, **GRID, mask=mask.roll(step, 1).cuda(), cond=cond)
    assert len(density.flows.graphs()) == 2
    plain = make()
    monkeypatch.setattr(graphs, "KEPT", 2)
    for count in (1, 2, 3):
        for _ in range(2):
            fs.probability_flow_log_prob(plain, data(count).cuda(), **GRID)
    assert [len(each.samples) for each in plain.flows.graphs()] == [2, 3]


def test_a_graph_keeps_what_it_reads(device, monkeypatch):
    """A real graph has addresses alone: memory that nobody else holds would be another's by the next replay."""
    seen, on = [], Grid.on

    def noted(grid, where):
        found = on(grid, where)
        seen.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Grid, "on", noted)
    density, x = make(), data(4).cuda()
    for _ in range(2):
        fs.probability_flow_log_prob(density, x, **GRID)
    gc.collect()
    first, *captured = [reference() for reference in seen]
    assert first is None  # of a call that was evaluated and is over
    assert len(captured) > 1
    assert all(each is not None for each in captured)


def test_gradients_go_on_beside_a_graph(device):
    density, x = make(), data(4).cuda()
    agree(density, x, **GRID)
    leaf, other = (x.clone().requires_grad_() for _ in range(2))
    value = fs.probability_flow_log_prob(density, leaf, **GRID).log_prob
    assert density.flows.reason is None
    plain = fs.ScoreDensity(density.model, fs.VP(), "eps", program=False)
    expected = fs.probability_flow_log_prob(plain, other, **GRID).log_prob
    found, wanted = (torch.autograd.grad(v.sum(), y)[0].cpu() for v, y in ((value, leaf), (expected, other)))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_nan_of_a_sample_is_its_own_and_nobody_waits_for_it(device, monkeypatch):
    density, x = make(), data(4).cuda()
    agree(density, x, **GRID)
    far = x.clone()
    far[1] = 3e38
    with device.counting() as counts:
        found = fs.probability_flow_log_prob(density, far, **GRID)
    assert counts.waits == 0
    assert found.log_prob.cpu().isnan().tolist() == [False, True, False, False]
    agree(density, x, **GRID)  # nothing of it stays
    monkeypatch.setenv("FASTSCORE_CHECK", "now")
    with pytest.warns(UserWarning, match="NaN or inf for 1 of 4 samples, sample 1 the first"):
        fs.probability_flow_log_prob(density, far, **GRID)


def test_what_is_not_replayed_says_why(device, monkeypatch):
    density, x = make(), data(4).cuda()

    def reason(x=x, **options):
        for _ in range(3):
            fs.probability_flow_log_prob(density, x, **GRID | options)
        return density.flows.reason

    assert reason() is None
    assert reason(trace="hutchinson") == "backward passes take the trace, and not tangents of a row program"
    assert reason() is None
    monkeypatch.setattr(flow_replay, "MOST_TIMES", 4)
    assert reason() == "its grid has 5 times, and a graph at most 4"
    monkeypatch.undo()
    monkeypatch.setenv("FASTSCORE_GRAPHS", "0")
    assert reason() == "FASTSCORE_GRAPHS=0 is set"
    monkeypatch.delenv("FASTSCORE_GRAPHS")
    monkeypatch.setattr(graphs, "budget_bytes", lambda *_: 80)
    assert reason(steps=3).startswith("it would keep ")
    monkeypatch.undo()
    call = graphs.Captured.__call__
    monkeypatch.setattr(graphs.Captured, "__call__", lambda *of: tuple(each + 1 for each in call(*of)))
    assert reason(steps=4) == "its replay gave other numbers"
    monkeypatch.undo()

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "Graph", refuse)
    assert reason(steps=5) == "the capture failed: operation not permitted when stream is capturing"


def test_on_a_cpu_nothing_is_captured():
    torch.manual_seed(0)
    density = fs.ScoreDensity(Net().eval(), fs.VP(), "eps")
    for _ in range(3):
        fs.probability_flow_log_prob(density, data(4), **GRID)
    assert density.flows.reason == "the data are not on a GPU"
    assert density.flows.graphs() == []
