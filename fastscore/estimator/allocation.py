"""How draws are shared out among the entries of a table: how often some come in any case, and which a shift decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Allocation:
    """Draws of every entry, in their order.

    An entry that deserves one draw or more has a whole number of them, always the same. The others share what is left,
    a whole number too, by systematic sampling: with a number that varied with the shift, even a constant would not be
    summed right, and its error would be the same for all samples.

    Arguments:
        deserved: how many draws every entry would have if there were parts of draws, float64, shape (T,).
        certain: which are drawn in any case, bool, shape (T,).
        count: how often those are drawn, and how often the others are on average, float64, shape (T,).
        left: the draws of the others together.
    """

    deserved: Tensor
    certain: Tensor
    count: Tensor
    left: int

    @classmethod
    def of(cls, share: Tensor, draws: int) -> Allocation:
        """Return the allocation of `draws` by each entry's share of them, which sum to one."""
        deserved = draws * share
        certain = deserved >= 1
        # Rounded so that sums over neighbours stay: an entry of one draw or more keeps one.
        whole = (torch.where(certain, deserved, 0.0).cumsum(0) + 0.5).floor()
        count = torch.cat([whole[:1], whole.diff()])
        left = draws - int(count.sum())
        if left == 0 and not bool(certain.all()):
            count[count.argmax()] -= 1
            left = 1
        rest = torch.where(certain, 0.0, share)
        return cls(deserved, certain, torch.where(certain, count, rest * (left / rest.sum().clamp(min=1e-300))), left)

    def entries(self, shift: float) -> Tensor:
        """Return which entry every draw is of, ascending, int64, by the shift in [0, 1) of those that it decides."""
        fixed = self.certain.nonzero().flatten()
        drawn = fixed.repeat_interleave(self.count[fixed].long())
        if self.left:
            others = (~self.certain).nonzero().flatten()
            at = torch.arange(self.left, dtype=torch.float64, device="cpu") + shift
            which = torch.searchsorted(self.count[others].cumsum(0), at, right=True).clamp(max=len(others) - 1)
            drawn = torch.cat([drawn, others[which]])
        return drawn.sort().values
