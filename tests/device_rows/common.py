"""What every row of `test_every_call_on_a_device.py` is made of: the table of rows, a network, data.

A row is a function of `on`, which puts modules and tensors on the device, and says which public names it covers.
Networks are put there before a density is made around them, and nobody calls `.cuda()` on the density, as in README.
"""

from dataclasses import fields

import torch
from torch import nn

import fastscore as fs
from fastscore.reference.turning import cosines

D = 3
NFE = 24
ROWS = {}
COVERED = set()


def row(*covers, each=(None,)):
    """Add a row, or one for every value of `each`, and say which names it covers."""

    def add(call):
        COVERED.update(covers, filter(None, each))
        for value in each:
            ROWS[call.__name__ if value is None else f"{call.__name__}[{value}]"] = call, value
        return call

    return add


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """A small MLP, a row program; with a label it has tables of every level."""

    def __init__(self, d=D, width=16):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.time, self.inside, self.out = nn.Linear(1, width), nn.Linear(d, width), nn.Linear(width, d)
            self.label = nn.Embedding(4, width)

    def forward(self, x_t, t, label=None):
        h = self.inside(x_t.flatten(1)) + self.time(t[:, None].to(self.out.weight.dtype) / 1000)
        h = h if label is None else h + self.label(label)
        return self.out(torch.nn.functional.silu(h)).reshape(x_t.shape)


def network():
    """What `fastscore evaluate` builds."""
    return Net()


def of(on, schedule=None, predicts="eps", **options):
    """Return a density around a network on the device; without a row program, which takes half a second to trace."""
    return fs.ScoreDensity(on(Net()), schedule or fs.VP(), predicts, **{"program": False} | options)


def mixture_data(count, d=D):
    centre = torch.tensor([-1.0, 1.0])[torch.arange(count) % 2]
    return 0.3 * random(count, d, seed=5) + centre[:, None]


X = mixture_data(6)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
SCHEDULES = {
    "DDPM.linear": lambda: fs.DDPM.linear(100), "DDPM.scaled_linear": lambda: fs.DDPM.scaled_linear(100),
    "DDPM.cosine": lambda: fs.DDPM.cosine(100), "DDPM.from_betas": lambda: fs.DDPM.from_betas(torch.full((50,), 0.05)),
    "DDPM": lambda: fs.DDPM(torch.linspace(0.99, 0.01, 20)), "VP": fs.VP, "Cosine": fs.Cosine, "VE": fs.VE,
    "EDM": fs.EDM, "FlowMatching": fs.FlowMatching, "LiYan": fs.LiYan, "LogSNR": fs.LogSNR,
    "ConditionalFlow": lambda: fs.ConditionalFlow(0.1),
    "ContinuousDDPM": lambda: fs.ContinuousDDPM(fs.DDPM.linear(100)),
}  # fmt: skip
REFERENCES = {
    "isotropic": lambda: fs.Reference.isotropic(0.8),
    "diagonal": lambda: fs.Reference(torch.ones(1), random(1, D), random(1, D).exp()),
    "full": lambda: fs.Reference(torch.ones(1), random(1, D), random(1, D).exp(), torch.eye(D)[None]),
    "mixture": lambda: fs.Reference(torch.full((2,), 0.5), random(2, D), random(2, D).exp()),
    "mixture of full": lambda: fs.Reference(
        torch.full((2,), 0.5), random(2, D), random(2, D).exp(), torch.eye(D).expand(2, D, D)
    ),
    "mixture in cosines": lambda: fs.Reference(
        torch.full((2,), 0.5), random(2, D), random(2, D).exp(), factors=[cosines(D), *[torch.empty(0)] * 2]
    ),
}


def summary(found):
    """Return what an estimate says, in tensors and numbers."""
    names = {f.name for f in fields(found)}
    if "curve_sum" in names:  # an Estimate
        found.check()
        names = names - {"curve_sum", "faults"} | {"log_snr_curve", "discretization"}
    return {name: getattr(found, name) for name in sorted(names)}
