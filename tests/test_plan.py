"""A plan used again gives what a density without any plan gives, to the bit, whatever has changed in between."""

import copy
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import fastscore as fs
from fastscore.estimator import planner
from fastscore.estimator.calibration import uncalibrated
from fastscore.estimator.nodes import FittedNodes, NodeDensity
from fastscore.estimator.rows import Rows
from fastscore.reference.gaussians import Reference

D, B, NFE = 5, 70, 16  # samples of two groups


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.time, self.first, self.last = nn.Linear(1, width), nn.Linear(D, width), nn.Linear(width, D)
        self.gain = 1.0

    def forward(self, x, t):
        return self.gain * self.last(torch.tanh(self.first(x) + self.time(t[:, None].to(x))))


def make(schedule=None, **options):
    torch.manual_seed(0)
    return fs.ScoreDensity(Net().eval(), schedule or fs.VP(), **{"predicts": "eps"} | options)


def data(count=B, seed=1):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


def numbers(density, x, **options):
    found = density.estimate(x, nfe=NFE, progress=False, **options)
    curve = found.log_snr_curve
    return [found.log_prob, found.stderr, found.variance, found.truncation_per_sample, curve.mean, curve.log_snr]


def same(density, x, **options):
    """Assert that a density that has plans answers as one that has none, and twice the same."""
    fresh = copy.deepcopy(density)  # whose plans and programs are its own
    expected = numbers(fresh, x, **options)
    for _ in range(3):
        assert all(map(torch.equal, numbers(density, x, **options), expected))
    with torch.no_grad():
        log_prob = fresh.log_prob(x, nfe=NFE, **options)
        assert torch.equal(density.log_prob(x, nfe=NFE, **options), log_prob)


def device_of(density):
    return next(density.model.parameters()).device


def optimizer_step(kind, **options):
    def change(density):
        optimizer = kind(density.model.parameters(), lr=0.1, **options)
        density.log_prob(data(3).to(device_of(density)), nfe=NFE).sum().backward()
        optimizer.step()

    return change


def write_data(density):
    for parameter in density.model.parameters():
        parameter.data.mul_(1.1)


def through_numpy(density):
    density.model.first.weight.detach().numpy()[:] *= np.float32(0.9)


def load(density, **options):
    density.model.load_state_dict({k: 0.5 * v for k, v in density.model.state_dict().items()}, **options)


def to_a_vector_and_back(density):
    vector = nn.utils.parameters_to_vector(density.model.parameters())
    nn.utils.vector_to_parameters(0.7 * vector, density.model.parameters())


def swap_an_average_in(density):
    average = torch.optim.swa_utils.AveragedModel(Net().eval().to(device_of(density)))
    for own, other in zip(density.model.parameters(), average.module.parameters()):
        own.data, other.data = other.data, own.data


def add_a_hook(density):
    density.model.last.register_forward_hook(lambda module, args, output: 2 * output)


def replace_a_layer(density):
    density.model.first = nn.Linear(D, 8).to(device_of(density))


def change_a_number(density):
    density.model.gain = 2.0


def replace_the_network(density):
    torch.manual_seed(5)
    density.model = Net().eval().to(device_of(density))


def other_reference(density):
    density.reference = Reference.isotropic(2.0)


def write_the_reference(density):
    density.reference.variance.data.mul_(2)


def write_the_nodes(density):
    density.nodes.edges.numpy()[-1] = 12.0


def other_nodes(density):
    nodes = NodeDensity.of_images(*density.log_snr_range, 0.5)
    density.nodes.load_state_dict(FittedNodes(nodes, uncalibrated()).state_dict())


def fit(density):
    density.fit(data(100, seed=3), evaluations=30_000, progress=False)


def change_the_schedule(density):
    density.schedule.beta_max *= 1.5


def replace_the_schedule(density):
    density.schedule = fs.VP(beta_max=15.0)


CHANGES = {
    "AdamW": optimizer_step(torch.optim.AdamW),
    "fused AdamW": optimizer_step(torch.optim.AdamW, fused=True),
    "fused SGD": optimizer_step(torch.optim.SGD, fused=True),
    "weights written through .data": write_data,
    "weights written through numpy": through_numpy,
    "load_state_dict": load,
    "load_state_dict(assign=True)": lambda density: load(density, assign=True),
    "vector_to_parameters": to_a_vector_and_back,
    "an average swapped in": swap_an_average_in,
    "a hook": add_a_hook,
    "a layer replaced": replace_a_layer,
    "a number of the network": change_a_number,
    "the network replaced": replace_the_network,
    "train mode": lambda density: density.train(),
    "float64": lambda density: density.double(),
    "another reference": other_reference,
    "the reference written": write_the_reference,
    "the nodes written": write_the_nodes,
    "other nodes": other_nodes,
    "a fit": fit,
    "the schedule changed": change_the_schedule,
    "the schedule replaced": replace_the_schedule,
    "another prediction": lambda density: setattr(density, "predicts", "x0"),
    "another dtype of time": lambda density: setattr(density, "time_dtype", torch.float64),
    "another noise": lambda density: setattr(density, "noise", "sobol"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", ["auto", False])
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_remains_after(change, program):
    density, x = make(program=program), data()
    before = numbers(density, x)
    same(density, x)
    CHANGES[change](density)
    same(density, x)
    changes_numbers = change not in ("train mode", "float64", "another dtype of time")
    assert torch.equal(numbers(density, x)[0], before[0]) is not changes_numbers or change == "float64"


def test_another_seed_takes_no_places_of_a_schedule_that_has_changed():
    density = make(fs.DDPM.linear(100))
    same(density, data())
    (table,) = (value for value in vars(density.schedule).values() if isinstance(value, torch.Tensor))
    table[40:60] += 0.2  # and the ends stay, so that all else of the call is as it was
    same(density, data(), seed=1)


@pytest.mark.parametrize("schedule", [fs.VP(), fs.DDPM.linear(100)], ids=["continuous", "table"])
def test_another_seed_moves_the_draws_and_places_no_strata_anew(schedule, monkeypatch):
    density, x = make(schedule), data()
    numbers(density, x)
    monkeypatch.setattr(planner, "make_rules", None)
    numbers(density, x, seed=1)
    first, second = (plan.draws.rules for plan in density.planner._plans.values())
    assert second.paired is first.paired
    assert second.shift != first.shift


@pytest.mark.parametrize("schedule", [fs.VP, lambda: fs.DDPM.linear(100)], ids=["continuous", "table"])
def test_seeds_samples_and_shapes_in_turns(schedule):
    density = make(schedule())
    calls = [
        {}, {"seed": 1}, {}, {"sample_index": torch.arange(60, 60 + B)}, {}, {"sample_index": torch.randperm(5000)[:B]},
        {"seed": 1}, {"method": "elbo"}, {"method": "discrete"}, {"method": "elbo", "seed": 2}, {"memory": "40KB"},
    ]  # fmt: skip
    for options in calls:
        if "method" in options:
            expected = numbers(copy.deepcopy(density), data(), **options)
            assert all(map(torch.equal, numbers(density, data(), **options), expected))
        else:
            same(density, data(), **options)
    for count in range(1, 2 * planner.PLANS):
        same(density, data(count))
    assert len(density.planner._plans) <= planner.PLANS


def test_a_table_that_is_written_in_place_makes_new_rules():
    density = make(fs.DDPM.linear(100))
    same(density, data())
    name, table = next((k, v) for k, v in vars(density.schedule).items() if isinstance(v, torch.Tensor))
    table.data.mul_(0.9)
    same(density, data())
    assert name


def test_rows_are_made_once(monkeypatch):
    made, of = [], Rows.of
    monkeypatch.setattr(Rows, "of", lambda network, rules, *args: made.append(len(rules)) or of(network, rules, *args))
    density, x = make(), data()
    for _ in range(3):
        density.estimate(x, nfe=NFE, progress=False)
    assert made == [1, 2]  # to measure what a row takes, and for two groups at once


def test_a_plan_keeps_no_more_than_its_share_of_the_memory():
    density, x = make(), data(2)
    density.estimate(x, nfe=1024, memory="2MB", progress=False)  # a share is 16 KB, and 1,024 points take 20 KB
    (plan,) = density.planner._plans.values()
    assert plan.nbytes() == 0
    density.estimate(x, nfe=1024, memory="200MB", progress=False)
    assert density.planner._plans.popitem()[1].nbytes() > 20 << 10


def test_two_threads_share_a_density():
    density, failures = make(), []
    expected = {seed: numbers(copy.deepcopy(density), data(), seed=seed) for seed in range(3)}

    def run(seed):
        for i in range(20):
            found = numbers(density, data(), seed=(seed + i) % 3)
            if not all(map(torch.equal, found, expected[(seed + i) % 3])):
                failures.append(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("program", ["auto", False])
def test_networks_that_were_replaced_are_let_go(program):
    density, x, old = make(program=program), data(3), []
    for seed in range(4):
        torch.manual_seed(seed)
        density.model = Net().eval()
        old.append(weakref.ref(density.model))
        for _ in range(2):
            density.estimate(x, nfe=NFE, progress=False)
    gc.collect()
    assert [model() is not None for model in old] == [False, False, program == "auto", True]  # one is kept for swaps
