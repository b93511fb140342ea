"""The networks of real_networks.py by name, with shapes, conditions and rows, and one around an odd operation."""

import real_networks as nets
import torch
from torch import nn

import fastscore as fs
from fastscore.process.conditions import Conditions
from fastscore.process.network import predict

SCHEDULE = fs.FlowMatching(data_at=0)


def of(width):
    """Return a condition for a batch: one row of numbers a sample."""
    return lambda batch: torch.randn(batch, width, generator=torch.Generator().manual_seed(3))


# name: network, shape of the data, conditions of the samples, conditions shared by the batch
NETWORKS = {
    "MAR, a condition a token": (nets.MARHead, (5,), {"c": of(7)}, {}),
    "MAR, one condition": (nets.MARHead, (5,), {}, {"c": of(7)}),
    "MAR, no condition": (nets.MARHead, (5,), {}, {}),
    "TabDDPM": (nets.TabDDPM, (5,), {}, {}),
    "TabDDPM, labels": (nets.TabDDPM, (5,), {"y": lambda batch: torch.arange(batch) % 3}, {}),
    "TabSyn, EDM": (nets.TabSyn, (5,), {}, {}),
    "sbi VectorFieldMLP": (nets.VectorFieldMLP, (3,), {"condition": of(4)}, {}),
    "sbi AdaMLP": (nets.AdaMLP, (3,), {"condition": of(4)}, {}),
    "sbi AdaMLP, one condition": (nets.AdaMLP, (3,), {}, {"condition": of(4)}),
    "score_models": (nets.ScoreModelsMLP, (5,), {}, {}),
    "smalldiffusion": (nets.SmallDiffusion, (2,), {}, {}),
    "DPPO": (nets.DPPO, (2, 3), {"state": of(4)}, {}),
    "DPPO, residual": (lambda: nets.DPPO(residual=True), (2, 3), {"state": of(4)}, {}),
    "IDQL": (nets.IDQL, (3,), {"s": of(4)}, {}),
    "flow_matching": (nets.FlowMatchingExample, (2,), {}, {}),
    "torchcfm": (nets.TorchCFM, (2,), {}, {}),
    "super-diffusion": (nets.SuperDiffusion, (2,), {}, {}),
    "diffrax": (nets.ConcatSquash, (2,), {}, {}),
    "FiLM on images": (nets.FiLMELU, (2, 2, 3), {}, {}),
}


def make(name, dtype=torch.float32):
    """Return a network, its shape, and functions from a batch size to conditions."""
    torch.manual_seed(1)
    new, shape, own, shared = NETWORKS[name]
    net = new().to(dtype).eval()

    def conditions(given, batch):
        values = {key: value(batch) for key, value in given.items()}
        return {key: v.to(dtype) if v.is_floating_point() else v for key, v in values.items()}

    return net, shape, lambda batch: conditions(own, batch), conditions(shared, 1)


def rows_of(batch, draws, shape, dtype):
    generator = torch.Generator().manual_seed(batch + draws)
    x_t = torch.randn(batch, draws, torch.Size(shape).numel(), generator=generator, dtype=dtype)
    return x_t, torch.linspace(0.05, 0.95, draws, dtype=dtype)


def by_module(net, x_t, time, own, shared, shape):
    return predict(net, x_t, time, Conditions(own, shared), shape, None)


class Odd(nn.Module):
    """A network around one operation on (h, t)."""

    def __init__(self, operation, d=4):
        super().__init__()
        self.inp, self.out, self.operation = nn.Linear(d, 8), nn.Linear(8, d), operation
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x, t):
        return self.out(self.operation(self, self.inp(x), t))


def control_flow(net, h, t):
    return h if t.sum() > 0 else -h
