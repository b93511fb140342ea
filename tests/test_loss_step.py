"""A training step with `density_loss` on a pretended GPU: what it launches beside a plain one, and that none waits."""

from types import SimpleNamespace

import pytest
import torch
from pretended_device import PretendedDevice
from torch import nn

import fastscore as fs
from fastscore.ops import loss, noise
from fastscore.ops import torch as definitions

D = 6
OPS = ("loss_rows", "loss_difference", "loss_gradient")
# Of a plain eps-loss step of the same network.
MOST = 1.09


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, 3 * width)

    def forward(self, h, time):
        shift, scale, gate = self.modulation(time).chunk(3, -1)
        return h + gate * self.second(nn.functional.silu(self.first(self.norm(h) * (1 + scale) + shift)))


class AdaLN(nn.Module):
    """A head as of MAR, three blocks deep: 127 launches forward and backward."""

    def __init__(self, d=D, width=16, depth=3):
        super().__init__()
        self.into, self.out = nn.Linear(d, width), nn.Linear(width, d)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x, t):
        time, h = self.time(t[:, None].to(x)), self.into(x)
        for block in self.blocks:
            h = block(h, time)
        return self.out(h)


def plain_step(net, x):
    t = torch.rand(len(x), device=x.device)
    alpha, sigma = 1 - t, t
    eps = torch.randn_like(x)
    (net(alpha[:, None] * x + sigma[:, None] * eps, t) - eps).square().mean().backward()


@pytest.fixture
def device():
    with PretendedDevice() as pretended:
        yield pretended


@pytest.fixture
def kernels(device, monkeypatch):
    """Count the words of the noise, and what stands around the network, as one launch each, as on a GPU."""
    monkeypatch.setattr(noise, "words", device.as_kernel(noise.words))
    bodies = {name: device.as_kernel(getattr(definitions, name)) for name in OPS}
    monkeypatch.setattr(loss, "select", lambda *_: "triton")
    monkeypatch.setattr(loss, "implementation", lambda _: SimpleNamespace(**bodies))


@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"draws": 3}, {"draws": 2, "antithetic": True}])
@pytest.mark.parametrize(
    ("schedule", "predicts"), [(fs.VP(), "eps"), (fs.DDPM.linear(100), "v"), (fs.FlowMatching(), "flow")]
)
def test_a_step_launches_hardly_more_than_a_plain_one(device, kernels, schedule, predicts, options):
    torch.manual_seed(0)
    net, x = AdaLN().cuda(), torch.randn(8, D).cuda()
    density = fs.ScoreDensity(net, schedule, predicts)
    fs.density_loss(density, x, seed=0, **options).backward()
    with device.counting() as plain:
        plain_step(net, x)
    with device.counting() as counts:
        fs.density_loss(density, x, seed=1, **options).backward()
    assert (counts.to_host, counts.waits) == (0, 0)
    assert counts.to_device == 1  # the numbers of the rows, their times, and the samples' indices
    assert counts.launches <= MOST * plain.launches, (counts.launches, plain.launches)
