r"""The chain of accumulators that a network's x-part becomes, and the code for it.

The code follows one chain of cores. What else a sum adds must lie on that chain before, where it is saved; at most two
saved values may wait at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import fx

from ..ops.instructions import SLOTS, Add, Affine, Instruction, Linear, NoProgram, Save

Table = fx.Node | float  # a number, or a node that does not depend on x


@dataclass(frozen=True, eq=False)
class Core:
    """The accumulator after one instruction, `op` of the parent.

    `op` is the instruction itself, or the class of a `Linear`, `Affine` or `Add`, with what it will index beside it.
    """

    op: Instruction | type | None
    parent: Core | None
    width: int
    layer: str
    node: fx.Node | None = None  # the graph's node with this very value, if there is one
    weight: fx.Node | None = None
    scale: Table = 1.0
    shift: Table = 0.0
    saved: Core | None = None

    def chain(self) -> list[Core]:
        """Return the cores from x_t to this one."""
        core, found = self, []
        while core is not None:
            found.append(core)
            core = core.parent
        return found[::-1]


class Value(NamedTuple):
    """core * scale + shift."""

    core: Core
    scale: Table = 1.0
    shift: Table = 0.0

    @property
    def width(self) -> int:
        return self.core.width

    def settled(self, node: fx.Node | None = None) -> Core:
        """Return the core that has this value, after an `Affine` if tables wait; `node` has the same value."""
        core, scale, shift = self
        if is_number(scale, 1) and is_number(shift, 0):
            return core
        return Core(Affine, core, core.width, core.layer, node, scale=scale, shift=shift)


class Concat(NamedTuple):
    """Columns side by side: one value that depends on x, and nodes that do not; with the column where each starts."""

    parts: tuple[Value | fx.Node, ...]
    starts: tuple[int, ...]
    width: int

    def ranges(self) -> list[tuple[int, int]]:
        """Return (first column, one after the last) of every part."""
        return list(zip(self.starts, (*self.starts[1:], self.width)))


class Split(NamedTuple):
    """A value with the column ranges of its pieces."""

    value: Value
    ranges: list[tuple[int, int]]


class Matched(NamedTuple):
    """Code, what its indices point to, and the core that each instruction completes (None for a `Save`)."""

    code: list[Instruction]
    weights: list[fx.Node]
    tables: list[tuple[Table, int]]  # with the width
    cores: list[Core | None]


def emit(last: Core) -> Matched:
    """Return the code whose last accumulator is a core.

    Raises:
        NoProgram: if more values wait than there are slots.
    """
    chain = last.chain()
    until = {}  # the last instruction that reads a saved core
    for i, core in enumerate(chain):
        if core.saved is not None:
            until[core.saved] = i
    code, weights, tables, cores = [], [], [], []
    slots: list[int] = [-1] * SLOTS  # until when each is taken
    slot_of: dict[Core, int] = {}

    def table(value: Table, width: int) -> int:
        if (value, width) not in tables:
            tables.append((value, width))
        return tables.index((value, width))

    def optional(value: Table, neutral: float, width: int) -> int:
        return -1 if is_number(value, neutral) else table(value, width)

    for i, core in enumerate(chain):
        if core.op is Linear:
            if core.weight not in weights:
                weights.append(core.weight)
            code.append(Linear(weights.index(core.weight)))
        elif core.op is Affine:
            code.append(Affine(optional(core.scale, 1, core.width), optional(core.shift, 0, core.width)))
        elif core.op is Add:
            code.append(Add(slot_of[core.saved], optional(core.scale, 1, core.width)))
        elif core.op is not None:
            code.append(core.op)
        if core.op is not None:
            cores.append(core)
        if core in until:
            free = [s for s, end in enumerate(slots) if end <= i]
            if not free:
                waiting = ", ".join(repr(c.layer) for c in slot_of if until[c] > i)
                raise NoProgram(f"layer {core.layer!r}: more than {SLOTS} residuals wait at once ({waiting})")
            slot_of[core], slots[free[0]] = free[0], until[core]
            code.append(Save(free[0]))
            cores.append(None)
    return Matched(code, weights, tables, cores)


def is_number(table: Table, number: float) -> bool:
    """Return whether a table is this very number."""
    return isinstance(table, int | float) and table == number
