"""What one step of a plan leaves: f of some samples, of one group of nodes or of several side by side.

Sums over draws are the same operations for every group, with other weights. Groups of about the same size are
therefore summed as one block (G, m, N), with weights (G, 1, N); the last sample of a smaller group stands for those
that it lacks, and is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..support.host import together
from .curve import EndTable
from .rules import Rule


class Stack(NamedTuple):
    """Where the samples of several groups are in a block: of every entry the row of f, (G, m), and back, (b,).

    `group` says in which of these groups a row is, (b,).
    """

    place: Tensor
    back: Tensor
    group: Tensor

    @classmethod
    def of(cls, sizes: list[int], device: torch.device) -> Stack:
        """Return the block of groups whose samples follow one another."""
        most, start, place, back = max(sizes), 0, [], []
        for group, size in enumerate(sizes):
            place.append(start + torch.arange(most, device="cpu").clamp(max=size - 1))
            back.append(group * most + torch.arange(size, device="cpu"))
            start += size
        group = torch.arange(len(sizes), device="cpu").repeat_interleave(torch.tensor(sizes, device="cpu"))
        return cls(*together([torch.stack(place), torch.cat(back), group], device))


@dataclass(frozen=True)
class Part:
    """Evaluated samples.

    Arguments:
        samples: which, int64, (b,).
        f: of every draw, (b, N), or (b, 3, N) of two conditions (`fastscore.estimator.integrand.draw_values`).
        rule: of the group that all of them belong to, or of several stacked.
        ends: what their draws say of both ends of the range, likewise.
        stack: where they are in a block of several groups; None for one.
    """

    samples: Tensor
    f: Tensor
    rule: Rule
    ends: EndTable
    stack: Stack | None = None

    def block(self, values: Tensor) -> Tensor:
        """Return values of the samples, (b, ...), as a block (G, m, ...), as the rule wants them."""
        return values if self.stack is None else values[self.stack.place]

    def flat(self, values: Tensor) -> Tensor:
        """Return a block's values by sample, (b, ...)."""
        return values if self.stack is None else values.flatten(0, 1)[self.stack.back]
