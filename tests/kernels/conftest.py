import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """Fill every output with NaN beforehand: an element that no program writes fails its test."""
    empty, empty_like = torch.empty, torch.empty_like
    poison = lambda t: t.fill_(float("nan")) if t.is_floating_point() else t  # noqa: E731
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
