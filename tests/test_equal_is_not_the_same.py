"""A setting that equals the one before, and that code can tell from it, is another setting."""

import collections
import decimal
import math

import numpy as np
import pytest
import torch
from network_with_settings import SCHEDULE, Net, estimates
from torch import nn

import fastscore as fs


def moved(holder, key="a"):
    """Put an entry at the end, with the same value."""
    holder[key] = holder.pop(key)


def put(name, value):
    return lambda net: setattr(net, name, value)


CASES = {
    "order of a dict": ({"a": 1.0, "b": 2.0}, lambda v: next(iter(v.values())), lambda n: moved(n.value)),
    "order of an ordered dict": (
        collections.OrderedDict(a=1.0, b=2.0),
        lambda v: next(iter(v.values())),
        lambda n: n.value.move_to_end("a"),
    ),
    "order inside a dict": (
        {"inner": {"a": 1.0, "b": 2.0}},
        lambda v: next(iter(v["inner"].values())),
        lambda n: moved(n.value["inner"]),
    ),
    "order of a set": ({0, 8}, lambda v: 1 + next(iter(v)), lambda n: (n.value.clear(), n.value.update([8, 0]))),
    "order of a frozen set": (frozenset([0, 8]), lambda v: 1 + next(iter(v)), put("value", frozenset([8, 0]))),
    "key of a dict": (
        {1: 1.0},
        lambda v: 2.0 if next(iter(v)) is True else 1.0,
        lambda n: (n.value.clear(), n.value.update({True: 1.0})),
    ),
    "entry of a frozen set": (
        frozenset([1]),
        lambda v: 2.0 if next(iter(v)) is True else 1.0,
        put("value", frozenset([True])),
    ),
    "sign of zero": (0.0, lambda v: 2 + math.copysign(1.0, v), put("value", -0.0)),
    "sign of zero in a tuple": ((1, (0.0,)), lambda v: 2 + math.copysign(1.0, v[1][0]), put("value", (1, (-0.0,)))),
    "sign of zero in a list": ([0.0], lambda v: 2 + math.copysign(1.0, v[0]), lambda n: n.value.__setitem__(0, -0.0)),
    "sign of a complex zero": (0j, lambda v: 2 + math.copysign(1.0, v.imag), put("value", complex(0.0, -0.0))),
    "sign of zero of numpy": (
        np.float32(0.0),
        lambda v: 2 + math.copysign(1.0, float(v)),
        put("value", np.float32(-0.0)),
    ),
    "digits of a decimal": (decimal.Decimal("1.0"), lambda v: len(str(v)), put("value", decimal.Decimal("1.00000"))),
    "end of a range": (range(0, 3, 2), lambda v: v.stop, put("value", range(0, 4, 2))),
    "number or truth": (1, lambda v: 2.0 if v is True else 1.0, put("value", True)),
    "whole number or not": (1, lambda v: 2.0 if isinstance(v, float) else 1.0, put("value", 1.0)),
    "NaN": (math.nan, lambda v: 2.0 if math.isnan(v) else 1.0, put("value", 1.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_setting_counts_as_soon_as_code_can_tell_it_apart(name):
    value, factor, change = CASES[name]
    net = Net(lambda n, h: h * factor(n.value)).eval()
    net.value = value
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    before, right = estimates(net, density)
    assert torch.allclose(before, right, rtol=1e-4)  # float32 sums in another order
    (found,) = density._programs._found.values()
    assert found.program is not None, found.reason
    change(net)
    after, right = estimates(net, density)
    assert not torch.allclose(right, before, rtol=1e-2), "the change should change the density"
    assert torch.allclose(after, right, rtol=1e-4)


def test_the_order_of_layers_counts():
    net = Net(lambda n, h: n.layers(h)).eval()
    net.layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    before, _ = estimates(net, density)
    moved(net.layers._modules, "0")
    after, right = estimates(net, density)
    assert not torch.allclose(right, before, rtol=1e-2), "the change should change the density"
    assert torch.allclose(after, right, rtol=1e-4)


@pytest.mark.parametrize("value", [math.nan, np.float32("nan"), (1, math.nan), -0.0])
def test_another_object_of_the_same_value_is_no_change(value):
    again = {float: float, np.float32: np.float32, tuple: lambda v: (v[0], float(str(v[1])))}[type(value)]
    net = Net(lambda n, h: h * (1.0 if n.value else 2.0)).eval()
    net.value = value
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    estimates(net, density)
    net.value = again(str(value)) if not isinstance(value, tuple) else again(value)
    assert net.value is not value
    estimates(net, density)
    (found,) = density._programs._found.values()
    assert found.traces == 1


class Conditioned(Net):
    def forward(self, x, t, c):
        return super().forward(x, t) * (2 + math.copysign(1.0, c))


def test_a_condition_counts_as_soon_as_code_can_tell_it_apart():
    net, x = Conditioned(lambda n, h: h).eval(), torch.randn(4, 3)
    density, itself = (fs.ScoreDensity(net, SCHEDULE, "eps", program=program) for program in ("auto", False))
    for c in (0.0, -0.0, 0.0):
        found, expected = (d.estimate(x, nfe=16, c=c).log_prob for d in (density, itself))
        assert torch.allclose(found, expected, rtol=1e-4), c
