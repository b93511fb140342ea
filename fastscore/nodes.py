r"""Where in log-SNR to evaluate, and with which weights.

The integral over log-SNR is a sum over draws s, one noise each,

.. math:: \int f(\lambda)\,d\lambda \approx \sum_s w_s f(\lambda_s)

A `NodeDensity` says how many evaluations each stretch of log-SNR deserves and whether they come as antithetic pairs;
`make_rule` turns it and a number of evaluations into draws. Draws are stratified: draw s is the centre of a cell that
holds 1/N of the mass, and its weight is the cell's width. For a discrete table the cells are the table's own.

The three methods differ in the weights alone. With lambda_1 > lambda_2 > ... the table's log-SNRs and
t = sigmoid(-lambda) the paper's time:

====================  ================================================  =======================
method                weight of entry i                                 source
====================  ================================================  =======================
``density``           its cell's width in log-SNR (trapezoid rule)      the integral itself
``discrete``          (t_{i+1} - t_i) / (t_i (1 - t_i))                 Li and Yan (2024)
``elbo``              exp(lambda_{i-1} - lambda_i) - 1                  Ho et al. (2020)
====================  ================================================  =======================

References:
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .buffers import FittedBuffers
from .schedules import Schedule

METHODS = ("density", "discrete", "elbo")
TABLE_STEPS = 1000  # timesteps of "discrete" and "elbo" where the schedule itself is continuous
MIN_DRAWS = 4


@dataclass(frozen=True)
class NodeDensity:
    """Evaluations per bin of log-SNR.

    Arguments:
        edges: ascending bin edges, float64, shape (K + 1,).
        share: share of the evaluations in each bin, sums to one, shape (K,).
        paired: whether a bin's draws are antithetic pairs (two evaluations a draw), bool, shape (K,).
    """

    edges: Tensor
    share: Tensor
    paired: Tensor

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
    def from_spread(cls, edges: Tensor, single: Tensor, pair: Tensor, floor: float = 0.03) -> NodeDensity:
        """Density proportional to the integrand's standard deviation, which minimizes the variance of the sum.

        Arguments:
            edges: bin edges, shape (K + 1,).
            single: standard deviation of one draw in each bin, shape (K,).
            pair: standard deviation of an antithetic pair's mean, shape (K,). A pair costs two evaluations, so it
                is chosen where sqrt(2) pair < single.
            floor: share of the average that every bin receives at least, so that none is left unseen.
        """
        paired = 2**0.5 * pair < single
        spread = torch.where(paired, 2**0.5 * pair, single)
        mass = (spread + floor * spread.mean() + 1e-12) * edges.diff()
        return cls(edges, mass / mass.sum(), paired)

    @property
    def draws_per_evaluation(self) -> float:
        return float((self.share / (1 + self.paired)).sum())

    def quantile(self, u: Tensor) -> Tensor:
        """Return the log-SNR below which a share u of the draws lies."""
        cumulative, edges = self._cumulative(), self.edges
        k = (torch.searchsorted(cumulative, u, right=True) - 1).clamp(0, len(edges) - 2)
        return edges[k] + (u - cumulative[k]) / (cumulative[k + 1] - cumulative[k]) * (edges[k + 1] - edges[k])

    def cumulative_at(self, log_snr: Tensor) -> Tensor:
        """Return the share of the draws that lies below a log-SNR: the inverse of `quantile`."""
        cumulative, edges = self._cumulative(), self.edges
        k = self._bin(log_snr)
        part = ((log_snr - edges[k]) / (edges[k + 1] - edges[k])).clamp(0, 1)
        return cumulative[k] + part * (cumulative[k + 1] - cumulative[k])

    def density_at(self, log_snr: Tensor) -> Tensor:
        """Return the density of the draws at a log-SNR: the derivative of `cumulative_at`."""
        return (self._cumulative().diff() / self.edges.diff())[self._bin(log_snr)]

    def is_paired(self, log_snr: Tensor) -> Tensor:
        return self.paired[self._bin(log_snr)]

    def _bin(self, log_snr):
        return (torch.searchsorted(self.edges, log_snr, right=True) - 1).clamp(0, len(self.paired) - 1)

    def _cumulative(self):
        draws = self.share / (1 + self.paired)
        return torch.cat([draws.new_zeros(1), draws.cumsum(0) / draws.sum()])


class FittedNodes(FittedBuffers):
    """The node density and the calibration of low-discrepancy noise, kept by `state_dict`."""

    def __init__(self, nodes: NodeDensity, calibration: Tensor):
        super().__init__()
        self.register_buffer("edges", nodes.edges)
        self.register_buffer("share", nodes.share)
        self.register_buffer("paired", nodes.paired)
        self.register_buffer("calibration", calibration)

    @property
    def density(self) -> NodeDensity:
        return NodeDensity(self.host("edges"), self.host("share"), self.host("paired"))


@dataclass(frozen=True)
class Rule:
    """The draws of one estimate, ascending in log-SNR, shared by all samples of a call.

    Arguments:
        log_snr: of each draw, float64, shape (N,).
        time: the schedule's own time there, shape (N,); int64 for a table.
        weight: of each draw for the chosen method, shape (N,).
        density_weight: of each draw for method "density", shape (N,).
        paired: whether the draw is an antithetic pair, bool, shape (N,).
    """

    log_snr: Tensor
    time: Tensor
    weight: Tensor
    density_weight: Tensor
    paired: Tensor

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        return len(self.paired) + int(self.paired.sum())


def make_rule(density: NodeDensity, nfe: int, schedule: Schedule, method: str = "density") -> Rule:
    """Place at most `nfe` evaluations.

    Raises:
        ValueError: for an unknown method, or when nfe leaves fewer than 4 draws, too few for an error bar.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    draws = round(nfe * density.draws_per_evaluation)
    while draws >= MIN_DRAWS:
        rule = _place(density, draws, schedule, method)
        if rule.nfe <= nfe:
            return rule
        draws -= max(1, (rule.nfe - nfe) // 2)
    raise ValueError(_too_few(nfe))


def uniform_in_time(nfe: int, schedule: Schedule) -> Rule:
    """Place antithetic pairs uniformly in the schedule's own time, with the weights of a mean: -1/2 sum w f = -mean f.

    Raises:
        ValueError: as `make_rule`.
    """
    draws = nfe // 2
    if draws < MIN_DRAWS:
        raise ValueError(_too_few(nfe))
    clean, noisy = schedule.time_range
    u = (torch.arange(draws, dtype=torch.float64, device="cpu") + 0.5) / draws
    whole = (noisy + 1 - (noisy + 1 - clean) * u).floor().long()  # of a table, the entry in the middle of each cell
    time = whole if schedule.discrete else noisy + (clean - noisy) * u
    weight = torch.full_like(u, 2 / draws)
    log_snr = schedule.log_snr(time)
    cells = _cells(log_snr, *log_snr.new_tensor(schedule.log_snr_range))
    return Rule(log_snr, time, weight, cells, torch.ones_like(u, dtype=torch.bool))


def method_table(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return (time, log_snr) of the discrete process that "discrete" and "elbo" sum over, noisiest first.

    A table is itself; a continuous schedule is cut into 1000 equal steps of its own time, the first one step from
    the clean end.
    """
    if schedule.discrete:
        time = torch.arange(schedule.time_range[1], -1, -1, device="cpu")
    else:
        clean, noisy = schedule.time_range
        time = torch.linspace(noisy, clean, TABLE_STEPS + 1, dtype=torch.float64, device="cpu")[:-1]
    return time, schedule.log_snr(time)


def method_weights(log_snr: Tensor, method: str) -> Tensor:
    """Return the weight of every entry of an ascending table of log-SNRs, shape (T,); see the module's table."""
    if method == "density":
        return _cells(log_snr, log_snr[0], log_snr[-1])
    if method == "discrete":
        t = torch.cat([log_snr.new_ones(1), torch.sigmoid(-log_snr)])  # t = 1 closes the integral
        return (t[:-1] - t[1:]) / (t[1:] * (1 - t[1:]))
    # The least noisy entry is the Gaussian decoder's: its weight is 1 / alphas_cumprod.
    return torch.cat([torch.expm1(log_snr.diff()), 1 + torch.exp(-log_snr[-1:])])


def _too_few(nfe: int) -> str:
    return (
        f"nfe={nfe} leaves fewer than {MIN_DRAWS} draws a sample, too few for an error bar; "
        f"use nfe >= {2 * MIN_DRAWS} (the default is 256)"
    )


def _place(density: NodeDensity, draws: int, schedule: Schedule, method: str) -> Rule:
    if not schedule.discrete and method == "density":
        edges = density.quantile(torch.arange(draws + 1, dtype=torch.float64, device="cpu") / draws)
        log_snr, width = (edges[1:] + edges[:-1]) / 2, edges.diff()
        return Rule(log_snr, schedule.time(log_snr), width, width, density.is_paired(log_snr))
    time, table = method_table(schedule)
    chosen, count = _choose(density, table, draws)
    entries = table[chosen]
    # Every entry of the table gives its weight to the nearest chosen one, which shares it among its draws.
    nearest = torch.searchsorted((entries[1:] + entries[:-1]) / 2, table)
    summed = torch.zeros_like(entries).index_add_(0, nearest, method_weights(table, method))
    cells = _cells(entries, table[0], table[-1])
    weight, density_weight = ((w / count).repeat_interleave(count) for w in (summed, cells))
    drawn = chosen.repeat_interleave(count)
    if method == "density":
        weight = density_weight
    return Rule(table[drawn], time[drawn], weight, density_weight, density.is_paired(table[drawn]))


def _choose(density: NodeDensity, table: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Return which entries of an ascending table are drawn, and how often each."""
    middles = (table[1:] + table[:-1]) / 2
    upper = torch.cat([density.cumulative_at(middles), table.new_ones(1)])
    u = (torch.arange(draws, dtype=torch.float64, device="cpu") + 0.5) / draws
    return torch.searchsorted(upper, u).clamp(max=len(table) - 1).unique(return_counts=True)


def _cells(log_snr: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Width of each entry's cell: up to the middle of its neighbours, and to the ends of the range."""
    middles = (log_snr[1:] + log_snr[:-1]) / 2
    return torch.cat([lo[None], middles, hi[None]]).diff()
