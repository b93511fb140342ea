"""Conditions of every shape that hold the mean of a Gaussian, the exact network of it, and its density."""

import argparse
import collections
import dataclasses
import types
import typing

import torch
import torch.utils._pytree as pytree
from torch import nn

import fastscore as fs

SCHEDULE = fs.LogSNR(-10, 10)
D = 4
MEAN = torch.linspace(-2, 2, 12)


class Pair(typing.NamedTuple):
    mean: object
    other: object = 7


@dataclasses.dataclass(frozen=True)
class Given:
    mean: object
    width: int = 3


class Bag(collections.UserDict):
    """A mapping that pytree does not know."""


class Output(collections.OrderedDict):
    """Registered without names of its entries, as the outputs of diffusers' models are."""


class State:
    """Neither a mapping nor its attributes, and registered without names."""

    def __init__(self, *held):
        self.held = held


pytree.register_pytree_node(Output, lambda o: (list(o.values()), list(o)), lambda held, names: Output(zip(names, held)))
pytree.register_pytree_node(State, lambda state: (list(state.held), None), lambda held, _: State(*held))


class Moved(nn.Module):
    """The exact network of N(mean, 1/4) in every dimension, the mean found in whatever the condition is."""

    def __init__(self, find):
        super().__init__()
        self.find = find

    def forward(self, x, t, added=None, **more):
        mean = self.find(added, more)
        alpha, sigma = SCHEDULE.alpha_sigma(t)
        mean = mean.double().reshape(-1, 1)
        eps = sigma[:, None] * (x.double() - alpha[:, None] * mean) / (alpha[:, None] ** 2 / 4 + sigma[:, None] ** 2)
        return eps.to(x.dtype)


def data(count=12):
    generator = torch.Generator().manual_seed(0)
    return MEAN[:count, None] + 0.5 * torch.randn(12, D, generator=generator)[:count]


def truth(x, mean):
    return torch.distributions.Normal(mean[:, None].double(), 0.5).log_prob(x.double()).sum(1)


def close(found, expected):
    """Whether estimates lie within five standard errors, once in some million: a wrong mean lies a hundred away."""
    return bool(((found.log_prob - expected).abs() <= 5 * found.stderr + 1e-3).all())


# name: what the condition is made of the means, and where the network finds them
NESTED = {
    "a tensor": (lambda m: m, lambda a, more: a),
    "a dict": (lambda m: {"mean": m, "crop": (0, 0)}, lambda a, more: a["mean"]),
    "a dict in a dict": (lambda m: {"a": {"b": m}, "scale": 2.0}, lambda a, more: a["a"]["b"]),
    "a list": (lambda m: ["text", m], lambda a, more: a[1]),
    "a tuple": (lambda m: (None, m), lambda a, more: a[1]),
    "a named tuple": (lambda m: Pair(m), lambda a, more: a.mean),
    "a dataclass": (lambda m: Given(m), lambda a, more: a.mean),
    "dataclasses in a list": (lambda m: [Given(m)], lambda a, more: a[0].mean),
    "a namespace": (lambda m: argparse.Namespace(mean=m), lambda a, more: a.mean),
    "another mapping": (lambda m: Bag(mean=m), lambda a, more: a["mean"]),
    "a read-only mapping": (lambda m: types.MappingProxyType({"mean": m, "crop": 0}), lambda a, more: a["mean"]),
    "an ordered dict": (lambda m: collections.OrderedDict(mean=m), lambda a, more: a["mean"]),
    "beside a shared table": (lambda m: {"i": torch.arange(len(m)), "table": MEAN}, lambda a, more: a["table"][a["i"]]),
    "a model's output": (lambda m: Output(kind="text", mean=m), lambda a, more: a["mean"]),
    "a registered class": (lambda m: State(0.5, m), lambda a, more: a.held[1]),
    "marked": (lambda m: fs.per_sample({"mean": m}), lambda a, more: a["mean"]),
}
