r"""Row programs as steps: what is between two products, taken together, as the compiled kernels of Hopper run it.

A program is cut at its linear maps into one of each line, the middle ones any number of times:

====================  ================================================================================================
step                  meaning; N normalizes or does nothing, each A is a scale and a shift for every row or nothing
====================  ================================================================================================
first                 h = A(W x_t)
`Residual`            h = h + A(W' act(A(W A(N(h)))))
`Dense`               h = A(W act(h))
`Last`                F = W A(N(h)), or W act(h), or W h
====================  ================================================================================================

`cut` says which steps an instruction sequence consists of, or why it is none; `fastscore.ops.step_tables` computes the
vectors of a step, and runs steps in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

Affines = tuple[tuple[int, int], ...]  # the tables, scale and shift, of instructions that follow each other


class Residual(NamedTuple):
    """A block of two linear maps that adds what it makes of h to h."""

    eps: float | None  # of the norm, None where there is none
    before: Affines
    first: int
    middle: Affines  # shifts alone
    activation: str
    second: int
    after: Affines


class Dense(NamedTuple):
    """A linear map of activations."""

    activation: str
    weight: int
    after: Affines


class Last(NamedTuple):
    """The last linear map, whose inputs are normalized, activated, or neither."""

    eps: float | None
    before: Affines
    activation: str | None
    weight: int


class Steps(NamedTuple):
    """A row program; `pre` and `post` are the instructions around its first and last linear map."""

    pre: tuple
    first: int
    after: Affines
    middle: tuple[Residual | Dense, ...]
    last: Last
    post: tuple

    @property
    def weights(self) -> tuple[int, ...]:
        """The linear maps in the order of their use."""
        inner = [(s.first, s.second) if isinstance(s, Residual) else (s.weight,) for s in self.middle]
        return (self.first, *(k for pair in inner for k in pair), self.last.weight)


class _Unfit(ValueError):
    """A program does not consist of steps; the message says why."""


class _Reader:
    """Instructions, ("linear", 0) and so on, read from front to back."""

    def __init__(self, code: Sequence[tuple]) -> None:
        self.code, self.at = code, 0

    def next(self) -> str:
        return self.code[self.at][0] if self.at < len(self.code) else "end"

    def take(self, name: str, where: str) -> tuple:
        if self.next() != name:
            raise _Unfit(f"{where} has {self.next()} where a step has {name}")
        self.at += 1
        return self.code[self.at - 1]

    def may_take(self, name: str) -> tuple | None:
        return self.take(name, "") if self.next() == name else None

    def affines(self) -> Affines:
        found = []
        while op := self.may_take("affine"):
            found.append((op[1], op[2]))
        return tuple(found)


@lru_cache(maxsize=256)
def cut(code: tuple[tuple, ...], levels: tuple[str, ...]) -> Steps | str:
    """Return the steps of a program, or why it does not consist of steps.

    Arguments:
        code: as `fastscore.ops.task.plain` writes it.
        levels: of the tables, see `fastscore.kernels.packing.level_of`. Steps want vectors that all samples share.
    """
    try:
        return _cut(code, levels)
    except _Unfit as unfit:
        return str(unfit)


def _cut(code: tuple[tuple, ...], levels: tuple[str, ...]) -> Steps:
    linear = [i for i, op in enumerate(code) if op[0] == "linear"]
    if len(linear) < 2:
        raise _Unfit(f"steps need two linear maps at least, the program has {len(linear)}")
    used = {i for op in code for i in {"affine": op[1:], "add": op[2:]}.get(op[0], ()) if i >= 0}
    if any(levels[i] != "r" for i in used):
        raise _Unfit("steps take vectors that all samples share, and one of the program's is a sample's own")
    reader = _Reader(code[linear[0] + 1 : linear[-1]])
    after, middle = reader.affines(), []
    while reader.at < len(reader.code):
        if reader.next() == "save":
            middle.append(_residual(reader))
        elif last := _ending(reader, code[linear[-1]][1]):
            return Steps(code[: linear[0]], code[linear[0]][1], after, tuple(middle), last, code[linear[-1] + 1 :])
        else:
            name = reader.take("act", "a layer outside of residual blocks")[1]
            middle.append(Dense(name, reader.take("linear", "a layer")[1], reader.affines()))
    last = Last(None, (), None, code[linear[-1]][1])
    return Steps(code[: linear[0]], code[linear[0]][1], after, tuple(middle), last, code[linear[-1] + 1 :])


def _ending(reader: _Reader, weight: int) -> Last | None:
    """Return the last step if nothing but its norm or activation is left."""
    left = [op[0] for op in reader.code[reader.at :]]
    if left == ["act"]:
        return Last(None, (), reader.take("act", "")[1], weight)
    if left and left[0] == "norm" and set(left[1:]) <= {"affine"}:
        return Last(reader.take("norm", "")[1], reader.affines(), None, weight)
    return None


def _residual(reader: _Reader) -> Residual:
    where = "a residual block"
    slot = reader.take("save", where)[1]
    norm = reader.may_take("norm")
    before = reader.affines()
    first = reader.take("linear", where)[1]
    middle = reader.affines()
    if any(scale >= 0 for scale, _ in middle):
        raise _Unfit("a residual block scales what its activation takes")
    name = reader.take("act", where)[1]
    second, after = reader.take("linear", where)[1], reader.affines()
    add = reader.take("add", where)
    if add[1] != slot or add[2] >= 0:
        raise _Unfit("a residual block adds another tile than its own input, or a multiple of it")
    return Residual(norm[1] if norm else None, before, first, middle, name, second, after)
