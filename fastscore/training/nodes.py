r"""Where a training loss draws its log-SNRs, as the network learns.

The gradient of a row with respect to the network's output has the size :math:`w\,g(\lambda)`, w = 1/p. Its variance is
smallest for p proportional to the root of :math:`E g^2`, which a running mean in bins of log-SNR follows.

References:
    Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), https://arxiv.org/abs/2102.09672
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..estimator.nodes import NodeDensity
from ..process.schedules import SAME_END, Schedule
from ..support.buffers import FittedBuffers
from ..support.host import kind_of

BINS = 24
FLOOR = 0.1  # of the draws are spread evenly: no log-SNR goes unseen, and no weight exceeds ten times the uniform one
MEMORY = 64  # draws of a bin that its running mean remembers


class AdaptiveNodes(FittedBuffers):
    """A density of training draws over log-SNR that follows the size of the gradient; part of `state_dict()`.

    It starts uniform over the schedule's range, and each `density_loss` given it draws from it and then updates it.
    The loss stays unbiased: a call draws from what earlier calls have seen, over the range of log-SNR that its density
    has by then. That is another one after `fit`, where the schedule is endless, and where the schedule's ends move.

    Arguments:
        schedule: whose range to start from.

    Raises:
        TypeError: if it is no `Schedule`.

    Example:
        >>> nodes = AdaptiveNodes(density.schedule)
        >>> loss = density_loss(density, x, seed=step, nodes=nodes)
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule must be a fastscore Schedule such as density.schedule, got {kind_of(schedule)}; its range "
                "of log-SNR is where the draws start from"
            )
        lo, hi = schedule.log_snr_range
        self.register_buffer("edges", torch.linspace(lo, hi, BINS + 1, dtype=torch.float64, device="cpu"))
        self.register_buffer("moment", torch.ones(BINS, dtype=torch.float64, device="cpu"))
        self.register_buffer("seen", torch.zeros(BINS, dtype=torch.float64, device="cpu"))

    @property
    def density(self) -> NodeDensity:
        """The present density of the draws."""
        # Bins that no draw has fallen in count like the average of the others.
        moment, seen = torch.stack([self.moment, self.seen]).cpu()  # at once: one wait for the device
        known = seen > 0
        moment = torch.where(known, moment, moment[known].mean() if bool(known.any()) else 1.0)
        root = moment.sqrt() + 1e-12
        share = (1 - FLOOR) * root / root.sum() + FLOOR / BINS
        # A copy of the edges, which `cover` writes.
        return NodeDensity(self.host("edges").clone(), share, torch.zeros_like(known))

    @torch.no_grad()
    def cover(self, lo: float, hi: float) -> None:
        """Go over to another range of log-SNR with what is known of it; of what is new nothing is known.

        A bin takes the mean square over what the old bins cover of it, and their draws by the part of them in it.

        Arguments:
            lo, hi: the lowest and the highest log-SNR.

        Raises:
            ValueError: if they are not finite, or lo is not below hi.
        """
        if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
            raise ValueError(
                f"the range of log-SNR must go up from the noisy end to the clean one, got {(lo, hi)}; set the "
                "schedule's time_range to (least noisy, noisiest)"
            )
        old = self.host("edges")
        if max(abs(lo - float(old[0])), abs(hi - float(old[-1]))) <= SAME_END:
            return
        new = torch.linspace(lo, hi, BINS + 1, dtype=torch.float64, device="cpu")
        moment, seen = torch.stack([self.moment, self.seen]).cpu()
        common = torch.minimum(new[1:, None], old[1:]) - torch.maximum(new[:-1, None], old[:-1])
        common = common.clamp(min=0)  # width that a new bin, a row, shares with an old one, a column
        known = common * (seen > 0)
        self.moment.copy_(torch.where(known.any(1), known @ moment / known.sum(1), 1.0))
        self.seen.copy_(common / old.diff() @ seen)
        self.edges.copy_(new)

    @torch.no_grad()
    def observe(self, log_snr: Tensor, squares: Tensor) -> None:
        """Take in the squared gradients of some draws, both of shape (R,)."""
        edges = self.edges
        k = (torch.searchsorted(edges, log_snr.to(edges), right=True) - 1).clamp(0, BINS - 1)
        count = torch.zeros_like(self.seen).index_add_(0, k, torch.ones_like(log_snr, device=edges.device))
        total = torch.zeros_like(self.moment).index_add_(0, k, squares.to(edges))
        self.seen += count
        share = count / self.seen.clamp(min=1, max=MEMORY).maximum(count)  # the plain mean at first
        self.moment += share * (total / count.clamp(min=1) - self.moment)
