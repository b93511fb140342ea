"""What code says of itself: the names in it, what its closure holds, the package of a module, a class's slots."""

from __future__ import annotations

import dis
import functools
import types

from .code_kinds import LIFECYCLE


def words_of(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Return names in some code and the functions inside, texts that could be names too, and which are globals."""
    words, read = {*code.co_names, *code.co_freevars}, set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            words.add(constant)
        elif isinstance(constant, types.CodeType):
            inner = words_of(constant)
            words, read = words | inner[0], read | inner[1]
    return words, read


def attributes_of(code: types.CodeType) -> set[str]:
    """Return names that some code and the functions inside read of whatever objects, as methods are."""
    found = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_ATTR", "LOAD_METHOD")}
    return found.union(*(attributes_of(c) for c in code.co_consts if isinstance(c, types.CodeType)))


@functools.cache
def words_of_class(kind: type) -> frozenset[str]:
    """Return names in the code of the methods and properties that a class adds itself."""
    found: set[str] = set()
    for name, value in vars(kind).items():
        parts = (getattr(value, part, None) for part in ("fget", "__func__", "func"))
        for function in (value, *parts):
            if isinstance(function, types.FunctionType) and name not in LIFECYCLE:
                found |= words_of(function.__code__)[0]
    return frozenset(found)


def content(cell: types.CellType) -> object:
    """Return what a closure's cell holds, None where it is not filled yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def root(module: str | None) -> str:
    """Return the name of the package that a module of this name belongs to."""
    return module.partition(".")[0] if isinstance(module, str) else ""  # some built in another way have descriptors


def slots_of(kind: type) -> tuple[str, ...]:
    """Return the names of the slots that a class adds itself."""
    found = vars(kind).get("__slots__", ())
    return (found,) if isinstance(found, str) else tuple(found)
