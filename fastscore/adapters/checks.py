"""What an adapter demands of what it is given: one error that says what, got, expected and remedy."""

from __future__ import annotations

from torch import nn


def expect(holds: bool, what: str, got: object, expected: str, remedy: str) -> None:
    """Raise a ValueError unless the condition holds."""
    if not holds:
        raise ValueError(f"{what} must be {expected}, got {got}; {remedy}")


def expect_module(model: object, what: str, expected: str, remedy: str) -> None:
    """Raise a TypeError unless the model is a torch module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} must be {expected}, got {type(model).__name__}; {remedy}")


def expect_attributes(thing: object, names: tuple[str, ...], what: str, expected: str, remedy: str) -> None:
    """Raise a TypeError that names the missing attributes."""
    missing = [name for name in names if not hasattr(thing, name)]
    if missing:
        raise TypeError(f"{what} must be {expected}, got {type(thing).__name__} without {', '.join(missing)}; {remedy}")


def expect_key(table: dict, key: object, what: str, remedy: str) -> object:
    """Return the table's entry; raise a ValueError that lists the keys if there is none."""
    expect(key in table, what, repr(key), f"one of {', '.join(map(str, table))}", remedy)
    return table[key]
