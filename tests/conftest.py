"""Triton kernels run in the interpreter here; the variable has to be set before triton is imported."""

import os

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # as many workers as cores: more threads would wait for each other


def pytest_collection_modifyitems(items):
    """Put files with slow tests first, so that no worker is left alone with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def one_thread():
    """On a busy machine a second thread for small tensors takes forty times the time that it saves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_chunks(monkeypatch):
    """Return a function that makes every later estimate evaluate at most so many rows at once, whatever its budget."""

    from fastscore.support.memory import Chunks  # after the variable above is set

    def cut(rows, keep_tables=True, kept=1 << 20):
        chunks = Chunks(rows, rows, int(keep_tables), kept=kept)
        monkeypatch.setattr("fastscore.estimator.planner.plan_chunks", lambda *_: chunks)

    return cut
