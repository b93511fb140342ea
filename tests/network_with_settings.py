"""A network with a place for every kind of setting that people keep beside the weights."""

import argparse
import collections
import dataclasses
import enum
import fractions
import functools
import sys
import types

import numpy as np
import torch
from torch import nn

import fastscore as fs

SCHEDULE = fs.LogSNR(-6, 6)
SETTINGS = {"inner": {"scale": 1.0}}
MODULE = types.ModuleType("a_module_of_settings")
MODULE.scale = 1.0
sys.modules[MODULE.__name__] = MODULE


@dataclasses.dataclass
class Options:
    scale: float = 1.0
    inner: object = None


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


class Meta(type):
    level = 1.0


class OfMeta(metaclass=Meta):
    pass


class Member(enum.Enum):
    ONE = 1


Member.ONE.scale = 1.0


class Number(float):
    """A number with an attribute beside it."""


class Static:
    scale = 1.0

    @classmethod
    def value(cls):
        return cls.scale


class Sampler:
    """A plain object whose method the network calls."""

    def __init__(self):
        self.table = [1.0, 2.0]

    def factor(self):
        return self.table[0] * SETTINGS["inner"]["scale"]


class Callable:
    def __init__(self):
        self.config = {"scale": 1.0}

    def __call__(self, h):
        return h * self.config["scale"]


class Net(nn.Module):
    """An MLP whose output passes through `change(net, h)`, with a place for every kind of setting."""

    level = 1.0

    def __init__(self, change):
        super().__init__()
        torch.manual_seed(0)
        self.t, self.a, self.b = nn.Linear(1, 16), nn.Linear(3, 16), nn.Linear(16, 3)
        self.change, self.act = change, nn.SiLU()
        self.cfg = argparse.Namespace(scale=1.0, inner=types.SimpleNamespace(scale=1.0))
        self.options, self.slotted, self.sampler, self.called = (
            Options(inner=Options()),
            Slotted(),
            Sampler(),
            Callable(),
        )
        self.kept = self.sampler.factor
        self.own_number = Number(1.0)
        self.own_number.scale = 1.0
        self.number, self.text, self.numpy, self.array = 1.0, "one", np.float32(1.0), np.ones(3, np.float32)
        self.list, self.deque, self.fraction = [[1.0]], collections.deque([1.0]), fractions.Fraction(1)
        self.ordered, self.default = collections.OrderedDict(scale=1.0), collections.defaultdict(float, scale=1.0)
        self.set, self.tuple, self.free = {1.0}, (1.0, [1.0]), torch.ones(())
        self.partial, self.unregistered = functools.partial(torch.mul, other=1.0), [nn.Linear(3, 3)]
        self.unregistered.append(nn.BatchNorm1d(2000).eval())
        self.turned, self.gaps, self.repeated = torch.ones(3, 4).mT, torch.ones(90)[::30], torch.ones(1).expand(9000)
        self.large, self.spread = torch.ones(6000), torch.ones(9000)[::3000]

    @property
    def strength(self):
        return self._strength_of(self.cfg)

    def _strength_of(self, cfg):
        return cfg.inner.scale * self.level

    def forward(self, x, t):
        return self.change(self, self.b(self.act(self.a(x) + self.t(t[:, None]))))


def estimates(net, density):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    by_module = fs.ScoreDensity(net, SCHEDULE, "eps", program=False)
    return density.estimate(x, nfe=16).log_prob, by_module.estimate(x, nfe=16).log_prob
