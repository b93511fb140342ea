"""Every public call, with network and data on a (pretended) GPU, gives what it gives on the CPU, and leaves it there.

A row is a function of `on`, which puts modules and tensors on the device, and says which public names it covers:
`test_every_public_name_has_a_row` fails for a name that no row does. Networks are put there before a density is made
around them, and nobody calls `.cuda()` on the density, as in README.
"""

import importlib
import inspect
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from device_rows import COVERED, ODE, ROWS, SCHEDULES
from pretended_device import CUDA, PretendedDevice
from torch import Tensor
from torch.utils._pytree import tree_flatten

import fastscore as fs
from fastscore.densities import probability_flow

MODULES = ("fastscore", "fastscore.adapters", "fastscore.metrics", "fastscore.transforms", "fastscore.lightning")

pytestmark = pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")


def call(name, on, folder):
    """Call a row with `on`, with its value if it has one, and with a folder if it writes files."""
    function, value = ROWS[name]
    more = {"folder": folder} if "folder" in inspect.signature(function).parameters else {}
    return function(on, **more) if value is None else function(on, value, **more)


@pytest.mark.parametrize("name", ROWS)
def test_a_call_on_the_device_gives_what_it_gives_on_the_host(name, tmp_path):
    expected, spec = tree_flatten(call(name, lambda thing: thing, tmp_path))
    with PretendedDevice():
        found, found_spec = tree_flatten(call(name, lambda thing: thing.to("cuda"), tmp_path))
        places = {v.device for v in found if isinstance(v, Tensor)}
        found = [v.cpu() if isinstance(v, Tensor) else v for v in found]
    assert CUDA in places or not any(isinstance(v, Tensor) for v in found) or name.partition("[")[0] in ON_THE_HOST
    assert found_spec == spec
    for got, wanted in zip(found, expected, strict=True):
        if isinstance(wanted, Tensor | float | np.floating):
            # The same sums: on a GPU chunks are larger, and float32 sums of another order differ by some roundings.
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
        else:
            assert got == wanted


# Their results are files or numbers of the host by what they are.
ON_THE_HOST = {
    "command_line",
    "data_set",
    "data_set_under_conditions",
    "data_set_under_masks",
    "metric",
    "words",
    "training_with_nodes_on_the_host",
}


def public_names():
    """Return the public functions and classes of the package, and the public methods that its classes define."""
    names = {"evaluate"}  # the command
    for module_name in MODULES:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        listed = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for name in listed:
            thing = getattr(module, name)
            if not callable(thing) or not getattr(thing, "__module__", "").startswith("fastscore"):
                continue
            if "__all__" not in vars(module) and thing.__module__ != module_name:
                continue  # imported there
            names.add(name)
            if inspect.isclass(thing):
                names |= {f"{name}.{method}" for method in methods_of(thing)}
    return names


def methods_of(cls):
    own = [base for base in cls.__mro__ if base.__module__.startswith("fastscore")]
    attributes = {f.name for f in fields(cls)} if is_dataclass(cls) else set(getattr(cls, "_fields", ()))
    kinds = property | classmethod | staticmethod
    found = {name: value for base in own for name, value in vars(base).items() if not name.startswith("_")}
    return {name for name, value in found.items() if callable(value) or isinstance(value, kinds)} - attributes


def covered():
    """Return the names that rows cover; what a schedule defines is covered where every schedule is called."""
    names = COVERED | {name.partition(".")[0] for name in COVERED}
    for schedule_name in SCHEDULES:
        cls = schedule_name.partition(".")[0]
        names |= {f"{cls}.{name.partition('.')[2]}" for name in COVERED if name.startswith("Schedule.")}
    return names


def test_every_public_name_has_a_row():
    assert sorted(public_names() - covered()) == []


def test_a_public_name_without_a_row_is_reported(monkeypatch):
    def a_new_one():
        pass

    a_new_one.__module__ = "fastscore.new"
    monkeypatch.setattr(fs, "a_new_one", a_new_one, raising=False)
    monkeypatch.setattr(fs, "__all__", [*fs.__all__, "a_new_one"])
    monkeypatch.setattr(fs.ScoreDensity, "a_new_method", a_new_one, raising=False)
    assert sorted(public_names() - covered()) == ["ScoreDensity.a_new_method", "a_new_one"]


def test_every_solver_of_the_ode_that_is_named_here_is_known():
    named_here = {options.get("method", "auto") for options in ODE.values()}
    assert {"auto", "midpoint"} <= named_here
    assert named_here & set(probability_flow.ADAPTIVE)
    assert {options.get("trace", "exact") for options in ODE.values()} == set(probability_flow.TRACES)
