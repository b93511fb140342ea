"""The random numbers that a network may draw from: PyTorch's, Python's and numpy's global ones, and its layers' own."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy
import torch
from torch import nn

# By network: whether it draws from Python's or numpy's global random numbers.
_DRAWS: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


class Randomness:
    """Where all random numbers of a network are, to put them back there.

    Those of Python and numpy, too, unless a network has left them alone at first: to ask for numpy's and put them back
    takes four tenths of a millisecond. Of layers, generators count that are their attributes.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        self._model = model
        self._global = torch.get_rng_state()
        self._others = _others() if _DRAWS.get(model, True) else None
        attributes = (each for layer in layers for each in vars(layer).values())
        self._own = [_OWN[type(each)](each) for each in attributes if type(each) in _OWN]

    def put_back(self) -> None:
        """Put all of them back."""
        torch.set_rng_state(self._global)
        if self._others is not None:
            _DRAWS[self._model] = _DRAWS.get(self._model, False) or not _alike(_others(), self._others)
            random.setstate(self._others[0])
            numpy.random.set_state(self._others[1])  # noqa: NPY002
        for put_back in self._own:
            put_back()


def _others() -> tuple[Any, Any]:
    return random.getstate(), numpy.random.get_state()  # noqa: NPY002


def _alike(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    return one[0] == other[0] and all(map(numpy.array_equal, one[1], other[1]))


def _by_methods(source: torch.Generator | numpy.random.RandomState) -> Callable[[], object]:
    state = source.get_state()
    return lambda: source.set_state(state)


def _of_python(source: random.Random) -> Callable[[], object]:
    state = source.getstate()
    return lambda: source.setstate(state)


def _of_numpy(source: numpy.random.Generator) -> Callable[[], object]:
    state = source.bit_generator.state
    return lambda: setattr(source.bit_generator, "state", state)


# What puts a generator back where it is now.
_OWN: dict[type, Callable[[Any], Callable[[], object]]] = {
    torch.Generator: _by_methods,
    random.Random: _of_python,
    numpy.random.Generator: _of_numpy,
    numpy.random.RandomState: _by_methods,
}
