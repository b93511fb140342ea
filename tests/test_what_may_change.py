"""What a plan, a graph or a budget must not miss: an index counted up, a schedule's far corner, a layout."""

import copy

import numpy as np
import pretended_device
import pytest
import torch
from pretended_device import PretendedDevice
from pretended_dispatch import tensors_of
from test_plan import NFE, Net, data, make, numbers
from test_replay import make as make_on_device
from test_replay import replays, values
from torch import nn

import fastscore as fs
from fastscore.estimator.network_density import prepare
from fastscore.estimator.plan import Plan
from fastscore.estimator.replay import GRAPHS
from fastscore.reference.gaussians import Reference
from fastscore.support.memory import SHARES, Chunks, peak_bytes


@pytest.fixture
def device():
    with PretendedDevice() as pretended:
        yield pretended


def agrees(density, x, **options):
    expected = numbers(copy.deepcopy(density), x, **options)
    return all(map(torch.equal, numbers(density, x, **options), expected))


def agrees_on_device(density, x, **options):
    options = {"nfe": NFE, "progress": False} | options
    expected = values(copy.deepcopy(density).estimate(x, **options))
    return all(map(torch.equal, values(density.estimate(x, **options)), expected))


def replayed(density, x, **options):
    for _ in range(3):
        density.estimate(x, **({"nfe": NFE, "progress": False} | options))
    return density


@pytest.mark.parametrize("arange", [torch.arange, np.arange])
def test_an_index_that_the_caller_counts_up_is_another_one(arange):
    density, x, index = make(), data(), arange(70)
    numbers(density, x, sample_index=index)
    index += 70
    assert agrees(density, x, sample_index=index)


class Bumped(fs.VP):
    """A schedule that can be changed in a short stretch of its time alone, as a table of knots can."""

    bump, at = 0.0, -1.0

    def alpha_sigma(self, t):
        alpha, sigma = super().alpha_sigma(t)
        return alpha, sigma * (1 + self.bump * ((t - self.at).abs() < 1e-9))


def test_a_schedule_that_changes_at_one_draw_makes_new_rules():
    density, x = make(Bumped()), data()
    numbers(density, x)
    (plan,) = density.planner._plans.values()
    for group in (0, 1):
        density.schedule.at, density.schedule.bump = float(plan.draws.rules.of(group).time[5]), 0.0
        numbers(density, x)
        density.schedule.bump = 0.5
        assert agrees(density, x)


class Learned(fs.VP, nn.Module):
    time_range = (1e-5, 1.0)

    def __init__(self):
        nn.Module.__init__(self)
        fs.VP.__init__(self)
        self.gain = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def alpha_sigma(self, t):
        alpha, sigma = super().alpha_sigma(t)
        return alpha * self.gain, sigma

    __repr__ = object.__repr__


def test_a_schedule_that_learns_has_a_gradient_every_time():
    density, found = make(Learned()), []
    for _ in range(3):
        density.schedule.gain.grad = None
        density.log_prob(data(), nfe=NFE).sum().backward()
        found.append(float(density.schedule.gain.grad))
    assert found[0] != 0
    assert found[1:] == found[:1] * 2


def test_rules_lie_on_the_host_whatever_the_default_device():
    density = make()
    expected = numbers(copy.deepcopy(density), data())
    x = data()
    with torch.device("meta"):
        found = numbers(density, x)
    assert all(map(torch.equal, found, expected))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.words = Net(), nn.Linear(16, 64)

    def forward(self, x, t, text):
        return self.net(x, t) * (1 + 0.1 * torch.relu(self.words(text)).softmax(1).sum((1, 2))[:, None])


def test_a_longer_condition_keeps_to_the_memory():
    density, x = fs.ScoreDensity(Reads().eval(), fs.VP(), "eps", program=False), data(16)
    options = {"nfe": NFE, "memory": "60MB", "progress": False}
    density.estimate(x, text=fs.per_sample(torch.randn(16, 2, 16)), **options)
    text = fs.per_sample(torch.randn(16, 400, 16))
    expected = peak_bytes(lambda: copy.deepcopy(density).estimate(x, text=text, **options))
    assert peak_bytes(lambda: density.estimate(x, text=text, **options)) <= 1.05 * expected


def test_references_of_the_same_cost_have_plans_of_their_own():
    """A mixture of two in eight dimensions takes as many multiplications as one full covariance."""
    torch.manual_seed(0)
    one, basis = torch.ones(1, 8), torch.linalg.qr(torch.randn(1, 8, 8))[0]
    density, x = fs.ScoreDensity(nn_of_x(8), fs.VP(), "eps"), torch.randn(200, 8)
    density.fit(x, evaluations=30_000, progress=False)
    density.reference = Reference(torch.ones(2) / 2, torch.randn(2, 8), torch.ones(2, 8))
    density.estimate(x, nfe=32, method="elbo", progress=False)
    density.reference = Reference(torch.ones(1), 0 * one, 2 * one, basis)
    found, expected = (d.estimate(x, nfe=32, method="elbo", progress=False) for d in (density, copy.deepcopy(density)))
    assert torch.equal(found.log_prob, expected.log_prob)


def nn_of_x(d):
    class Linear(nn.Linear):
        def forward(self, x, t):
            return super().forward(x)

    return Linear(d, d).eval()


def test_what_is_kept_of_many_samples_and_many_draws_is_within_the_share():
    few, many = torch.randn(1100, 2), torch.randn(300_000, 2)
    for x, nfe, memory in ((few, 1 << 14, 64 << 20), (many, 8, 20 << 20)):
        density = fs.ScoreDensity(nn_of_x(2), fs.VP(), "eps", program=False)
        density.estimate(x, nfe=nfe, memory=memory, progress=False)
        (plan,) = density.planner._plans.values()
        rules = sum(t.nbytes for rule in plan.draws.rules._made.values() for t in vars(rule).values())
        layout = [] if plan._layout is None else plan._layout.tensors()
        assert rules + sum(t.nbytes for t in layout) <= memory // SHARES


def test_two_layouts_of_one_plan_have_rules_of_their_own():
    """One thread's rules of all groups are not those that another has made for other samples meanwhile."""
    density, x = make(), data()
    plan, layouts = prepare(density, x, NFE, 0, None, None, {})[1], []
    for index in (torch.arange(70), torch.arange(100, 170)):
        samples = prepare(density, x, NFE, 0, index, None, {})[0]
        layouts.append(plan.layout(samples))
    stacked = Plan._stacked

    class Between(tuple):
        """What is kept, which is another's as soon as it is looked at."""

        def __getitem__(self, at):
            plan._joint = (layouts[1], "another's", "another's")
            return tuple.__getitem__(self, at)

    rule, ends = stacked(plan, layouts[0], x.device)
    plan._joint = Between((layouts[0], rule, ends))
    assert stacked(plan, layouts[0], x.device) == (rule, ends)


def test_a_captured_density_in_two_threads_keeps_seeds_apart():
    density, x = make(), data(6)
    expected, other = (fs.CapturedDensity(density, x, nfe=NFE, seed=seed) for seed in (1, 2))

    class Raced(fs.CapturedDensity):
        """Another thread goes on to seed 2 as soon as this one has a plan for its own."""

        plan = property(lambda self: self.last, lambda self, plan: setattr(self, "last", other.plan))

    captured = Raced(density, x, nfe=NFE)
    assert torch.equal(captured(x, seed=1).log_prob, expected(x).log_prob)


def test_matrix_products_in_tf32_by_the_new_setting(device):
    density, x = make_on_device(), data(6).cuda()
    replayed(density, x)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        replayed(density, x)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    assert len(replays(density)) == 2


def test_a_check_at_once_is_no_replay(device, monkeypatch):
    density, x = make_on_device(), data(6).cuda()
    replayed(density, x)
    monkeypatch.setenv("FASTSCORE_CHECK", "now")
    with torch.no_grad():
        density.model.last.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or inf for sample 0"):
        density.estimate(x, nfe=NFE, progress=False)


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.time, self.last = nn.Linear(5, 5), nn.Linear(1, 5), nn.Linear(5, 5)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x) + self.time(t[:, None].to(x))))


def test_a_transposed_view_of_a_weight_is_another_weight(device):
    density, x = replayed(fs.ScoreDensity(Square().eval().cuda(), fs.VP(), "eps"), data(6).cuda()), data(6).cuda()
    density.model.first.weight.data = density.model.first.weight.data.t()
    assert agrees_on_device(density, x)


def test_a_transposed_basis_is_another_basis(device):
    basis = torch.linalg.qr(torch.randn(1, 5, 5))[0]
    reference = Reference(torch.ones(1), torch.zeros(1, 5), torch.tensor([[0.1, 1.0, 2.0, 3.0, 4.0]]), basis)
    density, x = make_on_device(reference=reference), data(6).cuda()
    replayed(density, x)
    density.reference.basis = density.reference.basis.mT
    assert agrees_on_device(density, x)


class Scaled(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x, t):
        return super().forward(x, t) * self.scale


def test_a_number_on_the_host_is_part_of_a_graph(device):
    """A kernel gets it by value when it is captured, so a real graph would go on with the old one."""
    model = Scaled().eval()
    on_host = model.scale
    model.cuda().scale = on_host
    density, x = replayed(fs.ScoreDensity(model, fs.VP(), "eps"), data(6).cuda()), data(6).cuda()
    model.scale.fill_(3.0)
    replayed(density, x)
    assert len(replays(density)) == 2


def test_another_seed_that_is_cut_otherwise_has_a_graph_of_its_own(device, monkeypatch):
    density, x = make_on_device(), data().cuda()
    replayed(density, x)
    for seed, free in enumerate(range(200 << 10, 3000 << 10, 140 << 10), 1):
        monkeypatch.setattr(pretended_device, "FREE", free)
        assert agrees_on_device(density, x, seed=seed)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(600, 8), nn.Linear(8, 600)

    def forward(self, x, t):
        return self.last(torch.tanh(self.first(x)) * t[:, None].to(x))


@pytest.mark.parametrize("memory", ["2MB", "18MB", "200MB", None])
def test_a_graph_keeps_no_more_than_its_share(device, memory):
    density, x = fs.ScoreDensity(Wide().eval().cuda(), fs.VP(), "eps"), torch.randn(40, 600).cuda()
    replayed(density, x, nfe=8, memory=memory)
    assert agrees_on_device(density, x, nfe=8, memory=memory, seed=1)
    for replay in replays(density):
        storages = {t.untyped_storage() for t in tensors_of(replay.graph.found)}
        assert replay.plan.nbytes() + sum(s.nbytes() for s in storages) <= GRAPHS * replay._loaded.chunks.kept
    assert bool(replays(density)) is (memory != "2MB")


def test_one_capture_at_a_time_that_others_may_work_beside(device, monkeypatch):
    modes, graph = [], torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **options: modes.append(options) or graph(*args, **options))
    replayed(make_on_device(), data(6).cuda())
    assert modes == [{"capture_error_mode": "thread_local"}]


class OneBuffer(nn.Module):
    """A network that writes every answer into the same memory."""

    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, x, t):
        out = self.kept.setdefault(x.shape, torch.empty_like(x))
        return out.copy_(torch.tanh(x) * t[:, None].to(x))


class NewMemory(nn.Module):
    def forward(self, x, t):
        return torch.tanh(x) * t[:, None].to(x)


@pytest.mark.filterwarnings("error")
def test_a_network_may_write_every_answer_into_the_same_memory(monkeypatch):
    chunks = Chunks(rows=16 * NFE, per_call=4 * NFE)
    monkeypatch.setattr("fastscore.estimator.planner.plan_chunks", lambda *_: chunks)
    found, expected = (
        fs.ScoreDensity(net, fs.VP(), "eps", program=False).estimate(data(16), nfe=NFE)
        for net in (OneBuffer(), NewMemory())
    )
    assert torch.equal(found.log_prob, expected.log_prob)


def test_indices_that_would_share_their_noise_are_refused():
    density, x = fs.ScoreDensity(NewMemory(), fs.VP(), "eps"), data(3)
    density.estimate(x, nfe=NFE, sample_index=torch.tensor([0, 1, (1 << 60) - 1]))
    with pytest.raises(ValueError, match=r"non-negative integers below 2\^60, .* from 0 to 1152921504606846976"):
        density.estimate(x, nfe=NFE, sample_index=torch.tensor([0, 1, 1 << 60]))
