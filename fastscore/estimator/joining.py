"""The results of several calls, to be joined to one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def list_of(kind: type[T], name: str, given: object) -> list[T]:
    """Return what was given to `kind.cat`, checked.

    Arguments:
        name: what several of this kind are called.

    Raises:
        TypeError: for what is no list of these.
        ValueError: for an empty one.
    """
    several = isinstance(given, Iterable) and not isinstance(given, kind)  # a single one may be iterable itself
    parts = list(given) if several else []
    others = [type(each).__name__ for each in parts if not isinstance(each, kind)]
    if others or not several:
        got = f"a list with {others[0]}" if others else f"a single {type(given).__name__}"
        raise TypeError(f"{kind.__name__}.cat takes a list of {name}, got {got}; give [first, second, ...]")
    if not parts:
        raise ValueError(f"there are no {name} to join, expected one at least")
    return parts
