r"""The draws of an estimate: a node density and a number of evaluations become log-SNRs and weights, without bias.

The integral over log-SNR is a sum over N draws, one noise each,

.. math:: \int f\,d\lambda \approx \int c\,d\lambda + \sum_s w_s \big(f(\lambda_s) - c(\lambda_s)\big), \qquad
    \lambda_s = F^{-1}\Big(\frac{s + U_g}{N}\Big), \quad w_s = \frac{1}{N p(\lambda_s)}

with F the distribution function of the density p, c what a pilot knows of the mean of f, and one shift U_g for all
draws of a sample. The shift is uniform in [0, 1), so that the sum has no bias whatever f is. Nodes in the middle of
their cells would have one, the same for every sample, and no mean over samples would show it.

Samples share their nodes in runs of 64 consecutive indices, which lets whatever depends on time alone be evaluated
once a run. Sixteen runs have shifts of equal distance,

.. math:: U_g = \mathrm{frac}\big(U + \mathrm{reversed}_4(g) / 16\big), \qquad g = \lfloor index / 64 \rfloor \bmod 16

whose errors cancel in a mean over many samples: like 1/16 rather than like the root of it. U is a word of the seed.

A discrete table offers its own entries only. Entry k, whose weight in the whole sum is W_k, deserves the share pi_k of
the draws, proportional to p(lambda_k) W_k. Where N pi_k >= 1 it is drawn in any case, and W_k shared among its draws;
the others are drawn systematically, n_k times on average, with the weight W_k / n_k (`Allocation`). The whole table is
the integral by the trapezoid rule.

References:
    On the Theory of Systematic Sampling (Madow and Madow, 1944), https://doi.org/10.1214/aoms/1177731312
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..ops import noise
from ..process.schedules import Schedule
from ..process.settings import Seen
from ..support.host import whole
from .allocation import Allocation
from .methods import DENSITY, Method
from .nodes import NodeDensity
from .trapezoids import Trapezoids, error_weights

MIN_DRAWS = 4
MAX_DRAWS = 1 << 24  # a rule is a handful of float64 a draw: a gigabyte
GROUPS = 16
GROUP_RUN = 64
_PLACE = (0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15)  # bits reversed: any first few groups lie far apart

MULTIPLIED = ("weight", "density_weight", "curve", "remainder", "density_remainder", "even", "ends")  # with f


@dataclass(frozen=True)
class Rule:
    """The draws of some samples, ascending in log-SNR.

    Arguments:
        log_snr: of each draw, float64, shape (N,).
        time: the schedule's own time there, shape (N,); int64 for a table.
        weight: of each draw for the chosen method, shape (N,).
        density_weight: of each draw in the integral, whatever the method, shape (N,).
        paired: whether the draw is an antithetic pair, bool, shape (N,).
        curve: the known mean of the integrand at each draw, shape (N,).
        remainder: the whole of the known mean less its sum over the draws, float64, shape ().
        density_remainder: the same with the weights of "density".
        even: the weight of each draw, as it would be if all entries of a table were drawn as often as they deserve;
            where there is no table, `weight`. What the draws say of their noise is seen through these: the variance
            is within 3 % of that by the weights themselves.
        ends: 1 at the last draw that its own shift decides, -1 at the first, shape (N,). An entry that is drawn in any
            case has no error by the shift.
        trapezoids: what is summed up of the error of a table's rule; empty where there is no table.
    """

    log_snr: Tensor
    time: Tensor
    weight: Tensor
    density_weight: Tensor
    paired: Tensor
    curve: Tensor
    remainder: Tensor
    density_remainder: Tensor
    even: Tensor
    ends: Tensor
    trapezoids: Trapezoids = field(default_factory=Trapezoids.none)

    @property
    def nfe(self) -> int:
        """Network evaluations per sample."""
        return len(self.paired) + int(self.paired.sum())

    def with_tensors(self, tensors: Sequence[Tensor]) -> Rule:
        """Return the rule with other `tensors`, in their order; where the draws are stays on the CPU."""
        own, of_table = tensors[: len(MULTIPLIED)], tensors[len(MULTIPLIED) :]
        return replace(self, **dict(zip(MULTIPLIED, own)), trapezoids=Trapezoids(*of_table))

    @classmethod
    def stacked(cls, rules: Sequence[Rule], sizes: Sequence[int]) -> Rule:
        """Return the rules of several groups of samples as one, with weights (G, 1, N), for a block (G, m, N) of f.

        Its log-SNRs are the mean over the samples, of which there are `sizes`.
        """
        if len(rules) == 1:
            return rules[0]
        stacked = [torch.stack(each)[:, None] for each in zip(*(rule.tensors() for rule in rules))]
        log_snr = sum(size * rule.log_snr for rule, size in zip(rules, sizes)) / sum(sizes)
        return replace(rules[0].with_tensors(stacked), log_snr=log_snr)

    def tensors(self) -> list[Tensor]:
        """Return all that is multiplied with f."""
        return [*(getattr(self, name) for name in MULTIPLIED), *self.trapezoids]

    def kept(self) -> list[Tensor]:
        """Return all tensors."""
        return [*self.tensors(), self.log_snr, self.time, self.paired]

    @classmethod
    def plain(cls, log_snr: Tensor, time: Tensor, weight: Tensor, paired: Tensor) -> Rule:
        """Return a rule for the integral itself of which nothing is known, and whose draws no shift moves."""
        nothing = torch.zeros_like(weight)
        rule = cls.even_in(log_snr, time, weight, paired, nothing, weight.new_zeros(()))
        return replace(rule, ends=nothing)

    @classmethod
    def even_in(
        cls, log_snr: Tensor, time: Tensor, weight: Tensor, paired: Tensor, curve: Tensor, remainder: Tensor
    ) -> Rule:
        """Return a rule for the integral itself, none of whose draws shares its weight with others."""
        ends = torch.zeros_like(weight)
        if len(ends) > 1:
            ends[0], ends[-1] = -1, 1
        return cls(log_snr, time, weight, weight, paired, curve, remainder, remainder, weight, ends)


class Rules:
    """One rule for each group of samples, made when it is first asked for.

    All have the same number of draws, and the same of them are pairs: those whose stratum has its middle where the
    density asks for pairs.

    Arguments:
        density: where to draw.
        draws: N.
        schedule: whose times.
        method: whose weights.
        shift: U, the common part of all shifts, in [0, 1).
    """

    def __init__(self, density: NodeDensity, draws: int, schedule: Schedule, method: Method, shift: float) -> None:
        self.density, self.draws, self.schedule, self.method, self.shift = density, draws, schedule, method, shift
        self._middles = density.quantile(_strata(draws, 0.5))
        self.paired = density.is_paired(self._middles)
        self.nfe = draws + int(self.paired.sum())  # evaluations per sample
        self._table = _Table.of(density, draws, schedule, method)
        self._made: dict[int, Rule] = {}
        self._ask_everywhere()

    @property
    def learned(self) -> bool:
        """Whether the schedule's answers have gradients, which one backward pass uses up."""
        return any(told.requires_grad for told in self._seen.told[1:])

    def shifted(self, shift: float) -> Rules:
        """Return rules that differ in the shift alone, as another seed's do where these hold."""
        found = copy(self)
        found.shift, found._made = shift, {}
        return found

    def hold(self) -> bool:
        """Return whether the schedule still says of all draws what these rules were made of."""
        return self._seen.holds(self.schedule)

    def made_of(self, groups: Iterable[int]) -> list[Rule]:
        """Return the rules of some groups; whether the schedule changes is from now on asked at their draws too."""
        found = {group: self._made.get(group) for group in groups}
        missing = [group for group, rule in found.items() if rule is None]
        if missing:
            made = dict(zip(missing, self._place([self._shift(group) for group in missing])))
            self._made |= made
            self._ask_everywhere()
            found |= made
        return list(found.values())

    def forget(self) -> None:
        """Let go of the rules, which are made again when they are asked for."""
        self._made.clear()
        self._ask_everywhere()

    def nbytes(self) -> int:
        """Return the bytes of the rules that are kept."""
        return sum(tensor.nbytes for rule in list(self._made.values()) for tensor in rule.kept())

    def _ask_everywhere(self) -> None:
        log_snr = torch.cat([rule.log_snr for rule in self._made.values()] or [self._middles])
        self._seen = Seen.of(self.schedule, log_snr, None if self._table is None else self._table.time)

    def of(self, group: int) -> Rule:
        """Return the rule of a group of samples."""
        found = self._made.get(group)
        if found is None:
            (found,) = self._place([self._shift(group)])
            self._made[group] = found
        return found

    def _shift(self, group: int) -> float:
        return (self.shift + _PLACE[group] / GROUPS) % 1.0

    def _place(self, shifts: list[float]) -> list[Rule]:
        """Return a rule for each shift; what is looked up or asked of the schedule is so for all of them together."""
        density, schedule = self.density, self.schedule
        if self._table is not None:
            return [self._table.rule(self.paired, shift) for shift in shifts]
        log_snr = density.quantile(torch.cat([_strata(self.draws, shift) for shift in shifts]))
        weight, curve = 1 / (self.draws * density.density_at(log_snr)), density.curve_at(log_snr)
        known, parts = density.curve_integral, (log_snr, schedule.time(log_snr), weight, curve)
        return [
            Rule.even_in(log_snr, time, weight, self.paired, curve, known - weight @ curve)
            for log_snr, time, weight, curve in zip(*(part.split(self.draws) for part in parts))
        ]


class FixedRules:
    """The same rule for all samples."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.draws, self.nfe = rule, len(rule.time), rule.nfe

    def of(self, group: int) -> Rule:
        return self.rule

    def made_of(self, groups: Iterable[int]) -> list[Rule]:
        return [self.rule for _ in groups]

    def forget(self) -> None:
        """Keep the rule, which was given."""

    def nbytes(self) -> int:
        return 0


@dataclass(frozen=True)
class _Table:
    """The entries of a table, ascending in log-SNR, with their weights and their shares of the draws."""

    log_snr: Tensor
    time: Tensor
    weight: Tensor
    cell: Tensor
    curve: Tensor
    allocation: Allocation
    error: Tensor | None

    @classmethod
    def of(cls, density: NodeDensity, draws: int, schedule: Schedule, method: Method) -> _Table | None:
        table = method.table(schedule)
        if table is None:
            return None
        time, log_snr = table
        weight, cell = method.weights(log_snr), DENSITY.weights(log_snr)
        # Half of the draws go where a sum's weights are large, as at its ends, and half where the integral's are: a
        # single step of a table may outweigh all others, at noise where nothing is left to see.
        shares = [share / share.sum() for share in (density.density_at(log_snr) * each for each in (weight, cell))]
        allocation = Allocation.of((shares[0] + shares[1]) / 2, draws)
        # Sums that are no integral know their distance to it otherwise.
        error = error_weights(log_snr) if method is DENSITY else None
        return cls(log_snr, time, weight, cell, density.curve_at(log_snr), allocation, error)

    def rule(self, paired: Tensor, shift: float) -> Rule:
        entry = self.allocation.entries(shift)
        certain, share = self.allocation.certain[entry], 1 / self.allocation.count[entry]
        even = torch.where(certain, 1 / self.allocation.deserved[entry], share)
        curve, weight, cell = self.curve[entry], self.weight[entry] * share, self.cell[entry] * share
        return Rule(
            log_snr=self.log_snr[entry],
            time=self.time[entry],
            weight=weight,
            density_weight=cell,
            paired=paired,
            curve=curve,
            remainder=self.weight @ self.curve - weight @ curve,
            density_remainder=self.cell @ self.curve - cell @ curve,
            even=self.weight[entry] * even,
            ends=_ends(~certain),
            trapezoids=self._trapezoids(entry, cell),
        )

    def _trapezoids(self, entry: Tensor, cell: Tensor) -> Trapezoids:
        if self.error is None:
            return Trapezoids.none()
        return Trapezoids.of(self.error / self.cell, self.error @ self.curve, entry, cell)


def common_shift(seed: int, round_: int = 0) -> float:
    """Return U of a seed and a round."""
    return noise.unit(seed, round_, noise.STREAM_NODES)


def group_of(index: Tensor) -> Tensor:
    """Return the group of every sample index, in 0 .. 15: runs of 64 consecutive samples share their nodes."""
    return index // GROUP_RUN % GROUPS


def group_shifts() -> Tensor:
    """Return how far the shift of every group lies beyond that of the first one, float64, shape (16,)."""
    return torch.tensor(_PLACE, dtype=torch.float64, device="cpu") / GROUPS


def make_rules(
    density: NodeDensity, nfe: int, schedule: Schedule, method: Method = DENSITY, seed: int = 0, round_: int = 0
) -> Rules:
    """Place at most `nfe` evaluations per sample; `seed` and `round_` decide the shifts.

    Raises:
        ValueError: when nfe is no integer, leaves fewer than 4 draws, too few for an error
            bar, or is so large that the nodes themselves do not fit into memory.
    """
    nfe = whole("nfe", nfe)
    if nfe > MAX_DRAWS:
        raise ValueError(
            f"nfe must be at most {MAX_DRAWS} evaluations per sample, got {nfe}; average over seeds instead"
        )
    shift = common_shift(seed, round_)

    def most(nfe: int) -> Rules | None:
        draws = round(nfe * density.draws_per_evaluation)
        while draws >= MIN_DRAWS:
            rules = Rules(density, draws, schedule, method, shift)
            if rules.nfe <= nfe:
                return rules
            draws -= max(1, (rules.nfe - nfe) // 2)
        return None

    found = most(nfe)
    if found is None:
        raise ValueError(_too_few(nfe, next(filter(most, range(MIN_DRAWS, 2 * MIN_DRAWS)), 2 * MIN_DRAWS)))
    return found


def uniform_in_time(nfe: int, schedule: Schedule) -> FixedRules:
    """Place antithetic pairs uniformly in the schedule's own time, with the weights of a mean: -1/2 sum w f = -mean f.

    Raises:
        ValueError: as `make_rules`.
    """
    draws = nfe // 2
    if draws < MIN_DRAWS:
        raise ValueError(_too_few(nfe, 2 * MIN_DRAWS))
    clean, noisy = schedule.time_range
    u = _strata(draws, 0.5)
    whole = (noisy + 1 - (noisy + 1 - clean) * u).floor().long()  # of a table, the entry in the middle of each cell
    time = whole if schedule.discrete else noisy + (clean - noisy) * u
    weight = torch.full((draws,), 2 / draws, dtype=torch.float64, device="cpu")
    return FixedRules(
        Rule.plain(schedule.log_snr(time), time, weight, torch.ones(draws, dtype=torch.bool, device="cpu"))
    )


def _strata(draws: int, shift: float) -> Tensor:
    """Return (s + shift) / N for every draw s."""
    return (torch.arange(draws, dtype=torch.float64, device="cpu") + shift) / draws


def _ends(by_shift: Tensor) -> Tensor:
    ends = torch.zeros(len(by_shift), dtype=torch.float64, device="cpu")
    where = by_shift.nonzero().flatten()
    if len(where) > 1:
        ends[where[0]], ends[where[-1]] = -1, 1
    return ends


def _too_few(nfe: int, least: int) -> str:
    return (
        f"nfe={nfe} leaves fewer than {MIN_DRAWS} draws per sample, too few for an error bar; "
        f"use nfe >= {least} (the default is 256)"
    )
