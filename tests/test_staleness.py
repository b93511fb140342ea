"""A row program never keeps a value that the network would have read again: each way to hold a setting, changed."""

import builtins
import dataclasses
import decimal
import fractions
import gc
import logging
import operator
import os
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from network_with_settings import MODULE, SCHEDULE, SETTINGS, Member, Meta, Net, OfMeta, Options, Static, estimates
from torch import nn

import fastscore as fs

SCALE = 1.0
ACT = F.silu
LOG = logging.getLogger("a.network")
TENSOR = torch.ones(())


CONFIG, UNSPELLED = Options(), operator.attrgetter("unspelled")  # of a namespace every name would count
CONFIG.unspelled = 1.0
LAZY, MADE = types.ModuleType("a_module_that_makes_its_names"), {"made": 1.0}
builtins.A_BUILTIN = 1.0


def made(name):
    if name in MADE:
        return MADE[name]
    raise AttributeError(name)


LAZY.__getattr__ = made


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
    "name of a getter": (lambda n, h: h * UNSPELLED(CONFIG), setter(lambda n: CONFIG, "unspelled")),
    "what a module makes": (lambda n, h: h * LAZY.made, lambda m, n: m.setitem(MADE, "made", 2.0)),
    "put among the builtins": (
        lambda n, h: h * A_BUILTIN,  # noqa: F821
        lambda m, n: m.setattr(builtins, "A_BUILTIN", 2.0, raising=False),
    ),
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


@pytest.mark.parametrize("name", CASES)
def test_a_setting_counts_as_soon_as_it_changes(name, monkeypatch):
    operation, change = CASES[name]
    net = Net(operation).eval()
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
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


def test_a_number_that_is_read_of_a_weight_is_read_again():
    net = Net(lambda n, h: h * n.b.bias.tolist()[0]).eval()
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    for value in (1.0, 2.0):
        net.b.bias.data.fill_(value)
        found, right = estimates(net, density)
        assert torch.allclose(found, right, rtol=1e-4)


UNTIED = {
    "the first by a new one": lambda net: setattr(net.a, "bias", nn.Parameter(torch.full((16,), 2.0))),
    "the second by a new one": lambda net: setattr(net.t, "bias", nn.Parameter(torch.full((16,), 2.0))),
    "an entry": lambda net: net.a._parameters.update(bias=nn.Parameter(torch.full((16,), 2.0))),
    "all by a state": lambda net: net.load_state_dict(
        {name: torch.rand_like(value) for name, value in net.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("change", UNTIED.values(), ids=UNTIED)
def test_a_weight_of_two_names_counts_as_two_once_it_is_two(change):
    net = Net(lambda n, h: h).eval()
    net.t.bias = net.a.bias
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    before, _ = estimates(net, density)
    with torch.no_grad():
        net.a.bias.add_(1)  # of both
    for alter in (lambda net: None, change):
        alter(net)
        after, right = estimates(net, density)
        assert not torch.allclose(right, before, rtol=1e-2), "the change should change the density"
        assert torch.allclose(after, right, rtol=1e-4)
        before = right
    (found,) = density._programs._found.values()
    assert found.program is not None, found.reason
    assert found.traces == 2


REPLACED = {
    "all attributes of a layer": lambda net: setattr(net.b, "__dict__", nn.Linear(16, 3).eval().__dict__),
    "its parameters": lambda net: setattr(net.b, "_parameters", nn.Linear(16, 3)._parameters),
    "a frozen layer's weight, in a list": lambda net: setattr(
        net.frozen[0], "weight", nn.Parameter(torch.randn(3, 3), requires_grad=False)
    ),
}


@pytest.mark.parametrize("change", REPLACED.values(), ids=REPLACED)
def test_what_holds_the_weights_may_be_replaced(change):
    net = Net(lambda n, h: n.frozen[0](h)).eval()
    net.frozen = [nn.Linear(3, 3).requires_grad_(False)]
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    before, _ = estimates(net, density)
    (found,) = density._programs._found.values()
    assert found.program is not None, found.reason
    change(net)
    after, right = estimates(net, density)
    assert not torch.allclose(right, before, rtol=1e-2), "the change should change the density"
    assert torch.allclose(after, right, rtol=1e-4)
