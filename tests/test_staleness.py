"""A row program never keeps a value that the network would have read again: each way to hold a setting, changed."""

import argparse
import collections
import copy
import ctypes
import dataclasses
import decimal
import enum
import fractions
import functools
import gc
import itertools
import logging
import os
import pathlib
import random
import sys
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastscore as fs
from fastscore.program.row_program import NoProgram, RowProgram

SCHEDULE = fs.LogSNR(-6, 6)
SCALE = 1.0
SETTINGS = {"inner": {"scale": 1.0}}
ACT = F.silu
LOG = logging.getLogger("a.network")
TENSOR = torch.ones(())
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


def helper(h):
    return h * SCALE


def with_attribute(h):
    return h * with_attribute.scale


with_attribute.scale = 1.0


def with_default(h, options=[1.0], *, more={"scale": 1.0}):  # noqa: B006
    return h * options[0] * more["scale"]


def importing(h):
    import a_module_of_settings as settings

    return h * settings.scale


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


def closure():
    """A network with a setting in a closure, and a function that changes it."""
    scale = 1.0

    def change(net, h):
        return h * scale

    def put(value):
        nonlocal scale
        scale = value

    return change, put


def setter(target, name):
    """Return a change of the attribute of what `target(net)` returns."""
    return lambda monkeypatch, net: monkeypatch.setattr(target(net), name, 2.0)


def entry(target, key):
    """Return a change of the entry of the dict that `target(net)` returns."""
    return lambda monkeypatch, net: monkeypatch.setitem(target(net), key, 2.0)


def first(target):
    """Return a change of the first entry of the list that `target(net)` returns."""
    return lambda monkeypatch, net: target(net).__setitem__(0, 2.0)


def in_place(net):
    with torch.no_grad():
        net.free.mul_(2)


CHANGE, PUT = closure()
CASES = {
    "attribute of an object": (lambda n, h: h * n.cfg.scale, setter(lambda n: n.cfg, "scale")),
    "attribute of an object's object": (lambda n, h: h * n.cfg.inner.scale, setter(lambda n: n.cfg.inner, "scale")),
    "field of a dataclass": (lambda n, h: h * n.options.scale, setter(lambda n: n.options, "scale")),
    "field inside a field": (lambda n, h: h * n.options.inner.scale, setter(lambda n: n.options.inner, "scale")),
    "attribute of a member of an enumeration": (
        lambda n, h: h * Member.ONE.scale,
        setter(lambda n: Member.ONE, "scale"),
    ),
    "attribute of a number": (lambda n, h: h * n.own_number.scale, setter(lambda n: n.own_number, "scale")),
    "whether a weight is frozen": (
        lambda n, h: h * (1.0 if n.b.weight.requires_grad else 2.0),
        lambda m, n: n.b.weight.requires_grad_(False),
    ),
    "another dataclass": (
        lambda n, h: h * n.options.scale,
        lambda m, n: setattr(n, "options", dataclasses.replace(n.options, scale=2.0)),
    ),
    "slot": (lambda n, h: h * n.slotted.scale, setter(lambda n: n.slotted, "scale")),
    "attribute": (lambda n, h: h * n.number, setter(lambda n: n, "number")),
    "text": (lambda n, h: h * len(n.text), lambda m, n: setattr(n, "text", "other")),
    "class attribute of the network": (lambda n, h: h * n.level, setter(lambda n: Net, "level")),
    "class attribute hidden by the object's own": (lambda n, h: h * n.level, setter(lambda n: n, "level")),
    "attribute of a class": (lambda n, h: h * Static.scale, setter(lambda n: Static, "scale")),
    "class method": (lambda n, h: h * Static.value(), setter(lambda n: Static, "scale")),
    "property, object": (lambda n, h: h * n.strength, setter(lambda n: n.cfg.inner, "scale")),
    "property, class": (lambda n, h: h * n.strength, setter(lambda n: Net, "level")),
    "method replaced": (
        lambda n, h: h * n.strength,
        lambda m, n: m.setattr(Net, "_strength_of", lambda self, cfg: 2.0),
    ),
    "property replaced": (lambda n, h: h * n.strength, lambda m, n: m.setattr(Net, "strength", 2.0)),
    "global": (lambda n, h: h * SCALE, lambda m, n: m.setitem(globals(), "SCALE", 2.0)),
    "global of a helper": (lambda n, h: helper(h), lambda m, n: m.setitem(globals(), "SCALE", 2.0)),
    "helper replaced": (lambda n, h: helper(h), lambda m, n: m.setitem(globals(), "helper", lambda h: 2 * h)),
    "nested global dict": (lambda n, h: h * SETTINGS["inner"]["scale"], entry(lambda n: SETTINGS["inner"], "scale")),
    "global tensor": (lambda n, h: h * TENSOR, lambda m, n: m.setitem(globals(), "TENSOR", torch.tensor(2.0))),
    # Neither raises the tensor's version.
    "number of a global tensor, by .data": (
        lambda n, h: h * float(TENSOR),
        lambda m, n: TENSOR.data.fill_(2.0),
    ),
    "number of a tensor, by numpy": (lambda n, h: h * float(n.free), lambda m, n: n.free.numpy().fill(2.0)),
    "number of a tensor that is turned, by .data": (
        lambda n, h: h * n.turned.tolist()[0][0],
        lambda m, n: n.turned.data.mul_(2),
    ),
    "number of a tensor with gaps, by numpy": (
        lambda n, h: h * n.gaps.tolist()[0],
        lambda m, n: n.gaps.numpy().__imul__(2),
    ),
    "number of a tensor that repeats itself, by .data": (
        lambda n, h: h * n.repeated.tolist()[0],
        lambda m, n: n.repeated[0].data.mul_(2),
    ),
    "large tensor, by .data": (lambda n, h: h * n.large[:3], lambda m, n: n.large.data.mul_(2)),
    "large tensor, by numpy": (lambda n, h: h * n.large[:3], lambda m, n: n.large.numpy().__imul__(2)),
    "large tensor, other data": (lambda n, h: h * n.large[:3], lambda m, n: setattr(n.large, "data", 2 * n.large)),
    "large buffer of a layer in a list": (
        lambda n, h: h * n.unregistered[1].running_var[:3],
        lambda m, n: n.unregistered[1].running_var.data.fill_(3.0),
    ),
    "tf32": (
        lambda n, h: h * (2.0 if torch.backends.cuda.matmul.allow_tf32 else 1.0),
        lambda m, n: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    ),
    "setting of a backend": (
        lambda n, h: h * (2.0 if torch.backends.cudnn.benchmark else 1.0),
        lambda m, n: m.setattr(torch.backends.cudnn, "benchmark", True),
    ),
    "setting of attention": (
        lambda n, h: h * (1.0 if torch.backends.cuda.flash_sdp_enabled() else 2.0),
        lambda m, n: torch.backends.cuda.enable_flash_sdp(False),
    ),
    "threads": (lambda n, h: h * torch.get_num_threads(), lambda m, n: torch.set_num_threads(3)),
    "precision": (
        lambda n, h: h * len(torch.get_float32_matmul_precision()),
        lambda m, n: torch.set_float32_matmul_precision("high"),
    ),
    "deterministic": (
        lambda n, h: h * (2.0 if torch.are_deterministic_algorithms_enabled() else 1.0),
        lambda m, n: torch.use_deterministic_algorithms(True),
    ),
    "dtype of autocast": (
        lambda n, h: h * (2.0 if torch.get_autocast_dtype("cpu") == torch.float16 else 1.0),
        lambda m, n: torch.set_autocast_dtype("cpu", torch.float16),
    ),
    "seed": (lambda n, h: h * (2.0 if torch.initial_seed() == 77 else 1.0), lambda m, n: torch.manual_seed(77)),
    "class of a class": (lambda n, h: h * OfMeta.level, setter(lambda n: Meta, "level")),
    "other module": (lambda n, h: h * MODULE.scale, setter(lambda n: MODULE, "scale")),
    "module imported inside": (lambda n, h: importing(h), setter(lambda n: MODULE, "scale")),
    "module imported by its name": (
        lambda n, h: h * __import__("a_module_of_settings").scale,
        setter(lambda n: MODULE, "scale"),
    ),
    "closure": (CHANGE, lambda m, n: PUT(2.0)),
    "default argument, a list": (lambda n, h: with_default(h), first(lambda n: with_default.__defaults__[0])),
    "default argument, a dict": (
        lambda n, h: with_default(h),
        entry(lambda n: with_default.__kwdefaults__["more"], "scale"),
    ),
    "default argument replaced": (
        lambda n, h: with_default(h),
        lambda m, n: m.setattr(with_default, "__defaults__", ([2.0],)),
    ),
    "attribute of a function": (lambda n, h: with_attribute(h), setter(lambda n: with_attribute, "scale")),
    "list in a list": (lambda n, h: h * n.list[0][0], first(lambda n: n.list[0])),
    "list in a tuple": (lambda n, h: h * n.tuple[1][0], first(lambda n: n.tuple[1])),
    "list of an object": (lambda n, h: h * n.sampler.factor(), first(lambda n: n.sampler.table)),
    "global in an object's method": (lambda n, h: h * n.sampler.factor(), entry(lambda n: SETTINGS["inner"], "scale")),
    "dict of a callable object": (lambda n, h: n.called(h), entry(lambda n: n.called.config, "scale")),
    "method of an object, kept": (lambda n, h: h * n.kept(), first(lambda n: n.sampler.table)),
    "deque": (lambda n, h: h * n.deque[0], first(lambda n: n.deque)),
    "ordered dict": (lambda n, h: h * n.ordered["scale"], entry(lambda n: n.ordered, "scale")),
    "default dict": (lambda n, h: h * n.default["scale"], entry(lambda n: n.default, "scale")),
    "set": (lambda n, h: h * len(n.set), lambda m, n: n.set.add(2.0)),
    "fraction": (lambda n, h: h * float(n.fraction), lambda m, n: setattr(n, "fraction", fractions.Fraction(2))),
    "numpy scalar": (lambda n, h: h * float(n.numpy), lambda m, n: setattr(n, "numpy", np.float32(2.0))),
    "numpy array in place": (lambda n, h: h * torch.as_tensor(n.array), lambda m, n: n.array.__imul__(2)),
    "tensor that is no buffer": (lambda n, h: h * n.free, lambda m, n: setattr(n, "free", torch.tensor(2.0))),
    "tensor in place": (lambda n, h: h * n.free, lambda m, n: in_place(n)),
    "tensor in place, unseen": (lambda n, h: h * n.free, lambda m, n: n.free.data.mul_(2)),
    "keywords of a partial": (lambda n, h: n.partial(h), lambda m, n: n.partial.keywords.update(other=2.0)),
    "layer in a list": (lambda n, h: n.unregistered[0](h), lambda m, n: n.unregistered[0].weight.data.mul_(2)),
    "layer in a list, as an optimizer": (
        lambda n, h: n.unregistered[0](h),
        lambda m, n: (
            torch.optim.SGD([torch.nn.Parameter(n.unregistered[0].weight)], 0.1)
            and n.unregistered[0].weight.detach().mul_(2)
        ),
    ),
    "name made up": (lambda n, h: h * getattr(n.cfg, "sc" + "ale"), setter(lambda n: n.cfg, "scale")),
    "name from a list": (lambda n, h: h * [getattr(n.cfg, k) for k in n.ordered][0], setter(lambda n: n.cfg, "scale")),  # noqa: RUF015
    "all names": (lambda n, h: h * vars(n.cfg)["scale"], setter(lambda n: n.cfg, "scale")),
    "attribute that was missing": (
        lambda n, h: h * getattr(n.cfg, "missing", 1.0),
        lambda m, n: setattr(n.cfg, "missing", 2.0),
    ),
    "environment": (
        lambda n, h: h * float(os.environ.get("A_SCALE", "1")),
        lambda m, n: m.setenv("A_SCALE", "2"),
    ),
    "environment, getenv": (
        lambda n, h: h * float(os.getenv("A_SCALE", "1")),
        lambda m, n: m.setenv("A_SCALE", "2"),
    ),
    "recursion limit": (
        lambda n, h: h * (sys.getrecursionlimit() % 1000 + 1),
        lambda m, n: sys.setrecursionlimit(sys.getrecursionlimit() + 7),
    ),
    "decimal context": (
        lambda n, h: h * decimal.getcontext().prec,
        lambda m, n: m.setattr(decimal.getcontext(), "prec", 3),
    ),
    "decimal context, unnamed": (
        lambda n, h: h * float(decimal.Decimal(2) / decimal.Decimal(3)),
        lambda m, n: m.setattr(decimal.getcontext(), "prec", 1),
    ),
    "print options": (
        lambda n, h: h * torch._tensor_str.PRINT_OPTS.precision,
        lambda m, n: m.setattr(torch._tensor_str.PRINT_OPTS, "precision", 9),
    ),
    "print options of numpy": (
        lambda n, h: h * np.get_printoptions()["precision"],
        lambda m, n: np.set_printoptions(precision=3),
    ),
    "garbage collection": (lambda n, h: h * (1 + gc.isenabled()), lambda m, n: gc.disable()),
    "working directory": (lambda n, h: h * len(os.getcwd()), lambda m, n: m.chdir("/")),
    "level of a logger": (
        lambda n, h: h * (1 + LOG.isEnabledFor(logging.INFO)),
        lambda m, n: m.setattr(LOG, "level", logging.DEBUG),
    ),
    "level of a logger, its attribute": (lambda n, h: h * (1 + LOG.level), lambda m, n: m.setattr(LOG, "level", 10)),
    "level of a logger by name": (
        lambda n, h: h * (1 + logging.getLogger("a.network").getEffectiveLevel()),
        lambda m, n: m.setattr(logging.root, "level", 10),
    ),
    "alias of an operation": (lambda n, h: ACT(h), lambda m, n: m.setitem(globals(), "ACT", torch.tanh)),
    "operation of a module": (
        lambda n, h: F.silu(h),
        lambda m, n: m.setattr(F, "silu", lambda h, inplace=False: h.tanh()),
    ),
    "operation that a layer calls": (lambda n, h: h, lambda m, n: m.setattr(F, "silu", lambda h, inplace: h.tanh())),
    "forward of a layer's class": (lambda n, h: h, lambda m, n: m.setattr(nn.SiLU, "forward", lambda s, h: h.tanh())),
    "forward of the network's class": (lambda n, h: h, lambda m, n: m.setattr(Net, "forward", lambda s, x, t: 2 * x)),
    "forward of the object": (lambda n, h: h, lambda m, n: setattr(n, "forward", lambda x, t: 2 * x)),
    "class of a layer": (lambda n, h: h, lambda m, n: setattr(n.act, "__class__", nn.Tanh)),
    "hook of all layers": (
        lambda n, h: h,
        lambda m, n: m.setitem(
            torch.nn.modules.module._global_forward_hooks, -1, lambda s, a, o: 2 * o if isinstance(s, Net) else None
        ),
    ),
}


@pytest.fixture(autouse=True)
def unchanged():
    """Put back what no monkeypatch does."""
    threads, limit = torch.get_num_threads(), sys.getrecursionlimit()
    yield
    with_default.__defaults__[0][0] = 1.0
    TENSOR.fill_(1.0)
    PUT(1.0)
    torch.set_num_threads(threads)
    sys.setrecursionlimit(limit)
    np.set_printoptions(precision=8)
    gc.enable()
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(False)
    torch.set_autocast_dtype("cpu", torch.bfloat16)


def estimates(net, density):
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    by_module = fs.ScoreDensity(net, SCHEDULE, program=False)
    return density.estimate(x, nfe=16).log_prob, by_module.estimate(x, nfe=16).log_prob


@pytest.mark.parametrize("name", CASES)
def test_a_setting_counts_as_soon_as_it_changes(name, monkeypatch):
    operation, change = CASES[name]
    net = Net(operation).eval()
    density = fs.ScoreDensity(net, SCHEDULE)
    for _ in range(2):
        before, right = estimates(net, density)
        assert torch.allclose(before, right, rtol=1e-4)  # float32 sums in another order
    (found,) = density._programs._found.values()
    assert found.program is not None, found.reason
    assert found.traces == 1
    change(monkeypatch, net)
    after, right = estimates(net, density)
    assert not torch.allclose(right, before, rtol=1e-2), "the change should change the density"
    assert torch.allclose(after, right, rtol=1e-4)


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda n, h: h * next(n.counter), "'counter' of layer 'forward' is a itertools.count, whose changes"),
        (lambda n, h: h * n.view[0], "'view' of layer 'forward' is a memoryview, whose changes"),
        (lambda n, h: h * n.foreign.value, "'foreign' of layer 'forward' is a ctypes.c_double, whose changes"),
        (lambda n, h: h * float(n.long[0]), "'long' of layer 'forward' is an array of 800,000 bytes"),
        (lambda n, h: h * n.large.tolist()[0], "a tensor of 24,000 bytes on cpu, of which the code takes numbers"),
        (lambda n, h: h * n.large.cpu().tolist()[0], "'large' of layer 'forward' is a tensor of 24,000 bytes"),
        (lambda n, h: h * float(n.large.numpy()[0]), "'large' of layer 'forward' is a tensor of 24,000 bytes"),
        (lambda n, h: h * n.spread.tolist()[0], "'spread' of layer 'forward' is a tensor of 12 bytes on cpu"),
        (lambda n, h: h * n.sparse.to_dense(), "'sparse' of layer 'forward' is a sparse_coo tensor"),
        (lambda n, h: h * (random.random() > 2), "gives another answer at every call"),
        (lambda n, h: h * (np.random.rand() > 2), "gives another answer at every call"),  # noqa: NPY002
        (lambda n, h: h * len(os.urandom(3)), "gives another answer at every call"),
        (lambda n, h: h * (time.time() > 0), "gives another answer at every call"),
        (lambda n, h: h * len(open(__file__).read()), "calls open, which gives another answer"),  # noqa: SIM115
        (lambda n, h: h * eval("SCALE"), "calls eval, so that what it reads cannot be followed"),
        (lambda n, h: h * globals()["SCALE"], "calls globals, so that what it reads cannot be followed"),
        (
            lambda n, h: h * len(pathlib.Path(__file__).read_text()),
            "calls read_text, which reads a file that may change",
        ),
        (lambda n, h: h * np.load("scale.npy"), "calls load, which reads a file that may change"),
        (lambda n, h: h * (1 + (n.a.weight.grad is None)), r"reads .grad of a tensor, which a trace cannot follow"),
        (lambda n, h: h * (1 + (n.a.weight.grad_fn is None)), r"reads .grad_fn of a tensor"),
        (lambda n, h: h * (1 + n.a.weight._version), r"reads ._version of a tensor"),
        (lambda n, h: h * (1 + n.a.weight.is_leaf), r"reads .is_leaf of a tensor"),
        (lambda n, h: h * sys.getrefcount(n), "gives another answer at every call"),
        (lambda n, h: h * len(sys._getframe().f_code.co_name), "gives another answer at every call"),
        (lambda n, h: h * (1 + h.shape[0] // 25), "operation mul: depends on the number of rows"),
        (lambda n, h: h * max(h.shape[0], 25), "operation mul: depends on the number of rows"),
        (lambda n, h: h * (1 + h.numel() // 80), "operation mul: depends on the number of rows"),
        (lambda n, h: h * (1 + (torch.arange(h.shape[0]) > 24)[:, None]), "operation arange: depends on the number"),
        (lambda n, h: h * (1 + (torch.ones_like(h).cumsum(0) > 24)), "operation cumsum: makes values of the number"),
        (lambda n, h: h * (1 + (h.new_ones(h.shape[0]).sum() > 24)), "operation sum: makes values of the number"),
        (lambda n, h: h * 2 if h.shape[0] > 24 else h, "its code fixes the number of rows"),
        (lambda n, h: n.list.append(1) or h, "'list' of layer 'forward' changes its attribute 'entries'"),
        (lambda n, h: SETTINGS.update(calls=1) or h, "global 'SETTINGS' changes its attribute 'calls'"),
        (lambda n, h: setattr(n.cfg, "last", h) or h, "'cfg' of layer 'forward' changes its attribute 'last'"),
    ],
)
def test_what_cannot_be_followed_is_no_program_and_leaves_nothing(operation, reason):
    net = Net(operation).eval()
    net.counter, net.long, net.sparse = itertools.count(), np.ones(100_000), torch.ones(3).to_sparse()
    net.view, net.foreign = memoryview(bytearray(b"\x01")), ctypes.c_double(1.0)
    settings, entries, names = copy.deepcopy(SETTINGS), copy.deepcopy(net.list), set(vars(net.cfg))
    with pytest.raises(NoProgram, match=reason):
        fs.ScoreDensity(net, SCHEDULE, program=True).estimate(torch.randn(4, 3), nfe=16)
    assert (SETTINGS, net.list, set(vars(net.cfg))) == (settings, entries, names)


def test_a_sparse_buffer_is_no_reason_to_fail():
    net = Net(lambda n, h: h).eval()
    net.register_buffer("sparse", torch.ones(3).to_sparse())
    found, right = estimates(net, fs.ScoreDensity(net, SCHEDULE))
    assert torch.allclose(found, right, rtol=1e-4)


def test_a_number_that_is_read_of_a_weight_is_read_again():
    net = Net(lambda n, h: h * n.b.bias.tolist()[0]).eval()
    density = fs.ScoreDensity(net, SCHEDULE)
    for value in (1.0, 2.0):
        net.b.bias.data.fill_(value)
        found, right = estimates(net, density)
        assert torch.allclose(found, right, rtol=1e-4)


def test_a_cache_keeps_nothing_of_a_trace():
    @functools.lru_cache
    def positions(n):
        return torch.arange(n, dtype=torch.float32)

    net = Net(lambda n, h: h + positions(3)).eval()
    fs.ScoreDensity(net, SCHEDULE).estimate(torch.randn(4, 3), nfe=16)
    assert type(positions(3)) is torch.Tensor


def test_a_network_that_changes_all_the_time_runs_itself_at_last():
    net = Net(lambda n, h: h * n.cfg.scale).eval()
    density = fs.ScoreDensity(net, SCHEDULE)
    for i in range(12):
        net.cfg.scale = 1.0 + i
        found, right = estimates(net, density)
        assert torch.allclose(found, right, rtol=1e-4)
    (entry,) = density._programs._found.values()
    assert entry.program is None
    assert "'cfg' of layer 'forward' has changed its 'scale' again after 8 traces" in entry.reason


def test_what_is_read_of_the_network_itself_is_no_reason_to_trace_again():
    net = Net(lambda n, h: h * n.cfg.scale).eval()
    density = fs.ScoreDensity(net, SCHEDULE)
    estimates(net, density)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    net.a.weight = nn.Parameter(net.a.weight.detach().clone())
    net.cfg.scale = 2.0 / 2.0  # another object of the same value
    found, right = estimates(net, density)
    assert torch.allclose(found, right, rtol=1e-4)
    (entry,) = density._programs._found.values()
    assert entry.traces == 1


def test_networks_of_libraries_have_no_foreign_state():
    """What stands in a network beside what it reads does not matter: a lock, a logger, an iterator."""
    net = Net(lambda n, h: h)
    net.data_loader, net.log = iter([1]), open  # named by no code that is reached
    assert RowProgram.trace(net.eval(), (3,), torch.linspace(0.1, 0.9, 4)) is not None
    assert fs.explain(net, (3,)).startswith("row program of Net")
