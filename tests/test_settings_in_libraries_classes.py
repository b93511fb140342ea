"""Settings held by classes of the standard library, or by classes made from them, whose own code is not read."""

import argparse
import collections
import configparser
import email.message
import optparse
import string
import types

import pytest
import torch
from network_with_settings import SCHEDULE, Net, estimates

import fastscore as fs


class Dict(collections.UserDict):
    pass


class Overridden(collections.UserDict):
    def __getitem__(self, key):
        return super().__getitem__(key)


class List(collections.UserList):
    pass


class Text(collections.UserString):
    pass


class Chain(collections.ChainMap):
    pass


class Ordered(collections.OrderedDict):
    pass


class Names(types.SimpleNamespace):
    pass


class Arguments(argparse.Namespace):
    pass


class Parser(configparser.ConfigParser):
    pass


class Message(email.message.Message):
    pass


class Values(optparse.Values):
    pass


class Template(string.Template):
    pass


READ = {
    "[]": lambda v: v["scale"],
    "get": lambda v: v.get("scale"),
    "values": lambda v: list(v.values())[0],  # noqa: RUF015
    "items": lambda v: dict(v.items())["scale"],
    "**": lambda v: {**v}["scale"],
}
MAPPINGS = {
    "UserDict": collections.UserDict,
    "class of UserDict": Dict,
    "class of UserDict with a method of its own": Overridden,
    "ChainMap": lambda scale: collections.ChainMap({}, {"scale": scale}),
    "class of ChainMap": lambda scale: Chain({"scale": scale}),
    "class of OrderedDict": Ordered,
}


def factor_of(net):
    return net.read(net.value)


def changes(value, read, change):
    net = Net(lambda n, h: h * factor_of(n)).eval()
    net.value, net.read = value, read
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    before, right = estimates(net, density)
    assert torch.allclose(before, right, rtol=1e-4)  # float32 sums in another order
    change(value)
    after, right = estimates(net, density)
    assert not torch.allclose(right, before, rtol=1e-2), "the change should change the density"
    assert torch.allclose(after, right, rtol=1e-4)
    (found,) = density._programs._found.values()
    assert found.program is not None, found.reason


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("kind", MAPPINGS)
def test_an_entry_counts_as_soon_as_it_changes(kind, read):
    def put(value):
        value["scale"] = 3.0

    changes(MAPPINGS[kind](scale=1.0), READ[read], put)


def of_text(kind):
    found = kind()
    found["a"] = {"scale": "1.0"}
    return found


OTHERS = {
    "UserList": (collections.UserList([1.0]), lambda v: v[0], lambda v: v.__setitem__(0, 3.0)),
    "class of UserList": (List([1.0]), lambda v: v[0], lambda v: v.__setitem__(0, 3.0)),
    "class of UserList, a loop": (List([1.0]), lambda v: sum(each for each in v), lambda v: v.append(2.0)),
    "class of UserString": (Text("a"), len, lambda v: setattr(v, "data", "aaa")),
    "class of SimpleNamespace": (Names(scale=1.0), lambda v: v.scale, lambda v: setattr(v, "scale", 3.0)),
    "class of Namespace": (
        Arguments(scale=1.0),
        lambda v: 1.0 + ("other" in v),
        lambda v: setattr(v, "other", 3.0),
    ),
    "class of Values": (
        Values({"scale": 1.0}),
        lambda v: v.ensure_value("scale", 2.0),
        lambda v: setattr(v, "scale", 3.0),
    ),
    "class of ConfigParser": (
        of_text(Parser),
        lambda v: v.getfloat("a", "scale"),
        lambda v: v.set("a", "scale", "3.0"),
    ),
    "class of Template": (Template("1.0"), lambda v: float(v.substitute()), lambda v: setattr(v, "template", "3.0")),
    "exception": (ValueError(1.0), lambda v: v.args[0], lambda v: setattr(v, "args", (3.0,))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_base_class_reads_counts_as_soon_as_it_changes(name):
    changes(*OTHERS[name])
