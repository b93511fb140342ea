"""Classes of PyTorch's own that are patched after a first call, and what the standard library's objects keep inside."""

import threading

import pytest
import torch
import torch.nn.functional as F
from network_with_settings import SCHEDULE, Net, estimates
from torch import nn

import fastscore as fs

LOCK = threading.Lock()


def doubled(layer, x):
    return 2 * F.linear(x, layer.weight, layer.bias)


CALL = nn.Module.__call__
CASES = {
    "call of a layer's class": (lambda n, h: h, lambda m, n: m.setattr(nn.Linear, "__call__", doubled, raising=False)),
    "call of all layers": (
        lambda n, h: h,
        lambda m, n: m.setattr(
            nn.Module, "__call__", lambda layer, *args: CALL(layer, *args) * (1 + isinstance(layer, nn.Linear))
        ),
    ),
    "what the call of a layer calls": (
        lambda n, h: h,
        lambda m, n: m.setattr(nn.Linear, "_call_impl", doubled, raising=False),
    ),
    "call of a layer that is not registered": (
        lambda n, h: n.hidden[0](h),
        lambda m, n: m.setattr(nn.Bilinear, "__call__", lambda layer, h: 2 * h, raising=False),
    ),
    "lock": (lambda n, h: h * (2.0 if LOCK.locked() else 1.0), lambda m, n: LOCK.acquire()),
    "name of a thread": (
        lambda n, h: h * len(threading.current_thread().name),
        lambda m, n: m.setattr(threading.current_thread(), "name", "a"),
    ),
}


class Same(nn.Bilinear):
    def forward(self, h):
        return h * self.weight.sum()


@pytest.fixture(autouse=True)
def released():
    yield
    if LOCK.locked():
        LOCK.release()


@pytest.mark.parametrize("name", CASES)
def test_a_patch_counts_as_soon_as_it_is_there(name, monkeypatch):
    operation, change = CASES[name]
    net = Net(operation).eval()
    net.hidden = [Same(1, 1, 1).requires_grad_(False)]
    density = fs.ScoreDensity(net, SCHEDULE, "eps")
    for _ in range(2):
        before, right = estimates(net, density)
        # float32 sums in another order, of densities whose size is up to 1e3
        assert torch.allclose(before, right, rtol=1e-4)
    (found,) = density._programs._found.values()
    assert found.program is not None, found.reason
    assert found.traces == 1
    change(monkeypatch, net)
    after, right = estimates(net, density)
    assert not torch.allclose(right, before, rtol=1e-2), "the change should change the density"
    assert torch.allclose(after, right, rtol=1e-4)


def helper(h):
    return h


def test_a_function_of_which_code_reads_the_globals_is_not_followed():
    net = Net(lambda n, h: h * len(helper.__globals__["__name__"])).eval()
    assert "reads __globals__, so that what it reads cannot be followed" in fs.explain(net, (3,))


def test_a_lock_that_code_holds_does_not_matter():
    net = Net(lambda n, h: h).eval()
    lock = threading.Lock()

    def guarded(n, h):
        with lock:
            return 2 * h

    net.change = guarded
    density = fs.ScoreDensity(net, SCHEDULE, "eps", program=True)
    estimates(net, density)
    with lock:
        assert density._programs._found.popitem()[1].changed() is None
