r"""Where in log-SNR to evaluate: how many draws each stretch deserves, and what is known of the integrand there.

A `NodeDensity` is piecewise constant: a share of the evaluations in each bin of log-SNR, and whether they come as
antithetic pairs. `fastscore.estimator.rules` turns it into draws. `curve` is what a pilot saw of the mean integrand,
linear between the centres of the bins; it is integrated exactly, and draws measure the difference to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..support.buffers import FittedBuffers

# Log-SNRs, for a standard deviation of one, between which a fit to each image's own draws leaves most of its variance:
# below there is little to know, and above little but the data's own noise (docs/images.png).
IMAGES = (-1.0, 12.0)
IMAGE_BINS, SMOOTH_BINS = 100, 12_800
SMOOTHINGS = 2  # passes of (1, 2, 1) / 4 over a pilot's variances, and of a mean over neighbours


@dataclass(frozen=True)
class NodeDensity:
    """Evaluations per bin of log-SNR.

    Arguments:
        edges: ascending bin edges, float64, shape (K + 1,).
        share: share of the evaluations in each bin, sums to one, shape (K,).
        paired: whether a bin's draws are antithetic pairs (two evaluations per draw), bool, shape (K,).
        curve: known mean of the integrand at the centre of each bin, shape (K,); zero where nothing is known.
    """

    edges: Tensor
    share: Tensor
    paired: Tensor
    curve: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu"))

    @classmethod
    def uniform(cls, lo: float, hi: float, bins: int = 1) -> NodeDensity:
        """The same number of evaluations everywhere in [lo, hi], no pairs."""
        edges = torch.linspace(lo, hi, bins + 1, dtype=torch.float64, device="cpu")
        share = torch.full_like(edges[1:], 1 / bins)
        return cls(edges, share, torch.zeros_like(share, dtype=torch.bool))

    @classmethod
    def pairs(cls, lo: float, hi: float) -> NodeDensity:
        """The same number of evaluations everywhere in [lo, hi], all of them in antithetic pairs."""
        one = torch.ones(1, dtype=torch.float64, device="cpu")
        return cls(torch.tensor([lo, hi], dtype=torch.float64, device="cpu"), one, one.bool())

    @classmethod
    def of_images(cls, lo: float, hi: float, std: float) -> NodeDensity:
        """Half of the evaluations everywhere in [lo, hi], half where images of a standard deviation have structure.

        The second half rises and falls over a few units of log-SNR, see `smooth`.
        """
        even = cls.uniform(lo, hi, IMAGE_BINS)
        centre = (even.edges[1:] + even.edges[:-1]) / 2 + 2 * math.log(std)
        inside = torch.sigmoid(centre - IMAGES[0]) * torch.sigmoid(IMAGES[1] - centre) + 1e-12
        return cls(even.edges, inside / inside.sum(), even.paired).half_uniform()

    def smooth(self) -> NodeDensity:
        """Return a density of evenly wide bins as one of many more, linear between their centres to a ten-thousandth.

        The terms of a sum are the integrand over the density of nodes. Where that jumps, and no curve is known that
        makes the integrand small, the shift of all nodes gives every sample of a group the same error, which no
        difference of neighbouring terms shows. So steps have to be far smaller than a term's noise.
        """
        fine = NodeDensity.uniform(float(self.edges[0]), float(self.edges[-1]), SMOOTH_BINS)
        width = 2 * (SMOOTH_BINS // len(self.share) // 2) + 1
        share = torch.nn.functional.interpolate(self.share[None, None], SMOOTH_BINS, mode="linear")
        for _ in range(SMOOTHINGS):
            ends = torch.nn.functional.pad(share, (width // 2, width // 2), mode="replicate")
            share = torch.nn.functional.avg_pool1d(ends, width, 1)
        return NodeDensity(fine.edges, share[0, 0] / share.sum(), fine.paired)

    @classmethod
    def from_spread(
        cls, edges: Tensor, single: Tensor, pair: Tensor, floor: float = 0.03, curve: Tensor | None = None
    ) -> NodeDensity:
        """Density proportional to the integrand's standard deviation, which minimizes the variance of the sum.

        A pilot of few samples sees the deviations of narrow bins with an error of its own; they are smoothed first,
        since a bin that got too few draws costs more than one that got too many gains. Pairs pay where the data are
        clean, so they are used above one log-SNR, the best.

        Arguments:
            edges: bin edges, shape (K + 1,).
            single: standard deviation of one draw in each bin, shape (K,).
            pair: standard deviation of an antithetic pair's mean, shape (K,). A pair costs two evaluations, so it
                pays where sqrt(2) pair < single.
            floor: share of the average that every bin receives at least, so that none is left unseen.
            curve: mean of the integrand in each bin, shape (K,).
        """
        alone, twice = _smooth(single.square()).sqrt(), (2 * _smooth(pair.square())).sqrt()
        width, bins = edges.diff(), len(single)
        totals = [float((alone[:k] @ width[:k]) + (twice[k:] @ width[k:])) for k in range(bins + 1)]
        first = min(range(bins, -1, -1), key=totals.__getitem__)
        paired = torch.arange(bins, device=edges.device) >= first
        spread = torch.where(paired, twice, alone)
        mass = (spread + floor * spread.mean() + 1e-12) * width
        return cls(edges, mass / mass.sum(), paired, edges.new_empty(0) if curve is None else curve)

    @property
    def draws_per_evaluation(self) -> float:
        return float((self.share / (1 + self.paired)).sum())

    def quantile(self, u: Tensor) -> Tensor:
        """Return the log-SNR below which a share u of the draws lies."""
        cumulative, edges = self._cumulative, self.edges
        k = (torch.searchsorted(cumulative, u, right=True) - 1).clamp(0, len(edges) - 2)
        return edges[k] + (u - cumulative[k]) / (cumulative[k + 1] - cumulative[k]) * (edges[k + 1] - edges[k])

    def cumulative_at(self, log_snr: Tensor) -> Tensor:
        """Return the share of the draws that lies below a log-SNR: the inverse of `quantile`."""
        cumulative, edges = self._cumulative, self.edges
        k = self._bin(log_snr)
        part = ((log_snr - edges[k]) / (edges[k + 1] - edges[k])).clamp(0, 1)
        return cumulative[k] + part * (cumulative[k + 1] - cumulative[k])

    def density_at(self, log_snr: Tensor) -> Tensor:
        """Return the density of the draws at a log-SNR: the derivative of `cumulative_at`."""
        return self._density[self._bin(log_snr)]

    def is_paired(self, log_snr: Tensor) -> Tensor:
        return self.paired[self._bin(log_snr)]

    def curve_at(self, log_snr: Tensor) -> Tensor:
        """Return the known mean of the integrand: linear between the centres of the bins, constant beyond them."""
        if not self.curve.numel():
            return torch.zeros_like(log_snr)
        at, value = self._curve_points
        k = (torch.searchsorted(at, log_snr.contiguous(), right=True) - 1).clamp(0, len(at) - 2)
        return value[k] + (log_snr - at[k]) / (at[k + 1] - at[k]) * (value[k + 1] - value[k])

    @cached_property
    def curve_integral(self) -> float:
        """The integral of `curve_at` over all bins."""
        if not self.curve.numel():
            return 0.0
        at, value = self._curve_points
        return float(torch.trapezoid(value, at))

    def without_curve(self) -> NodeDensity:
        """Return the same density with nothing known of the integrand."""
        return NodeDensity(self.edges, self.share, self.paired)

    def alone(self) -> NodeDensity:
        """Return the same share of the evaluations everywhere without antithetic pairs."""
        return NodeDensity(self.edges, self.share, torch.zeros_like(self.paired), self.curve)

    def half_uniform(self) -> NodeDensity:
        """Return a density for another integrand than the fitted one: half of the draws go everywhere alike."""
        width = self.edges.diff()
        return NodeDensity(self.edges, (self.share + width / width.sum()) / 2, self.paired)

    def moved_to(self, lo: float, hi: float) -> NodeDensity:
        """Return the same density over another range: cut, or going on as it ends; uniform if none of it is left."""
        if lo >= float(self.edges[-1]) or hi <= float(self.edges[0]):
            return NodeDensity.uniform(lo, hi)
        ends = self.edges.new_tensor([lo, hi])
        edges = torch.cat([ends, self.edges[(self.edges > lo) & (self.edges < hi)]]).unique()
        k = self._bin((edges[1:] + edges[:-1]) / 2)
        share = (self.share / self.edges.diff())[k] * edges.diff()
        curve = self.curve[k] if self.curve.numel() else self.curve
        return NodeDensity(edges, share / share.sum(), self.paired[k], curve)

    def rebinned(self, bins: int) -> NodeDensity:
        """Return the same density in evenly wide bins, without pairs and a curve."""
        even = NodeDensity.uniform(float(self.edges[0]), float(self.edges[-1]), bins)
        return NodeDensity(even.edges, self.cumulative_at(even.edges).diff(), even.paired)

    @cached_property
    def _curve_points(self) -> tuple[Tensor, Tensor]:
        edges, curve = self.edges, self.curve
        at = torch.cat([edges[:1], (edges[1:] + edges[:-1]) / 2, edges[-1:]])
        return at, torch.cat([curve[:1], curve, curve[-1:]])

    def _bin(self, log_snr: Tensor) -> Tensor:
        return (torch.searchsorted(self.edges, log_snr.contiguous(), right=True) - 1).clamp(0, len(self.paired) - 1)

    @cached_property
    def _density(self) -> Tensor:
        return self._cumulative.diff() / self.edges.diff()

    @cached_property
    def _cumulative(self) -> Tensor:
        draws = self.share / (1 + self.paired)
        return torch.cat([draws.new_zeros(1), draws.cumsum(0) / draws.sum()])


class FittedNodes(FittedBuffers):
    """What `fit` leaves behind beside the reference, kept by `state_dict`.

    That is the node density, the calibration of low-discrepancy noise, the reference's scales, the range that the
    schedule had for these (`home`; a pilot's nodes may have that of another candidate), and for references that are
    fitted to each sample's own draws: the nodes, whether they begin with the fitted reference (`own_base`) or with
    the schedule's N(0, std^2), whether they pay (`own_pays`), and the variance that few draws show, nats squared times
    draws (`own_missed`).

    Sums over a table take one Gaussian instead of a mixture, and what it leaves of the integrand lies elsewhere: nodes
    that suit the mixture cost the Gaussian several times its error. A pilot measures both (`gaussian`).

    They stay on the CPU wherever the network goes: nodes are placed there, and a device would have to be waited for.
    """

    def __init__(
        self,
        nodes: NodeDensity,
        calibration: Tensor,
        scales: tuple[float, float] = (1.0, 1.0),
        gaussian: NodeDensity | None = None,
        own: NodeDensity | None = None,
        own_base: bool = True,
        home: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        gaussian = nodes if gaussian is None else gaussian
        lo, hi = float(nodes.edges[0]), float(nodes.edges[-1])
        own = NodeDensity.of_images(lo, hi, scales[1]) if own is None else own
        self.register_buffer("own_share", own.share)
        for name, value in (("own_base", own_base), ("own_pays", True)):
            self.register_buffer(name, torch.tensor(value, device="cpu"))
        self.register_buffer("own_missed", torch.zeros((), dtype=torch.float64, device="cpu"))
        self.register_buffer("edges", nodes.edges)
        for name in ("share", "paired", "curve"):
            self.register_buffer(name, getattr(nodes, name))
            self.register_buffer(f"gaussian_{name}", getattr(gaussian, name))
        self.register_buffer("calibration", calibration)
        self.register_buffer("scales", torch.tensor(scales, dtype=torch.float64, device="cpu"))
        self.register_buffer("home", torch.tensor(home or (lo, hi), dtype=torch.float64, device="cpu"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FittedNodes:
        return self

    @property
    def density(self) -> NodeDensity:
        return NodeDensity(self.edges, self.share, self.paired, self.curve)

    @property
    def gaussian(self) -> NodeDensity:
        """The density for the one Gaussian like the reference; that of the reference itself where it is one."""
        return NodeDensity(self.edges, self.gaussian_share, self.gaussian_paired, self.gaussian_curve)

    @property
    def own(self) -> NodeDensity:
        """The density for references that are fitted to a sample's own draws, which take what is odd in the noise."""
        return self._own_bins().smooth()

    @property
    def own_coarse(self) -> float:
        """Share of the draws of `own` that lies where little of an image is known but what kind of image it is."""
        below = torch.tensor(IMAGES[0] - 2 * math.log(float(self.scales[1])), dtype=torch.float64, device="cpu")
        return float(self._own_bins().cumulative_at(below))

    def _own_bins(self) -> NodeDensity:
        even = NodeDensity.uniform(*self.log_snr_range, len(self.own_share))
        return NodeDensity(even.edges, self.own_share, even.paired)

    def values(self) -> tuple[bytes, ...]:
        """Return all numbers, to be compared with those of another time."""
        return tuple(buffer.numpy().tobytes() for buffer in self._buffers.values())

    def moved_to(self, lo: float, hi: float) -> FittedNodes:
        """Return the same nodes over another range of log-SNR, without a calibration."""
        found = FittedNodes(
            self.density.moved_to(lo, hi),
            self.calibration[:, :0],
            tuple(self.scales.tolist()),
            gaussian=self.gaussian.moved_to(lo, hi),
            own=self._own_bins().moved_to(lo, hi).rebinned(len(self.own_share)),
        )
        found.own_base, found.own_pays, found.own_missed = self.own_base, self.own_pays, self.own_missed
        return found

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """Lowest and highest log-SNR of the nodes."""
        edges = self.edges.numpy()  # an index of a tensor takes ten times as long
        return float(edges[0]), float(edges[-1])

    @property
    def slowest_decay(self) -> tuple[float, float]:
        """Rate at which the reference's own residual decays at the noisy and at the clean end, in log-SNR."""
        (lo, hi), (smallest, largest) = self.log_snr_range, self.scales.tolist()
        return 1 / (1 + math.exp(lo) * largest**2), 1 / (1 + math.exp(-hi) / smallest**2)


def _smooth(variance: Tensor) -> Tensor:
    for _ in range(SMOOTHINGS):
        around = torch.cat([variance[:1], variance, variance[-1:]])
        variance = (around[:-2] + 2 * variance + around[2:]) / 4
    return variance
