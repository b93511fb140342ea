"""Find what a network's Python code reads beside tensors, so that a program traced from it knows when it is stale.

A trace keeps numbers: those of attributes, globals, closures, default arguments, classes, configuration objects. From
`forward` on, the bytecode says which names the code reads, and those lead to further objects and functions. An
attribute counts as read if code that was reached names it, on whatever object: more than what is read, not less.

References:
    The dis module, https://docs.python.org/3/library/dis.html
"""

from __future__ import annotations

import builtins
import collections
import dis
import enum
import functools
import inspect
import logging
import operator
import os
import pathlib
import sys
import types
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ops.instructions import NoProgram
from ..support.host import layout_of
from .bytecode import attributes_of, content, root, slots_of, words_of, words_of_class
from .code_kinds import (
    DYNAMIC,
    ENVIRONMENT,
    FILE_CALLS,
    FILES,
    FIXED,
    FIXED_CALLS,
    FOREIGN_MEMORY,
    HARMLESS,
    HIDDEN,
    HIDDEN_ATTRIBUTES,
    LIFECYCLE,
    LOCKS,
    OF_PATHS,
    OUTSIDE,
    RANDOM,
)
from .settings import SETTINGS
from .watch import Watch, is_value

MOST = 20_000  # things to look at; a network that reaches more reaches a framework
LARGEST = 1 << 16  # bytes of an array that is compared at every call
_BUILTIN = vars(builtins)
_OF_CALLS = ("__call__", "_wrapped_call_impl", "_call_impl")  # what the call of a layer goes through
_PATHS = (pathlib.Path, pathlib.PosixPath, pathlib.WindowsPath)


def watch_code(model: nn.Module) -> Watch:
    """Return a watch of all that a network's code reads, layers included.

    Raises:
        NoProgram: naming what cannot be followed: a generator, a clock, a large array, an object of a foreign kind.
    """
    return _Reader(model).watch


def watch_calls(watch: Watch) -> None:
    """Watch what the call of a layer goes through, and the hooks of all: outside of a trace, which has its own."""
    for hooks in _global_hooks():
        watch.space("all layers", hooks)
    for kind in watch.called:
        watch.space(f"class {kind.__qualname__}", vars(kind), _OF_CALLS, whole=False)


def _global_hooks() -> list[dict]:
    found = vars(torch.nn.modules.module).items()
    return [hooks for key, hooks in found if key.startswith("_global_") and isinstance(hooks, dict)]


def _of_libraries(kind: type) -> frozenset[str]:
    """Return names that the code of a class's fixed bases reads, as UserDict does; layers have readers of their own."""
    bases = [base for base in kind.__mro__ if root(base.__module__) in FIXED and not issubclass(base, nn.Module)]
    return frozenset().union(*map(words_of_class, bases))


@dataclass(eq=False)
class _Names:
    """A mapping of which names that the code reads lead on; all of them where it holds no attributes, as a dict."""

    place: str
    now: Mapping
    every: bool = False
    whole: bool = True  # whether another name may hide one of these
    dynamic: bool = True  # whether code reaches them by names that it makes up, too
    watched: bool = False
    also: frozenset[str] = frozenset()  # names that code reads which is not followed, that of a base class
    done: set = field(default_factory=set)


class _Reader:
    """Follows names from the layers on until nothing new is reached."""

    def __init__(self, model: nn.Module) -> None:
        self.watch, layers = Watch(), tuple(model.modules())
        self.watch.reading("a layer", "class", lambda: (*map(type, layers), *map(vars, layers)))
        self.words: set[str] = {"forward"}  # names in the code that was reached
        self.of_paths: dict[str, str] = {}  # methods that paths have, and what calls them on whatever object
        self.locks: list[tuple[str, Any]] = []
        self.paths = False  # whether a path was reached
        self.every = False  # whether some code reads names that it does not spell out
        self.names: list[_Names] = []
        self.waiting: list[tuple[str, object]] = []
        self.seen = {id(thing): thing for thing in (*model.parameters(), *model.buffers())}
        for name, module in model.named_modules():
            self._layer(f"layer {name or 'forward'!r}", module)
        self._ties(layers)
        for hooks in _global_hooks():
            self.names.append(_Names("all layers", hooks, every=True, watched=True))
        self._follow()
        for name, place in self.of_paths.items() if self.paths else ():
            raise NoProgram(f"{place} calls {name}, which asks for a file that may change")
        for name in sorted(self.words & SETTINGS.keys()):
            self.watch.reading("torch", name, SETTINGS[name])
        for place, lock in self.locks if "locked" in self.words else ():
            self.watch.reading(place, "locked", lambda lock=lock: (lock.locked(),))
        for names in self.names:
            if not names.watched:
                keys = [key for key in names.now if key in names.done]
                self.watch.space(names.place, names.now, keys, names.whole, copy=type(names.now) is dict)

    def _follow(self) -> None:
        while True:
            while self.waiting:
                self._visit(*self.waiting.pop())
            for names in self.names:
                every = names.every or (self.every and names.dynamic)
                wanted = names.now.keys() if every else (self.words | names.also) & names.now.keys()
                new = [key for key in wanted if key not in names.done]
                names.done.update(new)
                self.waiting += [(f"{key!r} of {names.place}", names.now[key]) for key in new]
            if not self.waiting:
                return

    def _visit(self, place: str, thing: object) -> None:
        """Watch what may change of a thing, and go on with what it leads to."""
        self.paths |= isinstance(thing, pathlib.Path) or any(thing is kind for kind in _PATHS)
        leads_on = isinstance(thing, tuple | frozenset | types.MethodType | types.BuiltinFunctionType)
        if is_value(thing) and not leads_on:
            return
        if id(thing) in self.seen:
            return
        self.seen[id(thing)] = thing
        if len(self.seen) > MOST:
            raise NoProgram(f"its code reaches more than {MOST} objects, the last as {place}")
        if isinstance(thing, RANDOM) or any(thing is outside for outside in OUTSIDE):
            raise NoProgram(f"{place} gives another answer at every call")
        if any(thing is call for call in FILE_CALLS):
            raise NoProgram(f"{place} asks for a file that may change")
        for kinds, follow in self._KINDS:
            if isinstance(thing, kinds):
                follow(self, place, thing)
                return
        self._object(place, thing)

    def _layer(self, place: str, module: nn.Module) -> None:
        self.seen[id(module)] = module
        attributes = vars(module)
        self.watch.space(place, attributes)
        self.names.append(_Names(place, attributes, watched=True))
        for key, value in attributes.items():
            if not isinstance(value, dict):
                continue
            if key in ("_parameters", "_buffers"):
                self.watch.layers(place, value)
            else:
                self.watch.space(place, value)
            if key in ("_parameters", "_buffers", "_modules"):
                self.seen[id(value)] = value
            elif "_hooks" in key and value:
                self.names.append(_Names(place, value, every=True, watched=True))
        if id(type(module)) not in self.seen:
            self._class(place, type(module))

    def _ties(self, layers: tuple[nn.Module, ...]) -> None:
        """Watch whether a weight of several names is still one: a trace reads all of them under one of these names."""
        places: dict[int, list[tuple[dict[str, Tensor | None], str]]] = {}
        for held in (held for module in layers for held in (module._parameters, module._buffers)):
            for name, value in held.items():
                if value is not None:
                    places.setdefault(id(value), []).append((held, name))
        for same in places.values():
            if len(same) > 1:
                one = lambda same=same: (len({id(held.get(name)) for held, name in same}) == 1,)  # noqa: E731
                self.watch.reading("a layer", "tied weights", one)

    def _foreign_layer(self, place: str, module: nn.Module) -> None:
        """Follow a layer that is no layer of the network, whose parameters a trace would keep."""
        for part in module.modules():
            if part is module or id(part) not in self.seen:
                self._layer(place, part)
                for held in (part._parameters, part._buffers):
                    self.watch.space(place, held)
                self.waiting += [(place, v) for v in (*part._parameters.values(), *part._buffers.values())]

    def _class(self, place: str, kind: type) -> None:
        if issubclass(kind, enum.Enum):
            self.waiting += [(f"{name!r} of {place}", member) for name, member in kind.__members__.items()]
        for base in kind.__mro__:
            if base is not kind and id(base) in self.seen:
                continue
            self.seen[id(base)] = base
            if root(type(base).__module__) not in FIXED:
                self._class(place, type(base))
            if root(base.__module__) not in FIXED:
                self.names.append(_Names(f"class {base.__qualname__}", vars(base), also=_of_libraries(base)))
                own = [k for k in vars(base) if k.startswith("__") and k.endswith("__") and k not in LIFECYCLE]
                self.words.update(k for k in own if inspect.isfunction(vars(base)[k]))
            elif issubclass(base, nn.Module):
                self.watch.called.append(base)
                if inspect.isfunction(vars(base).get("forward")):
                    self.watch.space(f"class {base.__qualname__}", vars(base), ["forward"], whole=False)
                    self._fixed_code(vars(base)["forward"])

    def _fixed_code(self, function: types.FunctionType) -> None:
        """Watch which functions a layer of PyTorch calls, not what these do."""
        words, read = words_of(function.__code__)
        known = [name for name in read if name in function.__globals__]
        self.watch.space(f"function {function.__qualname__}", function.__globals__, known, whole=False)
        for value in map(function.__globals__.get, known):
            if isinstance(value, types.ModuleType):
                called = sorted(words & vars(value).keys())
                self.watch.space(f"module {value.__name__}", vars(value), called, whole=False)

    def _function(self, place: str, function: types.FunctionType) -> None:
        place = f"function {function.__qualname__}"
        cells = function.__closure__ or ()
        self.watch.reading(place, "variables", lambda: tuple(map(content, cells)))
        self.waiting += [(f"{name!r} of {place}", content(c)) for name, c in zip(function.__code__.co_freevars, cells)]
        if hasattr(function, "__wrapped__"):
            self.waiting.append((place, function.__wrapped__))
        if root(function.__globals__.get("__name__", "")) in FIXED:
            return
        defaults = lambda: (function.__code__, function.__defaults__, function.__kwdefaults__)  # noqa: E731
        self.watch.reading(place, "code and defaults", defaults)
        self.waiting += [(f"defaults of {place}", value) for value in defaults()[1:] if value]
        self.names.append(_Names(place, vars(function)))
        self._code(place, function.__code__, function.__globals__)

    def _code(self, place: str, code: types.CodeType, known: dict[str, object]) -> None:
        words, read = words_of(code)
        self.words |= words
        self.every |= bool(words & DYNAMIC)
        if words & ENVIRONMENT:
            self.waiting.append(("the environment", os.environ))
        for name in read - known.keys():
            if any(getattr(builtins, name, None) is outside for outside in OUTSIDE):
                raise NoProgram(f"{place} calls {name}, which gives another answer at every call")
            if any(getattr(builtins, name, None) is hidden for hidden in HIDDEN):
                raise NoProgram(f"{place} calls {name}, so that what it reads cannot be followed")
        attributes = attributes_of(code) if words & (FILES | OF_PATHS | HIDDEN_ATTRIBUTES) else set()
        for name in HIDDEN_ATTRIBUTES & attributes:
            raise NoProgram(f"{place} reads {name}, so that what it reads cannot be followed")
        for name in FILES & (attributes | read | {*code.co_names}):
            raise NoProgram(f"{place} calls {name}, which reads a file that may change")
        self.of_paths |= {name: place for name in OF_PATHS & attributes}
        self.watch.space(f"the globals of {place}", known, sorted(read), whole=False)
        self.waiting += [(f"global {name!r}", known[name]) for name in sorted(read & known.keys())]
        put = [k for k in sorted(read - known.keys()) if root(getattr(_BUILTIN.get(k), "__module__", "")) not in FIXED]
        self.watch.space("builtins", _BUILTIN, put, whole=False)  # what a program has put there
        self.waiting += [(f"{name!r} of builtins", _BUILTIN[name]) for name in put if name in _BUILTIN]
        package = known.get("__package__") or ""
        imported = {i.argval for i in dis.get_instructions(code) if i.opname == "IMPORT_NAME"}
        if words & {"__import__", "import_module"}:
            imported |= words
        candidates = {*imported, *(f"{package}.{name}".rstrip(".") for name in imported)}
        self.waiting += [(f"module {name!r}", sys.modules[name]) for name in sorted(candidates & sys.modules.keys())]

    def _module(self, place: str, module: types.ModuleType) -> None:
        place = f"module {module.__name__}"
        self.seen[id(vars(module).get("__builtins__"))] = builtins
        own = root(module.__name__) not in FIXED
        self.names.append(_Names(place, vars(module), whole=False, dynamic=own))
        if own and "__getattr__" in vars(module):  # makes what the module does not have
            self.waiting.append((f"'__getattr__' of {place}", vars(module)["__getattr__"]))

    def _mapping(self, place: str, mapping: dict) -> None:
        self.names.append(_Names(place, mapping, every=True))
        if type(mapping) is not dict:
            self._attributes(place, mapping)

    def _sequence(self, place: str, entries: Collection) -> None:
        if isinstance(entries, list | collections.deque):
            self.watch.sequence(place, entries)
        elif isinstance(entries, set):
            self.watch.reading(place, "entries", lambda: tuple(map(repr, entries)))
        self.waiting += [(place, entry) for entry in entries]

    def _array(self, place: str, array: np.ndarray) -> None:
        if array.nbytes > LARGEST or array.dtype.hasobject:
            raise NoProgram(f"{place} is an array of {array.nbytes:,} bytes, too large to compare; make it a buffer")
        self.watch.array(place, array)

    def _tensor(self, place: str, tensor: Tensor) -> None:
        if (kind := layout_of(tensor)) is not None:
            raise NoProgram(f"{place} is a {kind} tensor, whose values are not compared; make it a buffer, or dense")
        if tensor.requires_grad:
            self.watch.learned[tensor.untyped_storage().data_ptr()] = place
        self.watch.tensor(place, tensor)

    def _bound(self, place: str, method: types.MethodType | types.BuiltinFunctionType) -> None:
        self.waiting.append((place, getattr(method, "__self__", None)))
        self.waiting.append((place, getattr(method, "__func__", None)))

    def _partial(self, place: str, partial: functools.partial) -> None:
        self.waiting += [(place, part) for part in (partial.func, partial.args, partial.keywords)]

    def _descriptor(self, place: str, descriptor: object) -> None:
        parts = ("fget", "__func__", "func", "__wrapped__")
        self.waiting += [(place, getattr(descriptor, part)) for part in parts if hasattr(descriptor, part)]
        if hasattr(descriptor, "cache_info"):
            self.watch.cache(descriptor)

    def _reference(self, place: str, reference: weakref.ref) -> None:
        self.watch.reading(place, "object", lambda: (reference(),))
        self.waiting.append((place, reference()))

    def _logger(self, place: str, logger: logging.Logger) -> None:
        self.watch.reading(place, "level", lambda: (logger.level, logger.disabled))

    def _getter(self, place: str, getter: operator.attrgetter) -> None:
        _, names = getter.__reduce__()
        self.words.update(part for name in names for part in name.split("."))

    def _exception(self, place: str, error: BaseException) -> None:
        self.watch.reading(place, "args", lambda: (error.args,))
        self.waiting.append((place, error.args))
        self._attributes(place, error)

    def _lock(self, place: str, lock: Any) -> None:
        self.locks.append((place, lock))

    def _nothing(self, place: str, thing: object) -> None:
        pass

    def _object(self, place: str, thing: object) -> None:
        kind = type(thing)
        if isinstance(thing, FOREIGN_MEMORY) or (kind is not object and not self._attributes(place, thing)):
            name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
            raise NoProgram(f"{place} is a {name}, whose changes cannot be followed")

    def _attributes(self, place: str, thing: object) -> bool:
        """Follow an object's attributes and its class; return whether it has any."""
        kind = type(thing)
        slots = [s for base in kind.__mro__ for s in slots_of(base) if s not in ("__dict__", "__weakref__")]
        if not hasattr(thing, "__dict__") and not slots:
            return False
        self.watch.reading(place, "class", lambda: (type(thing),))
        if hasattr(thing, "__dict__"):
            also = _of_libraries(kind)
            every = root(kind.__module__) in FIXED or bool(also & DYNAMIC)
            self.names.append(_Names(place, vars(thing), every=every, also=also))
        if slots:
            values = lambda: tuple(getattr(thing, slot, None) for slot in slots)  # noqa: E731
            self.watch.reading(place, "attributes", values)
            self.waiting += [(f"{slot!r} of {place}", value) for slot, value in zip(slots, values())]
        self._class(place, kind)
        return True

    _KINDS = (
        (nn.Module, _foreign_layer),
        (Tensor, _tensor),
        (types.FunctionType, _function),
        ((types.MethodType, types.BuiltinFunctionType), _bound),
        (logging.Logger, _logger),
        (BaseException, _exception),
        (LOCKS, _lock),
        (operator.attrgetter, _getter),
        ((*FIXED_CALLS, *HARMLESS), _nothing),
        (types.ModuleType, _module),
        (type, _class),
        ((dict, types.MappingProxyType), _mapping),
        ((list, tuple, set, frozenset, collections.deque), _sequence),
        (np.ndarray, _array),
        (functools.partial, _partial),
        ((property, staticmethod, classmethod, functools.cached_property, type(functools.cache(len))), _descriptor),
        (weakref.ref, _reference),
    )
