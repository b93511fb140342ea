"""The state of a module beside its parameters: attributes that steer its code, and what tracing must not touch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops.instructions import NoProgram
from ..support.host import layout_of
from ..support.untouched import contents, put_back
from .watch import Watch

_TENSORS = ("_parameters", "_buffers", "_modules")


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put every attribute and buffer back as it was before.

    One that caches would keep the tensors of a trace, and a layer that learns would learn from its rows.
    """
    plain = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    kept = contents(value for value in (*model.buffers(), *plain) if layout_of(value) is None)
    try:
        with attributes_restored(model):
            yield
    finally:
        put_back(pair for pair in kept if not torch.equal(*pair))


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Put every attribute back as it was before, lists and dicts as the same objects: an export leaves copies there."""
    before = [(vars(module), _plain_attributes(module)) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, old in before:
            _put_back(attributes, old)


def refuse_changes(watch: Watch) -> None:
    """Raise NoProgram if what is watched has changed, after the network was called."""
    found = watch.changed()
    if found is not None:
        place, name = found
        raise NoProgram(f"{place} changes its attribute {name!r} when it is called")


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
