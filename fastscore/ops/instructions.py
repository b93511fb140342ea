r"""The instructions of a row program: straight-line code for one accumulator h of shape (B, R, width).

========================  ==================================================================================
instruction               meaning
========================  ==================================================================================
``Linear(weight)``        h = h weights[weight]^T; a bias is the shift of the next `Affine`
``Affine(scale, shift)``  h = h tables[scale] + tables[shift]; -1 means absent
``Act(name)``             h = act(h), one of `fastscore.ops.activations`
``Norm(eps)``             h = (h - mean) / sqrt(var + eps) over the last dimension, biased variance
``Save(slot)``            saved[slot] = h
``Add(slot, scale)``      h = h + saved[slot] tables[scale]; -1 means 1
========================  ==================================================================================

The first accumulator is x_t. Weights are matrices (out, in). Tables are (1, 1, w), (1, R, w), (B, 1, w) or (B, R, w):
the same for all rows, one entry a draw, one a sample, or one a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, get_args

from torch import Tensor

SLOTS = 2


class NoProgram(ValueError):
    """A network is no row program; the message names the first layer that does not fit, and why."""


class Linear(NamedTuple):
    weight: int


class Affine(NamedTuple):
    scale: int = -1
    shift: int = -1


class Act(NamedTuple):
    name: str


class Norm(NamedTuple):
    eps: float


class Save(NamedTuple):
    slot: int


class Add(NamedTuple):
    slot: int
    scale: int = -1


Instruction = Linear | Affine | Act | Norm | Save | Add


class Bound(NamedTuple):
    """What a program's indices point to, for given times, conditions and the network's present parameters."""

    weights: list[Tensor]
    tables: list[Tensor]


INSTRUCTIONS: dict[str, type] = {kind.__name__.lower(): kind for kind in get_args(Instruction)}


def encode(code: Sequence[Instruction]) -> str:
    """Return a program as text, which an operator's schema can carry: [["linear", 0], ["affine", -1, 0], ...]."""
    return json.dumps([[type(op).__name__.lower(), *op] for op in code])


@lru_cache(maxsize=64)
def decode(text: str) -> tuple[Instruction, ...]:
    """Return the instructions that `encode` wrote."""
    return tuple(INSTRUCTIONS[name](*arguments) for name, *arguments in json.loads(text))
