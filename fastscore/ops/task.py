"""What a fused kernel is asked to run, without the numbers: what every predicate and choice of one depends on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import packing
from .instructions import Instruction, decode


class Task(NamedTuple):
    """A row program with its shapes, on a device, and the reference in the same pass; hashable."""

    code: tuple[tuple, ...]  # as `plain` writes it
    shapes: tuple[tuple[int, int], ...]  # of the weights, (out, in)
    levels: tuple[str, ...]  # of the tables, see `packing.level_of`
    d: int
    components: int  # of the reference, 0 for none
    full: bool
    dtype: torch.dtype  # of the weights
    device: torch.device

    @classmethod
    def of(
        cls,
        code: Sequence[Instruction],
        weights: list[Tensor],
        levels: Iterable[str],
        d: int,
        device: torch.device,
        components: int = 0,
        full: bool = False,
    ) -> Task:
        shapes = tuple(tuple(map(int, w.shape)) for w in weights)  # numbers, also where sizes are symbols
        dtype = weights[0].dtype if weights else torch.float32  # a program can be without linear maps
        return cls(plain(code), shapes, tuple(levels), int(d), int(components), full, dtype, device)

    @classmethod
    def of_tensors(
        cls, code: Sequence[Instruction], weights: list[Tensor], tables: list[Tensor], d: int, reference: list[Tensor]
    ) -> Task:
        """Return the task of a program with its tensors."""
        components, full = (len(reference[0]), reference[3].numel() > 0) if reference else (0, False)
        return cls.of(code, weights, map(packing.level_of, tables), d, weights[0].device, components, full)

    @property
    def width(self) -> int:
        """The widest hidden layer."""
        linear = [op[1] for op in self.code if op[0] == "linear"]
        return max((self.shapes[k][0] for k in linear[:-1]), default=0)

    @property
    def kind(self) -> str:
        """Return "adaLN" where hidden layers have norms and scales, else "plain"."""
        first = next((i for i, op in enumerate(self.code) if op[0] == "linear"), 0)
        hidden = self.code[first:]
        modulated = any(op[0] == "affine" and op[1] >= 0 for op in hidden)
        return "adaLN" if modulated and any(op[0] == "norm" for op in hidden) else "plain"


class Evaluation(NamedTuple):
    """What `fastscore::density_mlp` is asked to evaluate, as its documentation has it; every backend takes one."""

    x: Tensor
    keys: Tensor
    points: Tensor
    rows: Tensor
    alpha: Tensor
    sigma: Tensor
    code: str
    weights: list[Tensor]
    tables: list[Tensor]
    reference: list[Tensor]

    @property
    def task(self) -> Task:
        """The same without the numbers."""
        return Task.of_tensors(decode(self.code), self.weights, self.tables, self.x.shape[1], self.reference)


class WithRespectTo(NamedTuple):
    """What of a row program wants a gradient."""

    of_x: bool
    of_weights: bool
    of_tables: bool

    @classmethod
    def of(cls, x: Tensor, weights: Iterable[Tensor], tables: Iterable[Tensor]) -> WithRespectTo:
        return cls(x.requires_grad, any(w.requires_grad for w in weights), any(t.requires_grad for t in tables))

    @property
    def of_parameters(self) -> bool:
        return self.of_weights or self.of_tables


def plain(code: Iterable[Instruction]) -> tuple[tuple, ...]:
    """Return instructions as the kernels take them: ("linear", 0), ("affine", -1, 0), ..."""
    return tuple((type(op).__name__.lower(), *op) for op in code)
