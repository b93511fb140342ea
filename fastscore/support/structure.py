"""Nested arguments taken apart into leaves by path, and put together again with other leaves.

Walked are what torch's pytree knows (dicts, lists, tuples, named tuples, registered classes), other mappings,
dataclasses, attrs classes and namespaces. A container is rebuilt as a copy of its own kind: no constructor runs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import enum
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, range, slice, type(None), type(...), np.generic)
_PLAIN += (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


@dataclass(frozen=True)
class Marked:
    """A value of which the caller says whether it has one entry a sample, or is shared by the batch."""

    value: object
    per_sample: bool


@dataclass(frozen=True)
class Leaf:
    """What stands at a path, and what the caller said of it: True has one entry a sample, False is shared, None."""

    value: object
    per_sample: bool | None


class Branch(NamedTuple):
    """A container: what to make another one of its kind from, what its entries add to the path, and the entries.

    An entry that is a text is the path of a leaf.
    """

    like: object
    names: list[object]
    entries: tuple[Branch | str, ...]


@dataclass(frozen=True)
class Structure:
    """How leaves hang together.

    Attributes:
        key: equal for two structures that put the same paths into the same containers.
        lists: path and length of every list whose leaves the caller said nothing of, and of tuples that are not a size,
            a crop or the like: numbers and texts alone.
        arguments: by keyword, the path of a leaf or a container.
    """

    key: tuple
    lists: dict[str, int]
    arguments: dict[str, Branch | str]

    def build(self, leaves: Mapping[str, object]) -> dict[str, object]:
        """Return the keyword arguments with these leaves by path."""
        return {name: _together(part, leaves) for name, part in self.arguments.items()}


def is_plain(value: object) -> bool:
    """Return whether a value is a number, a text or another constant, which holds no tensor."""
    return isinstance(value, _PLAIN)


def _is_number(value: object) -> bool:
    """Return whether a value is plain and no text: a tuple of such is a size, one of texts may have one a sample."""
    return is_plain(value) and not isinstance(value, str)


def flatten(given: Mapping[str, object]) -> tuple[dict[str, Leaf], Structure]:
    """Return the leaves of keyword arguments by path, such as ``added['mean']`` or ``tokens[0].mask``.

    Raises:
        ValueError: for a container that holds itself.
    """
    walk = _Walk()
    parts = {name: walk.visit(name, value, None) for name, value in given.items()}
    return walk.leaves, Structure(tuple(walk.key), walk.lists, parts)


class _Walk:
    def __init__(self) -> None:
        self.leaves: dict[str, Leaf] = {}
        self.lists: dict[str, int] = {}
        self.key: list[object] = []
        self.around: list[object] = []  # the containers that are being walked

    def visit(self, path: str, value: object, said: bool | None) -> Branch | str:
        """Return what hangs at a path, and note its leaves."""
        if isinstance(value, Marked):
            return self.visit(path, value.value, value.per_sample)
        try:
            opened = None if isinstance(value, Tensor) or is_plain(value) else _open(value)
        except RecursionError:  # torch's pytree follows an entry that is its own container
            raise _of_circle(path, value) from None
        if opened is None:
            if path in self.leaves:
                raise ValueError(
                    f"two conditions are called {path!r}, got one inside of another and one by that name; rename one"
                )
            self.leaves[path] = Leaf(value, said)
            self.key.append(path)
            return path
        if any(container is value for container in self.around):
            raise _of_circle(path, value)
        like, names, children = opened
        if said is None and (type(value) is list or (type(value) is tuple and not all(map(_is_number, value)))):
            self.lists[path] = len(value)
        self.key.append((path, type(value), len(children)))
        self.around.append(value)
        entries = tuple(self.visit(path + suffix, child, said) for suffix, child in children)
        self.around.pop()
        return Branch(like, names, entries)


def _of_circle(path: str, value: object) -> ValueError:
    return ValueError(
        f"condition {path!r} holds itself, got {type(value).__name__} inside of itself; conditions are nested without "
        "circles: leave the inner one out"
    )


def _open(value: object) -> tuple[object, list[object], list[tuple[str, object]]] | None:
    """Return what a container is made from, its names, and its entries with what they add to the path; None: a leaf."""
    children, spec = _flattened(value)
    if len(children) != 1 or children[0][0]:
        return spec, [], children
    if isinstance(value, Mapping):
        return value, list(value), [(f"[{key!r}]", value[key]) for key in value]
    if _has_fields(value):
        names = list(vars(value)) if hasattr(value, "__dict__") else [f.name for f in dataclasses.fields(value)]
        return value, names, [(f".{name}", getattr(value, name)) for name in names]
    return None


def _flattened(value: object) -> tuple[list[tuple[str, object]], TreeSpec]:
    """Return the entries of what torch's pytree knows, with what they add to the path; a leaf adds nothing."""

    def is_inside(entry: object) -> bool:
        return entry is not value

    try:
        found, spec = tree_flatten_with_path(value, is_leaf=is_inside)
        return [(keystr(path), entry) for path, entry in found], spec
    except ValueError:  # registered without names for its entries, as the outputs of diffusers' models are
        entries, spec = tree_flatten(value, is_leaf=is_inside)
        names = list(value) if isinstance(value, Mapping) and len(value) == len(entries) else range(len(entries))
        return [(f"[{name!r}]", entry) for name, entry in zip(names, entries)], spec


def _together(part: Branch | str, leaves: Mapping[str, object]) -> object:
    if isinstance(part, str):
        return leaves[part]
    entries = [_together(entry, leaves) for entry in part.entries]
    if isinstance(part.like, TreeSpec):
        return tree_unflatten(entries, part.like)
    if isinstance(part.like, types.MappingProxyType):  # a view, which is read only and cannot be copied
        return types.MappingProxyType(dict(zip(part.names, entries)))
    made = copy.copy(part.like)
    for name, entry in zip(part.names, entries):
        if isinstance(made, Mapping):
            made[name] = entry
        else:
            object.__setattr__(made, name, entry)  # also where the class is frozen
    return made


def _has_fields(value: object) -> bool:
    """Whether an object is a dataclass, a class of attrs or a namespace, which are their attributes and no more."""
    if isinstance(value, type):
        return False
    return dataclasses.is_dataclass(value) or isinstance(value, _NAMESPACES) or hasattr(value, "__attrs_attrs__")
