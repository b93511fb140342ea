"""What a network reads and nobody can follow is no program, and says why; the rest does not matter."""

import copy
import ctypes
import functools
import itertools
import os
import pathlib
import random
import sys
import time

import numpy as np
import pytest
import torch
from network_with_settings import SCHEDULE, SETTINGS, Net, estimates
from torch import nn

import fastscore as fs
from fastscore.program.row_program import NoProgram, RowProgram


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
        (lambda n, h: h * eval("SETTINGS")["inner"]["scale"], "calls eval, so that what it reads cannot be followed"),
        (
            lambda n, h: h * globals()["SETTINGS"]["inner"]["scale"],
            "calls globals, so that what it reads cannot be followed",
        ),
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
        (lambda n, h: h * n.weights[0], "its code reads the parameter 'b.bias' by another way than its layer"),
        (lambda n, h: h * n.weights[0].detach()[:1], "its code reads the parameter 'b.bias' by another way"),
        (lambda n, h: n.list.append(1) or h, "'list' of layer 'forward' changes its attribute 'entries'"),
        (lambda n, h: SETTINGS.update(calls=1) or h, "global 'SETTINGS' changes its attribute 'calls'"),
        (lambda n, h: setattr(n.cfg, "last", h) or h, "'cfg' of layer 'forward' changes its attribute 'last'"),
    ],
)
def test_what_cannot_be_followed_is_no_program_and_leaves_nothing(operation, reason):
    net = Net(operation).eval()
    net.counter, net.long, net.sparse = itertools.count(), np.ones(100_000), torch.ones(3).to_sparse()
    net.view, net.foreign = memoryview(bytearray(b"\x01")), ctypes.c_double(1.0)
    net.weights = [net.b.bias]
    settings, entries, names = copy.deepcopy(SETTINGS), copy.deepcopy(net.list), set(vars(net.cfg))
    with pytest.raises(NoProgram, match=reason):
        fs.ScoreDensity(net, SCHEDULE, "eps", program=True).estimate(torch.randn(4, 3), nfe=16)
    assert (SETTINGS, net.list, set(vars(net.cfg))) == (settings, entries, names)


@pytest.mark.parametrize(
    ("operation", "weight"),
    [
        (lambda n, h: h * n.weights[0], lambda n: n.b.bias),
        (lambda n, h: h * n.weights[1], lambda n: n.weights[1]),
        (lambda n, h: n.hidden[0](h), lambda n: n.hidden[0].weight),
    ],
    ids=["the network's own", "unregistered", "of an unregistered layer"],
)
def test_a_weight_has_its_gradient_wherever_the_code_finds_it(operation, weight):
    net = Net(operation).eval()
    net.weights, net.hidden = [net.b.bias, nn.Parameter(torch.ones(3))], [nn.Linear(3, 3)]
    x, found = torch.randn(4, 3), []
    for program in ("auto", False):
        density = fs.ScoreDensity(net, SCHEDULE, "eps", program=program)
        density.estimate(x, nfe=16)  # without gradients it may have a program
        found += torch.autograd.grad(density.log_prob(x, nfe=16).sum(), weight(net))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)
    assert bool(found[0].any())


def test_a_sparse_buffer_is_no_reason_to_fail():
    net = Net(lambda n, h: h).eval()
    net.register_buffer("sparse", torch.ones(3).to_sparse())
    found, right = estimates(net, fs.ScoreDensity(net, SCHEDULE, "eps"))
    assert torch.allclose(found, right, rtol=1e-4)


def test_a_cache_keeps_nothing_of_a_trace():
    @functools.lru_cache
    def positions(n):
        return torch.arange(n, dtype=torch.float32)

    net = Net(lambda n, h: h + positions(3)).eval()
    fs.ScoreDensity(net, SCHEDULE, "eps").estimate(torch.randn(4, 3), nfe=16)
    assert type(positions(3)) is torch.Tensor


def test_a_network_that_changes_all_the_time_runs_itself_at_last():
    net = Net(lambda n, h: h * n.cfg.scale).eval()
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    for i in range(12):
        net.cfg.scale = 1.0 + i
        found, right = estimates(net, density)
        assert torch.allclose(found, right, rtol=1e-4)
    (entry,) = density._programs._found.values()
    assert entry.program is None
    assert "'cfg' of layer 'forward' has changed its 'scale' again after 8 traces" in entry.reason


def test_what_is_read_of_the_network_itself_is_no_reason_to_trace_again():
    net = Net(lambda n, h: h * n.cfg.scale).eval()
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
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


@pytest.mark.parametrize(
    "rows_of",
    [
        lambda row, h: row.expand(h.shape[0], -1),
        lambda row, h: row.repeat(h.shape[0], 1),
        lambda row, h: row.repeat_interleave(h.shape[0], 0),
        lambda row, h: h.new_zeros(h.shape[0], 3) + row,
    ],
    ids=["expand", "repeat", "repeat_interleave", "zeros"],
)
def test_a_size_may_be_the_number_of_rows(rows_of):
    net = Net(lambda n, h: h * rows_of(n.b.bias[None], h)).eval()
    found, right = estimates(net, fs.ScoreDensity(net, SCHEDULE, "eps", program=True))
    assert torch.allclose(found, right, rtol=1e-4)
