"""Algebra on the tables of values core * scale + shift: numbers fold, nodes become new nodes below the x-part."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..ops.instructions import Act, Affine, Linear
from .chain import Concat, Core, Table, Value, is_number
from .tracing import SAMPLE, TIME, Traced


class Tables:
    """Multiply and add tables, whole or by columns; what is new is appended to the graph."""

    def __init__(self, traced: Traced) -> None:
        self.add = traced.add

    def of(self, table: Table, inner: tuple[int, ...], dtype: torch.dtype) -> Table:
        """Return a table for values (rows, *inner) of a dtype as one that broadcasts to (rows, width).

        It goes over to their dtype at once, as torch has it go over when both meet: what is made of it here, such as an
        inverse, would else be rounded as they are not, or be a whole number.
        """
        if isinstance(table, int | float):
            return table
        if table.meta["val"].dtype != dtype:
            table = self.add(torch.Tensor.to, table, dtype)
        return table if len(inner) == 1 else self.add(_flat, table, inner)

    def times(self, a: Table, b: Table) -> Table:
        if isinstance(a, int | float) and isinstance(b, int | float):
            return a * b
        return b if is_number(a, 1) else a if is_number(b, 1) else self.add(operator.mul, a, b)

    def plus(self, a: Table, b: Table) -> Table:
        if isinstance(a, int | float) and isinstance(b, int | float):
            return a + b
        return b if is_number(a, 0) else a if is_number(b, 0) else self.add(operator.add, a, b)

    def inverse(self, table: Table) -> Table:
        return 1 / table if isinstance(table, int | float) else self.add(operator.truediv, 1, table)

    def scaled(self, value: Value | Concat, table: Table) -> Value | Concat:
        """Return value * table."""
        if isinstance(value, Concat):
            return self._on_parts(value, table, self.times, self.scaled)
        if _per_row(table, value.scale, neutral=1) or _per_row(table, value.shift, neutral=0):
            value = Value(value.settled())
        shift = 0.0 if is_number(value.shift, 0) else self.times(value.shift, table)
        return value._replace(scale=self.times(value.scale, table), shift=shift)

    def shifted(self, value: Value | Concat, table: Table) -> Value | Concat:
        """Return value + table."""
        if isinstance(value, Concat):
            return self._on_parts(value, table, self.plus, self.shifted)
        if _per_row(table, value.shift, neutral=0):
            value = Value(value.settled())
        return value._replace(shift=self.plus(value.shift, table))

    def columns(self, table: Table, start: int, stop: int) -> Table:
        """Return some columns of a table."""
        return table if isinstance(table, int | float) else self.add(_columns, table, start, stop)

    def cut(self, value: Value, start: int, stop: int) -> Value | None:
        """Return some columns of a value: fewer outputs of its last linear layer; None where there is none."""
        core, scale, shift = value
        if (start, stop) == (0, core.width):
            return value
        if core.op is Linear:
            weight = self.add(operator.getitem, core.weight, slice(start, stop))
            kept = Value(Core(Linear, core.parent, stop - start, core.layer, None, weight))
        elif isinstance(core.op, Act) or core.op is Affine:
            kept = self.cut(Value(core.parent), start, stop)
            if kept is None:
                return None
            if core.op is Affine:
                kept = self._cut_tables(kept, core.scale, core.shift, start, stop)
            else:
                kept = Value(Core(core.op, kept.settled(), kept.width, core.layer))
        else:
            return None
        return self._cut_tables(kept, scale, shift, start, stop)

    def transposed(self, weight: fx.Node) -> fx.Node:
        return self.add(torch.t, weight)

    def linear(self, part: fx.Node, weight: fx.Node, multiplications: int) -> fx.Node:
        """Return the product of a part of some columns with the weight's own, which takes so many multiplications."""
        node = self.add(F.linear, part, weight)
        node.meta["multiplications"] = multiplications
        return node

    def like(self, node: fx.Node, part: fx.Node) -> fx.Node:
        """Return the operation of a node on another first argument."""
        return self.add(node.target, part, *node.args[1:], **node.kwargs)

    def _cut_tables(self, value: Value, scale: Table, shift: Table, start: int, stop: int) -> Value:
        scaled = self.scaled(value, self.columns(scale, start, stop))
        return self.shifted(scaled, self.columns(shift, start, stop))

    def _on_parts(
        self,
        value: Concat,
        table: Table,
        on_node: Callable[[Table, Table], Table],
        on_value: Callable[[Value, Table], Value | Concat],
    ) -> Concat:
        parts = []
        for part, (start, stop) in zip(value.parts, value.ranges()):
            own = self.columns(table, start, stop)
            parts.append(on_value(part, own) if isinstance(part, Value) else on_node(part, own))
        return value._replace(parts=tuple(parts))


def _per_row(a: Table, b: Table, neutral: float) -> bool:
    """Return whether composing two tables would make one with an entry a row, (B, R, w), which two passes spare."""
    levels = [table.meta["level"] for table in (a, b) if isinstance(table, fx.Node)]
    return reduce(int.__or__, levels, 0) == TIME | SAMPLE and not is_number(b, neutral)


def _columns(table: Tensor, start: int, stop: int) -> Tensor:
    return table if table.ndim == 0 or table.shape[-1] == 1 else table[..., start:stop]


def _flat(table: Tensor, inner: tuple[int, ...]) -> Tensor:
    if table.ndim == 0:
        return table
    rows = table.shape[0] if table.ndim == len(inner) + 1 else 1
    return table.expand(rows, *inner).reshape(rows, -1)
