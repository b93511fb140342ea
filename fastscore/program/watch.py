"""Watch: things that may change between two calls of a network, as they are now, and whether they still are.

Values are compared by identity, and numbers and texts by what code can tell of them: a watch keeps what it has seen,
so that no other object can take its place. Asking costs some microseconds a layer, since every evaluation of a row
program asks.
"""

from __future__ import annotations

import ctypes
import datetime
import decimal
import enum
from collections.abc import Callable, Iterable, Mapping, MutableMapping, MutableSequence
from functools import cached_property
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from ..support.structure import is_plain

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

FEW_BYTES = 1 << 12  # of a tensor whose values are compared, in a few microseconds
_MISSING = object()
_LOOK = attrgetter("shape", "dtype", "device", "requires_grad")


class Space(NamedTuple):
    """Names and their values: a module's or an object's attributes, the globals that a function reads, a dict."""

    place: str
    now: Mapping[object, object]
    keys: tuple
    values: tuple
    size: int | None  # number of all names, where a new one may hide another

    def changed(self) -> object | None:
        """Return the first name with another value, None if there is none."""
        now = self.now
        if self.size is not None and len(now) != self.size:
            return next((key for key in now if key not in self.keys), next(iter(self.keys), ""))
        if self.size == len(self.keys):  # all names, which code may go through in their order
            for key, before in zip(list(now), self.keys):
                if not _same(key, before):
                    return before
        if all(map(is_, map(now.get, self.keys, repeat(_MISSING)), self.values)):
            return None
        for key, value in zip(self.keys, self.values):
            if not _same(now.get(key, _MISSING), value):
                return key
        return None


class Tensors(NamedTuple):
    """Tensors that are read anew for every call, as parameters and buffers are: only shapes and the like count."""

    place: str
    now: Mapping[str, Tensor | None]
    shapes: tuple

    def changed(self) -> str | None:
        found = shapes_of(self.now)
        if found == self.shapes:
            return None
        before = dict(self.shapes)
        return next((name for name, shape in found if before.get(name) != shape), next(iter(before), ""))


class _Whole:
    """Whole dicts, whose names and objects are compared in a row, in under a microsecond each."""

    def __init__(self, spaces: list[Space]) -> None:
        self.now, self.sizes = [s.now for s in spaces], [s.size for s in spaces]
        self.keys, self.values = ([*chain(*each)] for each in ((s.keys for s in spaces), (s.values for s in spaces)))

    def changed(self) -> bool:
        """Return whether another object is anywhere, which may still be equal."""
        now = self.now
        try:
            same = list(map(len, now)) == self.sizes and all(map(is_, chain.from_iterable(now), self.keys))
            return not (same and all(map(is_, chain.from_iterable(map(dict.values, now)), self.values)))
        except RuntimeError:  # another thread adds a name meanwhile
            return True


class _Some:
    """Some names of each of several mappings, compared in a row."""

    def __init__(self, spaces: list[Space]) -> None:
        pairs = [(s.now.get, key, value) for s in spaces for key, value in zip(s.keys, s.values)]
        self.pairs, self.values = [(get, key) for get, key, _ in pairs], [value for *_, value in pairs]
        sized = [(s.now, s.size) for s in spaces if s.size is not None]
        self.sized, self.sizes = [now for now, _ in sized], [size for _, size in sized]
        ordered = [s for s in spaces if isinstance(s.now, dict) and s.size == len(s.keys)]
        self.ordered, self.order = [s.now for s in ordered], [*chain.from_iterable(s.keys for s in ordered)]

    def changed(self) -> bool:
        """Return whether another object is anywhere, which may still be equal."""
        if list(map(len, self.sized)) != self.sizes:
            return True
        if not all(map(is_, chain.from_iterable(map(list, self.ordered)), self.order)):
            return True
        return not all(map(is_, [get(key, _MISSING) for get, key in self.pairs], self.values))


class _Shapes:
    """The shapes of all layers' parameters and buffers, compared in a row."""

    def __init__(self, tensors: list[Tensors]) -> None:
        self.now = [each.now for each in tensors]
        self.shapes = [*chain.from_iterable(each.shapes for each in tensors)]

    def changed(self) -> bool:
        return [*chain.from_iterable(map(shapes_of, self.now))] != self.shapes


class Watch:
    """What was added to it, as it is now."""

    def __init__(self) -> None:
        self.spaces: list[Space] = []
        self.tensors: list[Tensors] = []
        self._hollow: list[Mapping] = []  # empty dicts, most of which are a layer's hooks
        self._read: list[tuple[str, str, Callable[[], tuple], tuple]] = []  # place, name, what to ask, and its answer
        self._copies: list[tuple[object, object]] = []
        self.unseen: dict[int, str] = {}  # where tensors lie that are not compared, and what they are
        self.learned: dict[int, str] = {}  # where tensors lie that learn and are no parameters, and what they are
        self.called: list[type] = []  # classes of PyTorch's own layers, whose calls are watched outside of a trace
        self._caches: list[tuple[Callable, int]] = []

    def space(
        self, place: str, now: Mapping, keys: Iterable | None = None, whole: bool = True, copy: bool = False
    ) -> None:
        """Watch some names of a mapping, all by default; `whole` also whether there are others, `copy` to put back."""
        if not now and keys is None:
            self._hollow.append(now)
            return
        keys = tuple(now if keys is None else keys)
        values = tuple(now.get(key, _MISSING) for key in keys)
        self.__dict__.pop("_rows", None)
        self.spaces.append(Space(place, now, keys, values, len(now) if whole else None))
        if copy and isinstance(now, MutableMapping):
            self._copies.append((now, dict(now)))

    def layers(self, place: str, now: Mapping[str, Tensor | None]) -> None:
        """Watch the shapes of a layer's parameters or buffers."""
        if now:
            self.__dict__.pop("_rows", None)
            self.tensors.append(Tensors(place, now, shapes_of(now)))
        else:
            self._hollow.append(now)

    def reading(self, place: str, name: str, read: Callable[[], tuple]) -> None:
        """Watch what a function returns: a tuple of things."""
        self._read.append((place, name, read, read()))

    def sequence(self, place: str, now: MutableSequence) -> None:
        """Watch the entries of a list or deque, also to put them back."""
        self.reading(place, "entries", lambda: tuple(now))
        self._copies.append((now, list(now)))

    def tensor(self, place: str, now: Tensor) -> None:
        """Watch a dense tensor's values: themselves where they are few and on the CPU, else their version and place.

        What writes through `.data` or `.numpy()` leaves the version as it was. A trace reads a tensor's values anew for
        every call, and keeps a number that code takes out of it: of a tensor in `unseen` it must keep none.
        """
        storage = now.untyped_storage()
        if now.device.type == "cpu" and now.is_contiguous() and now.nbytes <= FEW_BYTES:
            self.reading(place, "values", lambda: (now.shape, _bytes_at(now.data_ptr(), now.nbytes)))
        elif now.device.type == "cpu" and storage.nbytes() <= FEW_BYTES:  # what lies in it in another order
            self.reading(place, "values", lambda: (now.shape, now.stride(), now.data_ptr(), _bytes_in(now)))
        else:
            self.unseen[storage.data_ptr()] = f"{place} is a tensor of {now.nbytes:,} bytes on {now.device}"
            if not now.is_inference():
                self.reading(place, "values", lambda: (now._version, now.data_ptr()))

    def array(self, place: str, now: np.ndarray) -> None:
        """Watch an array's values."""
        self.reading(place, "values", lambda: (now.shape, now.dtype.str, now.tobytes()))

    def cache(self, function: _lru_cache_wrapper[Any]) -> None:
        """Clear the cache of a function, when things are put back, if it has kept more since."""
        self._caches.append((function, function.cache_info().misses))

    @cached_property
    def _rows(self) -> tuple[_Whole, _Some, _Shapes]:
        """All spaces and tensors, each kind to be compared in a row."""
        parts: tuple[list[Space], list[Space]] = [], []
        for space in self.spaces:
            parts[not (type(space.now) is dict and space.size == len(space.keys))].append(space)
        return _Whole(parts[0]), _Some(parts[1]), _Shapes(self.tensors)

    def changed(self) -> tuple[str, object] | None:
        """Return where something has changed, and what; None if all is as it was."""
        if any(self._hollow):
            return "a layer", "hooks"
        if any(row.changed() for row in self._rows):
            for entry in (*self.spaces, *self.tensors):
                name = entry.changed()
                if name is not None:
                    return entry.place, name
        for place, name, read, before in self._read:
            now = read()
            if len(now) != len(before) or not all(map(_same, now, before)):
                return place, name
        return None

    def put_back(self) -> None:
        """Give dicts, lists and objects the entries back that they had."""
        for now, before in self._copies:
            if isinstance(now, MutableMapping):
                if list(now) != list(before) or any(now[key] is not value for key, value in before.items()):
                    now.clear()
                    now.update(before)
            elif len(now) != len(before) or not all(map(is_, now, before)):
                now.clear()
                now.extend(before)
        for function, misses in self._caches:
            if function.cache_info().misses != misses:
                function.cache_clear()


def _bytes_at(place: int, size: int) -> bytes:
    return ctypes.string_at(place, size)  # no operator, which a trace would take note of


def _bytes_in(tensor: Tensor) -> bytes:
    storage = tensor.untyped_storage()
    return _bytes_at(storage.data_ptr(), storage.nbytes())


def shapes_of(tensors: Mapping[str, Tensor | None]) -> tuple:
    """Return by name what a trace depends on of each tensor beside its numbers."""
    return tuple([(name, _LOOK(v)) for name, v in tensors.items() if v is not None])


def _same(a: object, b: object) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | frozenset):  # of equal sets, too, one may begin with another entry
        return len(a) == len(b) and all(map(_same, a, b))
    return is_value(a) and bool(exactly(a) == exactly(b))


def exactly(value: object) -> object:
    """Return what is equal for two values of one type if no code can tell them apart: for 0.0 and -0.0 it is not."""
    return repr(value) if isinstance(value, _EQUAL_TO_OTHERS) else value


def is_value(thing: object) -> bool:
    """Return whether a thing is no more than its value, as numbers, texts and paths are: it cannot change.

    A member of an enumeration, and a number or text of a class of its own, may have attributes beside it. A memoryview
    has a hash, and shows what others write.
    """
    kind = type(thing)
    if isinstance(thing, memoryview) or (isinstance(thing, _VALUED) and kind.__module__ not in _VALUES):
        return False
    return is_plain(thing) or (kind.__hash__ not in (None, object.__hash__) and kind.__module__ in _VALUES)


_EQUAL_TO_OTHERS = (float, complex, slice, range, decimal.Decimal, datetime.date, datetime.time, np.generic)
_VALUED = (int, float, complex, str, bytes, enum.Enum)
_VALUES = ("datetime", "decimal", "fractions", "pathlib", "re", "uuid", "numpy", "numpy.dtypes", "builtins")
