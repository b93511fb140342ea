"""The state of a module beside its parameters: attributes that steer its code, and what tracing must not touch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .instructions import NoProgram
from .untouched import contents, put_back

_TENSORS = ("_parameters", "_buffers", "_modules")


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put every attribute and buffer back as it was before: one that caches would keep the tensors of a trace, and a
    layer that learns would learn from its rows."""
    before = [(vars(module), _plain_attributes(module)) for module in model.modules()]
    plain = (value for _, old in before for value, _ in old.values() if isinstance(value, Tensor))
    kept = contents([*model.buffers(), *plain])
    try:
        yield
    finally:
        put_back(pair for pair in kept if not torch.equal(*pair))
        for attributes, old in before:
            _put_back(attributes, old)


def refuse_changes(model: nn.Module, before: list) -> None:
    """Raise NoProgram if a network's state is no longer what `state_of` said before."""
    old = {(name, key): value for name, key, *value in before}
    for name, key, *value in state_of(model):
        if old.get((name, key)) != value:
            raise NoProgram(f"layer {name or 'forward'!r} changes its attribute {key!r} when it is called")


def _plain_attributes(module: nn.Module) -> dict[str, tuple[object, object]]:
    """Return attributes, with a copy of their content where they are lists or dicts."""
    found = {key: value for key, value in vars(module).items() if key not in _TENSORS}
    return {key: (value, value.copy() if type(value) in (list, dict) else None) for key, value in found.items()}


def _put_back(attributes: dict[str, object], old: dict[str, tuple[object, object]]) -> None:
    for key in [key for key in attributes if key not in _TENSORS and key not in old]:
        del attributes[key]
    for key, (value, content) in old.items():
        attributes[key] = value
        if content is not None:
            value.clear()
            (value.extend if type(value) is list else value.update)(content)


def state_of(model: nn.Module) -> list[tuple]:
    """Return a value that changes when the network's code may take another way: its layers and their attributes.

    Parameters and buffers are read anew for every call, so only their shapes count.
    """
    found = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                own = ((k, v) for k, v in value.items() if v is not None)
                found.append((name, key, tuple((k, tuple(v.shape), v.dtype, v.device) for k, v in own)))
            elif key != "_modules" and not (isinstance(value, dict) and not value):  # most hooks are empty
                found.append((name, key, type(module), frozen(value)))
    return found


def frozen(value: object) -> object:
    """Return a value that compares equal as long as another one has the same content, for what a network reads."""
    if isinstance(value, Tensor):
        return id(value), value._version, tuple(value.shape)
    if isinstance(value, list | tuple | set | frozenset):
        return type(value).__name__, tuple(map(frozen, value))
    if isinstance(value, dict):
        return type(value).__name__, tuple((frozen(k), frozen(v)) for k, v in value.items())
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device):
        return type(value).__name__, value
    return id(value)
