"""Which samples of a call share their nodes, and how they are cut into what the memory holds at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..support.memory import Chunks, even
from .part import Stack
from .rules import Rule
from .samples import Samples


class Cut(NamedTuple):
    """How the samples of one group are cut: which they are, how many at once, and which draws at once.

    Their numbers are on the device (`here`) and once more on the CPU (`members`), where None stands for all samples.
    """

    group: int
    members: Tensor | None
    here: Tensor
    at_once: int
    spans: tuple[range, ...]


@dataclass(frozen=True)
class Groups:
    """The samples with these indices, group by group.

    Attributes:
        index: of every sample, on the CPU.
        members: by the number of a group, which samples it has, on the CPU.
        everyone: the samples of all groups in their order, on the device.
    """

    index: Tensor
    members: dict[int, Tensor]
    everyone: Tensor

    @classmethod
    def of(cls, samples: Samples) -> Groups:
        group = samples.group
        members = {number: (group == number).nonzero().flatten() for number in group.unique().tolist()}
        return cls(samples.index, members, torch.cat(list(members.values())).to(samples.device))

    def are_of(self, samples: Samples) -> bool:
        """Return whether these are the groups of such samples."""
        return self.everyone.device == samples.device and torch.equal(self.index, samples.index)

    @cached_property
    def index_here(self) -> Tensor:
        """The indices on the device."""
        return self.index.to(self.everyone.device)

    @property
    def sizes(self) -> list[int]:
        return [len(own) for own in self.members.values()]

    @cached_property
    def stack(self) -> Stack:
        """How all groups together are one block."""
        return Stack.of(self.sizes, self.everyone.device)

    def cuts(self, rules: Sequence[Rule], draws: int, chunks: Chunks) -> list[Cut]:
        """Return how every group is cut, by its rule and by what the memory holds."""
        parts = zip(self.members.items(), self.everyone.split(self.sizes), rules)
        return [self._cut(number, own, here, rule, draws, chunks) for (number, own), here, rule in parts]

    def _cut(self, number: int, own: Tensor, here: Tensor, rule: Rule, draws: int, chunks: Chunks) -> Cut:
        evaluations = max(1, rule.nfe)
        at_once = even(len(own), max(1 if chunks.groups else chunks.samples, chunks.rows // evaluations))
        rows_per_draw = 1 + int(rule.paired.any())
        span = draws if chunks.rows >= at_once * evaluations else max(1, chunks.rows // (at_once * rows_per_draw))
        spans = tuple(range(start, min(start + span, draws)) for start in range(0, draws, span))
        return Cut(number, None if len(self.members) == 1 else own, here, at_once, spans)


@dataclass(frozen=True)
class Layout:
    """What a plan makes of the groups of some samples: cuts in their order, and keys, where they are kept.

    Where all groups together are one chunk, `stack` says how they are one block.
    """

    groups: Groups
    cuts: list[Cut]
    keys: Tensor | None
    stack: Stack | None

    def tensors(self) -> list[Tensor]:
        """Return all that is kept."""
        groups, stack = self.groups, self.stack or ()
        found = [groups.index, groups.index_here, groups.everyone, *groups.members.values(), self.keys, *stack]
        return [tensor for tensor in found if tensor is not None]
