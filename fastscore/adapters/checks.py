"""What an adapter demands of what it is given: one error that says what, got, expected and remedy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps

from torch import nn

from ..support.generic import Arguments, Result
from ..support.host import kind_of


def adapter(make: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let an adapter refuse what `ScoreDensity` takes and the adapter itself says: network, schedule and prediction."""

    @wraps(make)
    def made(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        refuse_what_is_read(make, make.__name__, options)
        return make(*args, **options)

    return made


def refuse_what_is_read(make: Callable[..., object], called: str, options: Mapping[str, object]) -> None:
    """Raise TypeError for an option that an adapter reads off its objects, by the name of what the user called."""
    said = {"model", "schedule", "predicts"} - inspect.signature(make).parameters.keys()
    for name in sorted(said & options.keys()):
        raise TypeError(
            f"{name} is no option of {called}, which reads it off what else it is given; leave it out, or "
            "build a fastscore.ScoreDensity with a schedule and predicts= of your own"
        )


def expect(holds: bool, what: str, got: object, expected: str, remedy: str) -> None:
    """Raise a ValueError unless the condition holds."""
    if not holds:
        raise ValueError(f"{what} must be {expected}, got {got}; {remedy}")


def expect_module(model: object, what: str, expected: str, remedy: str) -> None:
    """Raise a TypeError unless the model is a torch module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} must be {expected}, got {kind_of(model)}; {remedy}")


def expect_attributes(thing: object, names: tuple[str, ...], what: str, expected: str, remedy: str) -> None:
    """Raise a TypeError that names the missing attributes, or the class that was given instead of an object of it."""
    missing = [name for name in names if not hasattr(thing, name)]
    if missing or isinstance(thing, type):
        without = "" if isinstance(thing, type) else f" without {', '.join(missing)}"
        raise TypeError(f"{what} must be {expected}, got {kind_of(thing)}{without}; {remedy}")


def expect_key(table: dict, key: object, what: str, remedy: str) -> object:
    """Return the table's entry; raise a ValueError that lists the keys if there is none."""
    expect(key in table, what, repr(key), f"one of {', '.join(map(str, table))}", remedy)
    return table[key]
