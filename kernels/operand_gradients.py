"""Where the gradients of a network's vector operands lie: in columns of one matrix a level, as their tables do.

What the gradient's kernel stores, and what becomes of it, told by shapes alone; plain torch, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .blocks import LEVELS, operands_in
from .packing import Layout, Tables, level_of, padded, split_network


def columns_of(layout: Layout) -> dict[str, int]:
    """Return how many columns the vector operands of a network take in the matrix of each level."""
    ends = dict.fromkeys(LEVELS, 0)
    for level, offset, width in operands_in((layout.pre, layout.body, layout.post)):
        ends[level] = max(ends[level], offset + width)
    return ends


@dataclass
class Uses(Tables):
    """Where every vector operand of a network lies in the matrices that `Tables` makes, without making them.

    Attributes:
        found: of every use, the table and (level, offset, width).
        ends: columns of each level.
    """

    found: list[tuple[Tensor, tuple[str, int, int]]] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LEVELS, 0))

    @classmethod
    def of(
        cls, code: tuple, weights: list[Tensor], tables: list[Tensor], batch: int, rows: int, d: int
    ) -> tuple[Uses, list[int]]:
        """Return the uses of a network's tables, and its weights in the order of their use."""
        uses = cls(batch, rows)
        order = split_network(code, weights, tables, d, uses)[3]
        return uses, order

    def add(self, table: Tensor | None, width: int, at_least: int = 0) -> tuple:
        if table is None:
            return ()
        level = level_of(table)
        where = level, self.ends[level], width
        self.found.append((table, where))
        self.ends[level] += max(width, at_least)
        return where


def padded_shapes(weights: Sequence[Tensor], order: Sequence[int]) -> list[tuple[int, int]]:
    """Return (in, out) of the weights in the order of their use, as a kernel pads them for up to 128 dimensions."""
    return [(padded(int(weights[k].shape[1])), padded(int(weights[k].shape[0]))) for k in order]
