"""Something new takes the places that docs/architecture.md lists, three at most; here one of each is added."""

import re
from pathlib import Path

import pytest
import torch
from analytic import ExactNet, mixture
from torch import nn

import fastscore as fs
from fastscore.adapters.checks import expect_attributes
from fastscore.ops import activations
from fastscore.ops.select import implementation
from fastscore.ops.task import Task

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()


def test_the_page_lists_three_places_at_most():
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
    expected = fs.ScoreDensity(net, fs.VP(), program=False).estimate(x, nfe=16)
    assert "is no instruction" in fs.explain(net, (4,))
    monkeypatch.setitem(activations.ACTIVATIONS, "sin", activations.Activation(torch.sin, torch.sin_))
    assert "sin 16" in fs.explain(net, (4,))
    density = fs.ScoreDensity(net, fs.VP(), program=True)
    torch.testing.assert_close(density.estimate(x, nfe=16).log_prob, expected.log_prob, rtol=1e-5, atol=1e-4)
    (program,) = density.network.find_programs(density.check(x, None, {}))
    task = Task.of(program.code, program.at(torch.rand(4)).weights, program.levels, 4, x.device, 1, False)
    pytest.importorskip("triton")
    assert implementation("triton").why_not_fused(task) == "its kernels have no sin"


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
    found = fs.ScoreDensity(ExactNet(target, Cubic()), Cubic()).estimate(x, nfe=512)
    error = (found.log_prob.double() - target.log_prob(x.double())).mean()
    # The mean of 64 estimates, by what they state themselves.
    assert abs(float(error)) < 4 * float(found.variance.mean().sqrt()) / 8 + found.truncation


def from_mine(model: nn.Module, **options) -> fs.ScoreDensity:
    """An adapter reads a library's own object and makes a density of it."""
    expect_attributes(model, ("log_snr_range",), "model", "a network of my library", "train it there")
    return fs.ScoreDensity(model, fs.LogSNR(*model.log_snr_range), **options)


def test_an_adapter_is_a_function():
    target = mixture(2)
    schedule = fs.LogSNR(-8, 8)
    net = ExactNet(target, schedule)
    net.log_snr_range = (-8, 8)
    with pytest.raises(TypeError, match="model must be a network of my library, got Linear without log_snr_range"):
        from_mine(nn.Linear(2, 2))
    x = target.sample(8).float()
    expected = fs.ScoreDensity(net, schedule).estimate(x, nfe=32).log_prob
    assert torch.equal(from_mine(net).estimate(x, nfe=32).log_prob, expected)
