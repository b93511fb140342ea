"""Something new takes the places that docs/architecture.md lists; here one of each is added, in the least of them."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from analytic import ExactNet, mixture
from torch import Tensor, fx, nn

import fastscore as fs
from fastscore.adapters.checks import expect_attributes
from fastscore.estimator.network_density import network_of
from fastscore.ops import activations, instructions, interpreter
from fastscore.ops.select import implementation
from fastscore.ops.task import Task
from fastscore.program.chain import Value
from fastscore.program.matching import Matcher

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()


def test_the_page_lists_three_places_at_most():  # the kernels of two languages are one each, with their names
    rows = re.findall(r"^\| ([a-z].*?) \| (.*) \|$", PAGE.split("## Where something new goes")[1], re.M)
    places = {name: where.count(";") + 1 for name, where in rows if name != "new"}
    assert {"schedule", "prediction", "activation of row programs", "instruction of row programs", "adapter"} < set(
        places
    )
    assert max(places.values()) <= 3, places


class Sine(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x, t):
        return self.last(torch.sin(self.first(x) + t[:, None].to(x.dtype)))


def test_an_activation_is_a_line(monkeypatch):
    """Without its formula in a kernel, kernels decline it by themselves and PyTorch runs it."""
    torch.manual_seed(0)
    net, x = Sine().eval(), torch.randn(5, 4)
    expected = fs.ScoreDensity(net, fs.VP(), "eps", program=False).estimate(x, nfe=16)
    assert "is no instruction" in fs.explain(net, (4,))
    monkeypatch.setitem(activations.ACTIVATIONS, "sin", activations.Activation(torch.sin, torch.sin_))
    assert "sin 16" in fs.explain(net, (4,))
    density = fs.ScoreDensity(net, fs.VP(), "eps", program=True)
    torch.testing.assert_close(density.estimate(x, nfe=16).log_prob, expected.log_prob, rtol=1e-5, atol=1e-4)
    pytest.importorskip("triton")
    assert implementation("triton").why_not_fused(task_of(density, x)) == "its kernels have no sin"


def task_of(density: fs.ScoreDensity, x: Tensor) -> Task:
    (program,) = network_of(density).find_programs(density.check(x, None, {}))
    return Task.of(program.code, program.at(torch.rand(4)).weights, program.levels, 4, x.device, 1, False)


class Glu(NamedTuple):
    """h = a sigmoid(b) for the halves a and b of h: half as wide as before."""


class Clamp(NamedTuple):
    """h = min(max(h, low), high)."""

    low: float
    high: float


def on_glu(self: Matcher, node: fx.Node) -> Value:
    value = self.values[node.args[0]]
    return Value(self.next(Glu(), value, node, value.width // 2))


def on_clamp(self: Matcher, node: fx.Node) -> Value:
    return Value(self.next(Clamp(*node.args[1:]), self.values[node.args[0]], node))


@pytest.fixture(params=["glu", "clamp"])
def addition(request, monkeypatch):
    """A new instruction in the three places of the page, and a network that uses it between layers with a residual."""
    name, kind, compute, match, width, function = {
        "glu": ("glu", Glu, lambda op, h: F.glu(h), on_glu, 32, F.glu),
        "clamp": ("clamp", Clamp, lambda op, h: h.clamp(*op), on_clamp, 16, lambda h: h.clamp(-0.5, 0.75)),
    }[request.param]
    torch.manual_seed(0)
    net = Residual(function, width).eval()
    assert "is no instruction" in fs.explain(net, (4,))
    monkeypatch.setitem(instructions.INSTRUCTIONS, name, kind)
    monkeypatch.setitem(interpreter.COMPUTE, kind, compute)
    monkeypatch.setattr(Matcher, f"on_{name}", match, raising=False)
    return name, net


class Residual(nn.Module):
    """One layer with a function of its answer, twice: the second on top of the first."""

    def __init__(self, function, width: int):
        super().__init__()
        self.function = function
        self.time = nn.Linear(1, 16)
        self.layers = nn.ModuleList([nn.Linear(4, width), nn.Linear(16, width)])
        self.last = nn.Linear(16, 4)

    def forward(self, x, t):
        first, second = self.layers
        h = self.function(first(x)) + self.time(t[:, None].to(x.dtype))
        return self.last(h + self.function(second(torch.tanh(h))))


def test_an_instruction_is_a_name_a_formula_and_a_method(addition):
    """The program's numbers are the network's, with gradients too, and kernels decline it by themselves."""
    name, net = addition
    assert f"{name} 16" in fs.explain(net, (4,))
    x = torch.randn(5, 4, dtype=torch.float64)
    by_program, by_network = (
        fs.ScoreDensity(net.double(), fs.VP(), "eps", program=program) for program in (True, False)
    )
    expected = by_network.estimate(x, nfe=16).log_prob
    # Sums of 16 draws of 4 dimensions, in another order.
    torch.testing.assert_close(by_program.estimate(x, nfe=16).log_prob, expected, rtol=1e-12, atol=1e-10)
    slopes = [slope_of(density, x) for density in (by_program, by_network)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)
    assert slopes[0].abs().max() > 1e-3
    pytest.importorskip("triton")
    task = task_of(by_program, x)
    for backend, dtype in (("triton", torch.float32), ("cuda", torch.bfloat16)):
        assert implementation(backend).why_not_fused(task._replace(dtype=dtype)) == f"its kernels have no {name}"
    assert implementation("triton").why_not_dx(task._replace(dtype=torch.float32)) == f"its kernels have no {name}"


def slope_of(density: fs.ScoreDensity, x: Tensor) -> Tensor:
    """Return the gradients of a log-density with respect to the data and the first layer, in one row."""
    x = x.clone().requires_grad_()
    weight = density.model.layers[0].weight
    return torch.cat([v.flatten() for v in torch.autograd.grad(density.log_prob(x, nfe=16).sum(), (x, weight))])


class Cubic(fs.LogSNR):
    """Log-SNR u^3 + u at time u: a new schedule says its log-SNR, its inverse, and where it begins and ends."""

    def __init__(self):
        super().__init__()
        self.time_range = (2.3, -2.3)

    def log_snr(self, t):
        return t.double() ** 3 + t.double()

    def time(self, log_snr):
        root = (log_snr / 2 + (log_snr**2 / 4 + 1 / 27).sqrt()).double()
        first = root.sign() * root.abs() ** (1 / 3)
        return first - 1 / (3 * first)


def test_a_schedule_is_a_class():
    target = mixture(2)
    x = target.sample(64).float()
    found = fs.ScoreDensity(ExactNet(target, Cubic()), Cubic(), "eps").estimate(x, nfe=512)
    error = (found.log_prob.double() - target.log_prob(x.double())).mean()
    # The mean of 64 estimates, by what they state themselves.
    assert abs(float(error)) < 4 * float(found.variance.mean().sqrt()) / 8 + found.truncation


def from_mine(model: nn.Module, **options) -> fs.ScoreDensity:
    """An adapter reads a library's own object and makes a density of it."""
    expect_attributes(model, ("log_snr_range",), "model", "a network of my library", "train it there")
    return fs.ScoreDensity(model, fs.LogSNR(*model.log_snr_range), "eps", **options)


def test_an_adapter_is_a_function():
    target = mixture(2)
    schedule = fs.LogSNR(-8, 8)
    net = ExactNet(target, schedule)
    net.log_snr_range = (-8, 8)
    with pytest.raises(TypeError, match="model must be a network of my library, got Linear without log_snr_range"):
        from_mine(nn.Linear(2, 2))
    x = target.sample(8).float()
    expected = fs.ScoreDensity(net, schedule, "eps").estimate(x, nfe=32).log_prob
    assert torch.equal(from_mine(net).estimate(x, nfe=32).log_prob, expected)
