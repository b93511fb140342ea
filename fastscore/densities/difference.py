r"""Two densities on the same data: the difference of their logarithms, with common noise at common nodes.

.. math:: \log p_a(x) - \log p_b(x) = -\tfrac12 \int E\big[\, \|\epsilon - \hat\epsilon_a(x_\lambda)\|^2
        - \|\epsilon - \hat\epsilon_b(x_\lambda)\|^2 \,\big]\, d\lambda

Both networks answer at the same log-SNR with the same noise, so that what they have in common cancels in every draw,
also where their schedules scale x_t in different ways. Where only one of the ranges of log-SNR reaches, the reference
stands in for the other network, as it does in that density's own estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..density import ScoreDensity
from ..estimator.calibration import uncalibrated
from ..estimator.comparison import Comparison, Differences
from ..estimator.curve import FEWEST
from ..estimator.network import Network
from ..estimator.network_density import network_of
from ..estimator.nodes import FittedNodes, NodeDensity
from ..estimator.part import Part
from ..estimator.planner import Wanted
from ..estimator.protocol import Density, check_density
from ..estimator.rules import GROUPS
from ..estimator.samples import Samples
from ..process.conditions import takes_conditions
from ..process.network import warn_if_training
from ..process.schedules import Schedule
from ..process.settings import settings_of
from ..reference.gaussians import Reference
from ..support.modes import ordinary
from ..support.untouched import undisturbed
from ..support.warn import warn

AT_ONCE = 1024  # samples, whose draws are kept until the second network has answered: 2 MB at 256 evaluations


@takes_conditions
@ordinary
def compare_densities(
    a: Density,
    b: Density,
    x: Tensor,
    *,
    nfe: int | None = None,
    seed: int = 0,
    sample_index: Tensor | None = None,
    mask: Tensor | None = None,
    memory: int | str | None = None,
    cond: dict[str, Any] | None = None,
    **named: Any,
) -> Comparison:
    r"""Return log p_a(x) - log p_b(x) of two densities, such as two checkpoints, with the error of the difference.

    Both see the same noise at the same nodes, and what they have in common cancels: the error is that of the
    difference. `mean()` of the result has the error of paired differences too. Of two fitted densities that are not
    alike two estimates may have the smaller error: nodes, reference and noise of a comparison are common to both.

    Arguments:
        a, b: `ScoreDensity`, `Transformed` or `ZeroMeanDensity` each, of the same data. Their schedules, predictions,
            ranges, references and transforms may differ; for two tables of timesteps the tables must not. It is enough
            if one of them is fitted.
        x: data, floating point, shape (B, \*shape).
        nfe: network evaluations per sample of each density; that of `a` by default.
        seed, sample_index, mask, memory, cond, named: as in `ScoreDensity.estimate`; conditions go to both networks.

    Returns:
        `Comparison`, whose differences and errors are in nats. With fewer than four draws in the range of one density
        its `truncation` is infinite, and a warning names the nfe that it takes.

    Raises:
        TypeError: if a or b is no density.
        ValueError: if a table of timesteps meets another schedule, which has no nodes in common with it; if one density
            has fewer dimensions than the other; and as `ScoreDensity.estimate`.

    Example:
        >>> mean, error = compare_densities(new, old, test_data, nfe=64).mean()
    """
    for density in (a, b):
        check_density(density)
    with torch.no_grad(), undisturbed(a.model), undisturbed(b.model):
        sides = [_Side.of(density, x, sample_index, mask, cond) for density in (a, b)]
        _refuse_unlike(*sides)
        if torch.equal(sides[0].samples.x, sides[1].samples.x):  # one reference for both cancels
            known = next((side.reference for side in sides if side.reference.mean.shape[1] > 1), sides[0].reference)
            sides = [side._replace(reference=known) for side in sides]
        nodes = common_nodes(*(side.core.nodes.density for side in sides))
        core = sides[0].core
        wanted = core.wanted(nfe, seed, sides[0].samples, memory)._replace(noise="independent")
        return _compare([side.within(nodes) for side in sides], FittedNodes(nodes, uncalibrated()), wanted)


def _compare(sides: list[_Side], nodes: FittedNodes, wanted: Wanted) -> Comparison:
    samples = sides[0].samples
    found = Differences(samples, tuple(side.core.nodes.slowest_decay for side in sides))
    for start in range(0, len(samples), AT_ONCE):
        chosen = slice(start, start + AT_ONCE)
        some = [side.select(chosen) for side in sides]
        parts = list(some[0].run(nodes, wanted))
        for part in parts:
            found.put_ends(0, part, part.f, start + part.samples)
        first = torch.cat([part.f for part in parts])[torch.cat([part.samples for part in parts]).argsort()]
        for part in some[1].run(nodes, wanted):
            found.put_ends(1, part, part.f, start + part.samples)
            found.put(part, first[part.samples] - part.f, part.f, start + part.samples)
    told = found.told(sides[0].outside() - sides[1].outside())
    if bool(told.truncation_per_sample.isinf().any()):
        _warn_of_few_draws(sides, nodes.density, wanted.nfe)
    return told


class _Side(NamedTuple):
    """One of two densities, with what it makes of the data.

    Attributes:
        network: of the density, which is asked within its range alone.
        log_det: log|det dx/dz| of every sample, float64, (B,).
    """

    core: ScoreDensity
    network: Network
    samples: Samples
    reference: Reference
    log_det: Tensor

    @classmethod
    def of(
        cls, density: Density, x: Tensor, sample_index: Tensor | None, mask: Tensor | None, cond: dict[str, Any]
    ) -> _Side:
        z, log_det = density.to_network(x, mask)
        counted, given = density.network_arguments(x, mask, cond)
        samples = density.core.check(z, sample_index, given, mask=counted)
        return cls(density.core, network_of(density.core), samples, density.core.reference, log_det)

    def within(self, nodes: NodeDensity) -> _Side:
        """Return the same with a network that is not asked beyond its range, where these nodes go further."""
        lo, hi = self.core.log_snr_range
        if lo <= float(nodes.edges[0]) and float(nodes.edges[-1]) <= hi:
            return self
        return self._replace(network=replace(self.network, schedule=_Within(self.core.schedule, lo, hi)))

    def select(self, chosen: slice) -> _Side:
        return self._replace(samples=self.samples.select(chosen))

    def outside(self) -> Tensor:
        """Return what log p has beside the integral, (B,)."""
        return self.reference.log_prob(self.samples.x, self.samples.mask) - self.log_det

    def run(self, nodes: FittedNodes, wanted: Wanted) -> Iterator[Part]:
        """Yield f of all draws; zero where the range of this density does not reach."""
        core, network, (lo, hi) = self.core, self.network, self.network.log_snr_range
        warn_if_training(core.model)
        programs = network.find_programs(self.samples)
        plan = core.planner.plan(network, nodes, self.reference, self.samples, programs, wanted)
        for cond in self.samples.conds:
            cond.remember(core.model, len(self.samples))
        for part in plan.run(self.samples, programs, self.reference):
            if network.schedule is core.schedule:
                yield part
                continue
            log_snr = torch.stack([plan.draws.rules.of(group).log_snr for group in range(GROUPS)])
            inside = ((log_snr >= lo) & (log_snr <= hi)).to(part.f.device)
            own = inside[self.samples.group.to(part.f.device)[part.samples]]
            yield replace(part, f=torch.where(own, part.f, 0.0))


class _Within(Schedule):
    """A schedule whose network is asked at the end of its range for what lies beyond, where nobody reads the answer."""

    def __init__(self, schedule: Schedule, lo: float, hi: float) -> None:
        self.schedule, self.lo, self.hi = schedule, lo, hi
        self.time_range, self.data_std = schedule.time_range, schedule.data_std

    def log_snr(self, t: Tensor) -> Tensor:
        return self.schedule.log_snr(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return self.schedule.time(log_snr.clamp(self.lo, self.hi))

    def scale(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.scale(log_snr)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.alpha_sigma(t)

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.derivatives(t)


def common_nodes(a: NodeDensity, b: NodeDensity) -> NodeDensity:
    r"""Return nodes for the difference of two integrands, over both ranges: half even, a quarter as each was fitted.

    All draws are antithetic pairs. The difference of the residuals is
    :math:`(\hat\epsilon_b - \hat\epsilon_a) \cdot (2\epsilon - \hat\epsilon_a - \hat\epsilon_b)`, and its largest part,
    that of the first :math:`\epsilon`, is odd in the noise as far as two networks differ by the same at both of a pair.
    """
    edges = torch.cat([a.edges, b.edges]).unique()
    own, even = (_share(a, edges) + _share(b, edges)) / 2, edges.diff() / (edges[-1] - edges[0])
    return NodeDensity(edges, (own + even) / 2, torch.ones_like(own, dtype=torch.bool))


def _share(nodes: NodeDensity, edges: Tensor) -> Tensor:
    """Return the share of the evaluations between some edges, which hold those of the nodes."""
    cumulative = torch.cat([nodes.share.new_zeros(1), nodes.share.cumsum(0)])
    k = (torch.searchsorted(nodes.edges, edges, right=True) - 1).clamp(0, len(nodes.share) - 1)
    part = ((edges - nodes.edges[k]) / nodes.edges.diff()[k]).clamp(0, 1)
    return (cumulative[k] + part * nodes.share[k]).diff()


def _warn_of_few_draws(sides: list[_Side], nodes: NodeDensity, nfe: int) -> None:
    ranges = [side.core.log_snr_range for side in sides]
    shares = [float(_share(nodes, nodes.edges.new_tensor(each))) for each in ranges]
    share, (lo, hi), name = min(zip(shares, ranges, "ab"))
    warn(
        f"with nfe={nfe} fewer than {FEWEST} draws of some samples lie in the range of log-SNR of {name}, {lo:.4g} to "
        f"{hi:.4g}, and do not show what lies beyond it: their truncation is infinite; use nfe >= "
        f"{2 * math.ceil(FEWEST / share)}"
    )


def _refuse_unlike(a: _Side, b: _Side) -> None:
    """Raise ValueError where the difference of two densities is not known at common nodes."""
    if a.samples.x.shape != b.samples.x.shape:
        raise ValueError(
            f"a and b must be densities in spaces of the same dimension, got {a.samples.x.shape[1]} and "
            f"{b.samples.x.shape[1]} dimensions; give two of positions or two of centred positions"
        )
    one, other = a.core.schedule, b.core.schedule
    if (one.discrete or other.discrete) and not _same_table(one, other):
        raise ValueError(
            f"a table of timesteps shares its nodes with no other schedule, got {one!r} and {other!r}; subtract two "
            "calls of estimate, or wrap tables in fastscore.ContinuousDDPM if their networks take real times"
        )


def _same_table(a: Schedule, b: Schedule) -> bool:
    if a is b:
        return True
    own, others = settings_of(a), settings_of(b)
    return own is not None and own == others
