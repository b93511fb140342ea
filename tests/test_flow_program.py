"""The ODE by the tangents of a row program is that by backward passes, to rounding, and says where it is not taken."""

import pytest
import torch
from program_networks import NETWORKS, make
from test_reference import make as reference
from torch import nn

import fastscore as fs
from fastscore.densities import flow_field, flow_program
from fastscore.densities.flow_program import program_for
from fastscore.ops import activations, tangents
from fastscore.support import memory

pytestmark = pytest.mark.usefixtures("one_thread")

D, B = 5, 4
GRID = {"method": "midpoint", "steps": 3}


class Net(nn.Module):
    """A row program with a condition of each sample."""

    def __init__(self, d=D, act=torch.tanh):
        super().__init__()
        self.first, self.last, self.time, self.act = nn.Linear(d, 8), nn.Linear(8, d), nn.Linear(1, 8), act

    def forward(self, x, t, label=None):
        h = self.first(x) + self.time(t.to(x)[:, None])
        return self.last(self.act(h if label is None else h + label[:, None].to(h)))


def net(**options):
    torch.manual_seed(0)
    return Net(**options).double().eval()


def data(count=B, d=D):
    return torch.randn(count, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def both(model, schedule=None, reference=None, program="auto", **options):
    """Return a density whose ODE takes tangents, and one whose ODE takes backward passes."""
    options = {"predicts": "eps", "reference": reference} | options
    return [fs.ScoreDensity(model, schedule or fs.VP(), program=each, **options) for each in (program, False)]


@pytest.fixture
def backward_passes(monkeypatch):
    """A list with an entry for every batch of backward passes."""
    taken, vjp = [], flow_field.vjp
    monkeypatch.setattr(flow_field, "vjp", lambda *of, **how: (taken.append(1), vjp(*of, **how))[1])
    return taken


def agree(densities, x, passes, rtol=1e-9, **options):
    """Assert that two densities answer alike, the first without a backward pass."""
    passes.clear()
    found = fs.probability_flow_log_prob(densities[0], x, **options)
    assert not passes
    expected = fs.probability_flow_log_prob(densities[1], x, **options)
    assert passes
    # The same sums in another order, some thousand roundings of terms up to a hundred times the result.
    for got, wanted in zip(found, expected):
        torch.testing.assert_close(got, wanted, rtol=rtol, atol=rtol, equal_nan=True)


# A third of them, since each has to be traced; `tests/test_tangents.py` takes the tangents of all.
@pytest.mark.parametrize("name", list(NETWORKS)[::3])
def test_every_third_network_has_the_same_density(name, backward_passes):
    model, shape, own, shared = make(name, torch.float64)
    schedule = fs.FlowMatching(data_at=0)
    x = torch.randn(B, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cond = {k: fs.per_sample(v) for k, v in own(B).items()} | {k: fs.shared(v) for k, v in shared.items()}
    # Also those that are not worth one in an estimate: most of their work is on time and a sample's condition.
    agree(both(model, schedule, program=True), x, backward_passes, **GRID, cond=cond)


@pytest.mark.parametrize("schedule", [fs.EDM(), fs.DDPM.linear(100), fs.LogSNR(-8, 6)], ids=repr)
@pytest.mark.parametrize("predicts", ["eps", "denoiser", "v", "score"])
def test_every_schedule_and_prediction_has(schedule, predicts, backward_passes):
    agree(both(net(), schedule, predicts=predicts), data(), backward_passes, **GRID)


@pytest.mark.parametrize("kind", ["diagonal", "full", "isotropic", "turned"])
@pytest.mark.parametrize("components", [1, 3])
def test_every_reference_has(kind, components, backward_passes):
    q = fs.Reference.isotropic(1.7) if kind == "isotropic" else reference(kind, components)
    agree(both(net(), reference=q), data(), backward_passes, **GRID)


@pytest.mark.parametrize("components", [1, 3])
def test_masks_and_conditions_have(components, backward_passes, monkeypatch):
    mask, label = torch.arange(B * D).reshape(B, D) % 3 > 0, fs.per_sample(torch.arange(4.0))
    densities = both(net(), reference=reference("diagonal", components))
    agree(densities, data(), backward_passes, **GRID, mask=mask, label=label)
    agree(densities, data(), backward_passes, error=50.0, mask=mask, label=label)
    monkeypatch.setattr(flow_program, "TABLES", 1)  # one time after the other
    monkeypatch.setattr(memory, "CPU_CALL", 3 * 6 * 8 * 8)  # three samples at a time
    agree(densities, data(), backward_passes, **GRID, mask=mask, label=label)


def test_float32_has_the_same_density_to_its_own_rounding(backward_passes):
    # 2^-24 instead of 2^-53, and a network of float32 in sums of float64.
    agree(both(net().float()), data().float(), backward_passes, rtol=1e-3, **GRID)
    agree(both(net().float()), data(), backward_passes, rtol=1e-3, **GRID)


def test_gradients_are_those_of_backward_passes():
    x, (by_tangents, by_passes) = data().requires_grad_(), both(net())
    found, expected = (
        torch.autograd.grad(fs.probability_flow_log_prob(each, x, **GRID).log_prob.sum(), [x, *each.model.parameters()])
        for each in (by_tangents, by_passes)
    )
    for got, wanted in zip(found, expected):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    slope = torch.func.grad(lambda x: fs.probability_flow_log_prob(by_tangents, x, **GRID).log_prob.sum())(x.detach())
    torch.testing.assert_close(slope, expected[0], rtol=1e-9, atol=1e-9)
    with torch.inference_mode():
        assert torch.isfinite(fs.probability_flow_log_prob(by_tangents, data(), **GRID).log_prob).all()


class Curved(Net):
    def forward(self, x, t):
        return super().forward(x, t) * x.square().sum(1, keepdim=True)


def test_what_tangents_do_not_serve_says_why(monkeypatch):
    def why(model=None, d=D, trace="exact", **options):
        density, x = fs.ScoreDensity(model or net(d=d), fs.VP(), "eps", **options), data(d=d)
        found = program_for(density, density.check(x, None, {}), trace)
        return found if isinstance(found, str) else None

    assert why() is None
    assert why(trace="hutchinson") == "the trace is 'hutchinson'"
    assert why(d=tangents.MOST_DIM + 1) == f"{tangents.MOST_DIM + 1} dimensions are more than {tangents.MOST_DIM}"
    assert why(net().bfloat16()).startswith("the network computes in torch.bfloat16, ")
    assert why(program=False) == "the network is no row program: program=False is set"
    assert why(Curved().double()).startswith("the network is no row program: ")
    with torch.autocast("cpu"):
        assert why() == "the network is no row program: autocast chooses dtypes layer by layer"
    monkeypatch.setitem(activations.ACTIVATIONS, "tanh", activations.Activation(torch.tanh, torch.tanh_))
    assert why() == "the activation 'tanh' has no derivative in fastscore/ops/activations.py"
    assert f"\nexact trace of the ODE: a backward pass a dimension, since {why()}\n" in fs.explain(net(), (D,))
    monkeypatch.undo()
    assert "\nexact trace of the ODE: tangents beside each sample, in one pass\n" in fs.explain(net(), (D,))


def test_a_network_without_a_program_keeps_its_answer_where_one_is_required(backward_passes):
    torch.manual_seed(0)
    model = Curved().double().eval()
    found, expected = (
        fs.probability_flow_log_prob(fs.ScoreDensity(model, fs.VP(), "eps", program=program), data(), **GRID)
        for program in (True, False)
    )
    assert torch.equal(found.log_prob, expected.log_prob)
