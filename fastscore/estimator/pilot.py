r"""The pilot: what `ScoreDensity.fit` learns from data, so that later estimates need fewer evaluations.

1. Candidate references are fitted by expectation-maximization; of mixtures in the data's own coordinates those with
   the best held-out log q go on, of images those in cosines, which in many dimensions stand for the others.
2. A few held-out samples are evaluated in 48 bins of log-SNR, with antithetic twins; a quarter of them are those of
   extreme log q (`strata`). The same network answers serve every candidate. Kept is the reference with the smallest
   variance times cost,

   .. math:: \Big(\int \mathrm{sd}(f_\lambda)\,d\lambda\Big)^2 \cdot (1 + \mathrm{flops}_q / \mathrm{flops}_{net})

   where the integral is the standard error that the best nodes attain, and those nodes are kept with it.
3. The mean of the integrand in each bin becomes the curve that estimates integrate exactly.
4. Low-discrepancy noise is smoother than differences of its draws show. Replicates of pilot samples, and of odd
   points made from them, measure by how much, so that its error bars are tight and still cover (`calibration`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import noise
from ..reference.gaussians import Reference
from ..support.host import chosen
from ..support.memory import Chunks, even
from ..support.untouched import uncompiled
from ..support.warn import warn
from . import calibration
from .calibration import Replicates
from .candidates import KINDS, candidates, masked_candidates
from .integrand import row_terms
from .network import Network
from .nodes import NodeDensity
from .plan import Plan
from .rows import Draws, Rows
from .rules import FixedRules, Rule, make_rules
from .samples import Samples
from .statistics import draw_sum, draw_variance

BINS = 48
PILOT_SAMPLES = 64
EXTREME = 0.02  # of the held-out samples, at either end of log q
MIN_PILOT_SAMPLES = 4
MIN_CALIBRATION_SAMPLES = 16
DRAWS_PER_BIN = 4  # antithetic pairs; three degrees of freedom a bin and sample
# The nets of Sobol points are whole at powers of two; between them errors of few dimensions are up to a fifth larger.
CALIBRATION_NFE = (16, 24, 32, 48, 64, 96, 128, 256, 512)
CALIBRATION_SAMPLES = 96
TYPICAL_SHARE = 0.6  # of these; the others are made odd
# Share of the mean spread that every bin gets. A class that the data of `fit` lack has its integrand where theirs has
# none: with 0.03 its samples were off by many nats that their bars did not show (tests/test_unseen_class.py fails).
FLOOR = 0.2
PILOT_DRAWS = max(BINS * DRAWS_PER_BIN, *CALIBRATION_NFE)
REPLICATES = 4
# That mixtures are fitted to, several times there in float64; the held-out ones are a quarter of that at most.
EM_SAMPLES, EM_NUMBERS = 5000, 3 << 22
MIN_SAMPLES = 20
SMALL = 64  # units of the MLP that no network is counted cheaper than


Step = Callable[[str, int], None]  # what was done, and how many evaluations it took


@dataclass(frozen=True)
class Fitted:
    """What a pilot found: reference, nodes, the calibration of low-discrepancy noise, and the nodes for one Gaussian.

    `gaussian` is None where the reference is one Gaussian itself, or nothing was measured. `likelier` is by how many
    nats the likeliest of the references that were fitted explains held-out samples better than the chosen one.
    """

    reference: Reference
    nodes: NodeDensity
    calibration: Tensor
    gaussian: NodeDensity | None = None
    likelier: float = 0.0


@dataclass(frozen=True)
class PilotPlan:
    """How much a pilot may spend: network evaluations, how to cut them for a reference, and whom to tell.

    With `waits` low-discrepancy noise is not calibrated yet: `calibrate_noise` does it where it will be used.
    """

    evaluations: int
    seed: int
    chunks: Callable[[Reference], Chunks]
    step: Step
    waits: bool = False


def choose(count: int, dims: int, seed: int) -> Tensor:
    """Return which of `count` samples of d numbers a pilot looks at, in random order: first the held-out fifth.

    Raises:
        ValueError: for fewer than 20 samples.
    """
    if count < MIN_SAMPLES:
        raise ValueError(
            f"fit needs at least {MIN_SAMPLES} samples, got {count}; give more of the training data, or estimate "
            "without fit"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
    held, train = order[: held_out(count)], order[held_out(count) :]
    quarter = max(min(EM_SAMPLES, EM_NUMBERS // dims), MIN_SAMPLES) // 4
    return torch.cat([held[:quarter], train[: 4 * quarter]])


def held_out(count: int) -> int:
    """Return how many of the samples are held out for the choice of the reference, and for the pilot."""
    return count // 5


def run_pilot(network: Network, samples: Samples, kind: str, plan: PilotPlan) -> Fitted:
    """Fit reference, nodes and calibration, as far as the evaluations go.

    Arguments:
        samples: those that `choose` names, in its order.

    Raises:
        ValueError: for an unknown kind of reference.
    """
    if not chosen(kind, KINDS):
        raise ValueError(f"reference must be one of {', '.join(KINDS)}; got {kind!r}")
    held, (train, mask) = samples.select(slice(0, count := held_out(len(samples)))), samples.entries(slice(count, None))
    if mask is None:
        found = candidates(train, held.x, kind, network.schedule.data_std, plan.seed, samples.shape)
    else:
        found = masked_candidates(train, mask, kind, network.schedule.data_std)
    # The range follows the data's own scale, where the schedule leaves it open.
    network = replace(network, log_snr_range=network.schedule.range_for(*found[0].scales()))
    per_sample = 2 * BINS * DRAWS_PER_BIN
    count = min(len(held), PILOT_SAMPLES, max(plan.evaluations // 4, MIN_PILOT_SAMPLES * per_sample) // per_sample)
    if count < MIN_PILOT_SAMPLES or count * per_sample > plan.evaluations:
        if 0 < plan.evaluations < (least := MIN_PILOT_SAMPLES * per_sample):  # 0 asks for the reference alone
            warn(
                f"fit has fitted nothing but the reference: nodes take {least} evaluations of the network, got "
                f"evaluations={plan.evaluations}; give more, 90,000 for error bars of low-discrepancy noise too"
            )
        nodes = NodeDensity.uniform(*network.log_snr_range)
        return Fitted(found[0], nodes, calibration.uncalibrated())
    fitted = pilot(network, *strata(held, found[0], count), found, plan)
    fitted = replace(fitted, likelier=_likelier(found, fitted.reference, held))
    if plan.waits:
        return fitted
    return calibrate_noise(network, samples, fitted, replace(plan, evaluations=plan.evaluations - count * per_sample))


def _likelier(references: list[Reference], chosen: Reference, held: Samples) -> float:
    """Return by how many nats a sample the likeliest reference explains held-out samples better than the chosen one.

    The choice is by the variance that is left, and near a wrong network lies a wrong reference.
    """
    found = {q: float(q.log_prob(held.x, held.mask).mean()) for q in references}
    return max(found.values()) - found[chosen]


def calibrate_noise(network: Network, samples: Samples, fitted: Fitted, plan: PilotPlan) -> Fitted:
    """Calibrate low-discrepancy noise as far as the evaluations go, by samples that `choose` names, in its order."""
    held, d = samples.select(slice(0, held_out(len(samples)))), samples.x.shape[1]
    count = min(len(held), CALIBRATION_SAMPLES, plan.evaluations // (REPLICATES * sum(CALIBRATION_NFE)))
    # Masks differ, and so does what low-discrepancy noise gains.
    if samples.mask is not None or count < MIN_CALIBRATION_SAMPLES or d > noise.SOBOL_MAX_DIM:
        return fitted
    typical = round(count * TYPICAL_SHARE)
    odd = odd_points(held.select(slice(typical, count)), plan.seed)
    return calibrate(network, held.select(slice(0, typical)), odd, fitted, plan)


def strata(held: Samples, q: Reference, count: int) -> tuple[Samples, Tensor]:
    """Return `count` of the held-out samples, and their weights in a mean over all of these, float64, (count,).

    An eighth of them are of those with the lowest log q, and another of those with the highest, since few random ones
    may miss a rare kind of sample, in whose region the nodes would then be too few. Weights make up for it.
    """
    extreme, n = count // 8, len(held)
    ends = max(extreme, round(EXTREME * n))
    if extreme == 0 or n < count + 2 * ends:
        return held.select(slice(0, count)), torch.full((count,), 1 / count, dtype=torch.float64, device="cpu")
    order = q.log_prob(held.x, held.mask).cpu().argsort()
    parts = [(order[:ends], extreme), (order[-ends:], extreme), (order[ends:-ends], count - 2 * extreme)]
    # The held-out samples are in random order, and so are the first ones of a part in that order.
    chosen = [part.sort().values[:some] for part, some in parts]
    weight = [torch.full((some,), len(part) / (n * some), dtype=torch.float64, device="cpu") for part, some in parts]
    return held.select(torch.cat(chosen).to(held.device)), torch.cat(weight)


def pilot(network: Network, samples: Samples, weight: Tensor, references: list[Reference], plan: PilotPlan) -> Fitted:
    """Choose reference and nodes on held-out samples, by their weights; the calibration stays empty.

    Beside every mixture its Gaussian is looked at, for the nodes that go with it, and is not to be chosen.
    """
    single = [q.gaussian() for q in references if q.components > 1]
    f = _values(network, samples, [*references, *single], plan).unflatten(2, (BINS, DRAWS_PER_BIN, 2))
    if not bool(torch.isfinite(f).all()):
        raise ValueError(
            "the network returned NaN or inf on the data given to fit(); check its weights and the schedule's range"
        )
    lo, hi = network.log_snr_range
    edges = torch.linspace(lo, hi, BINS + 1, dtype=torch.float64, device="cpu")
    d, net_flops = samples.x.shape[1], _network_flops(network, samples)
    spreads = [_Spread.of(each, weight, edges) for each in f]
    costs = [1 + q.flops(d) / net_flops for q in references]
    winner = min(range(len(references)), key=lambda i: spreads[i].variance * costs[i])
    best = references[winner]
    own = sum(q.components > 1 for q in references[:winner])  # the mixtures before it
    gaussian = spreads[len(references) + own].nodes if best.components > 1 else None
    return Fitted(best, spreads[winner].nodes, calibration.uncalibrated(), gaussian)


def _values(network: Network, samples: Samples, references: list[Reference], plan: PilotPlan) -> Tensor:
    """Return the residuals of the network less those of each reference, of pairs in every bin, float64, (Q, B, R)."""
    rule, programs = _pilot_rule(network, BINS, DRAWS_PER_BIN), network.find_programs(samples)
    draws, d = Draws(FixedRules(rule), "independent", plan.seed), samples.x.shape[1]
    most, pairs, found = min(plan.chunks(q).rows for q in references), len(rule.time), []
    step = even(pairs, max(1, most // 2))
    for first in range(0, pairs, step):
        span, parts = range(first, min(first + step, pairs)), []
        (rows,) = Rows.of(network, [rule], draws.points(span, d, samples.device), span, samples.x)
        rows, at_once = rows.with_programs(network, programs, samples), max(1, most // (2 * len(span)))
        for start in range(0, len(samples), at_once):
            part = samples.select(slice(start, start + at_once))
            keys = draws.keys(part.index.to(part.device), d)
            errors, controls = row_terms(network, part, keys, rows, references)
            parts.append((errors[0] - torch.stack(controls)).double().cpu())
            plan.step("pilot", 2 * len(part) * len(span))
        found.append(torch.cat(parts, 1))
    return torch.cat(found, 2)


class _Spread(NamedTuple):
    """What a reference leaves: an estimate's variance at the best nodes, times its evaluations, and these nodes."""

    variance: float
    nodes: NodeDensity

    @classmethod
    def of(cls, f: Tensor, weight: Tensor, edges: Tensor) -> _Spread:
        """Return it for f of shape (b, BINS, DRAWS_PER_BIN, 2), by the weights of the samples."""
        single = (weight @ f.var(2).mean(2)).sqrt()  # over draws; averaged over samples and the two signs
        pair = (weight @ f.mean(3).var(2)).sqrt()
        best = torch.minimum(single, 2**0.5 * pair)
        nodes = NodeDensity.from_spread(edges, single, pair, FLOOR, weight @ f.mean((2, 3)))
        return cls(float((best * edges.diff()).sum()) ** 2, nodes)


def calibrate(network: Network, typical: Samples, odd: Samples, fitted: Fitted, plan: PilotPlan) -> Fitted:
    """Measure how much smaller the error of low-discrepancy noise is than the differences of its draws say."""
    samples, chunks, found, truth = typical.joined(odd), plan.chunks(fitted.reference), [], None
    programs = network.find_programs(samples)
    for nfe in sorted(CALIBRATION_NFE, reverse=True):
        parts = []
        for replicate in range(1, REPLICATES + 1):
            rules = make_rules(fitted.nodes, nfe, network.schedule, seed=plan.seed, round_=replicate)
            draws = Draws(rules, "sobol", plan.seed, replicate)
            sums, variance, nu = torch.empty(3, len(samples), dtype=torch.float64, device=samples.x.device)
            for part in Plan(network, draws, chunks).run(samples, programs, fitted.reference):
                f = part.block(part.f)
                sums[part.samples] = part.flat(draw_sum(f, part.rule))
                variance[part.samples], nu[part.samples] = map(part.flat, draw_variance(f, part.rule))
            parts.append((sums, variance, nu))
            plan.step(f"calibration at {nfe}", len(samples) * rules.nfe)
        sums, variance, nu = (torch.stack(each) for each in zip(*parts))
        # The mean of the largest estimates is the truth for the smaller ones, and costs itself a degree of freedom.
        own_mean = (REPLICATES / (REPLICATES - 1)) ** 0.5 if truth is None else 1.0
        truth = sums.mean(0) if truth is None else truth
        found.append(Replicates(nfe, own_mean * (sums - truth).cpu(), variance.cpu(), nu.cpu()))
    return replace(fitted, calibration=calibration.calibrate(found[::-1], len(typical)))


def odd_points(samples: Samples, seed: int) -> Samples:
    """Return samples that are not like the data.

    A third lies between two of them, a third further out than they are, and a third has noise of their own size added.
    Each keeps the conditions and the index of the sample that it was.
    """
    generator = torch.Generator().manual_seed(seed)
    x = samples.x
    other = x[torch.randperm(len(x), generator=generator, device="cpu").to(x.device)]
    center = x.mean(0)
    noised = x + (x - center).square().mean(0).sqrt() * torch.randn(x.shape, generator=generator, device="cpu").to(x)
    made = torch.stack([(x + other) / 2, center + 1.7 * (x - center), noised])
    kind = torch.arange(len(x), device=x.device) % 3
    return replace(samples, x=made[kind, torch.arange(len(x), device=x.device)])


def _pilot_rule(network: Network, bins: int, draws: int) -> Rule:
    lo, hi = network.log_snr_range
    n = bins * draws
    log_snr = lo + (hi - lo) * (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n
    time = network.schedule.time(log_snr)
    log_snr = network.schedule.log_snr(time)  # a table answers at its nearest entry
    return Rule.plain(
        log_snr, time, torch.full_like(log_snr, (hi - lo) / n), torch.ones(n, dtype=torch.bool, device="cpu")
    )


def _network_flops(network: Network, samples: Samples) -> int:
    """Return the operations of one row, and no fewer than those of an MLP of two layers of `SMALL` units.

    The counter knows products of matrices and convolutions alone: to it an exact score in closed form costs nothing,
    while each of its elementwise operations takes as long as a reference's.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which importing fastscore must not

    one = samples.select(slice(0, 1))
    rule = _pilot_rule(network, 1, 1)
    draws, d = Draws(FixedRules(rule), "independent", 0), one.x.shape[1]
    (rows,) = Rows.of(network, [rule], draws.points(range(1), d, one.device), range(1), one.x)
    with uncompiled(), FlopCounterMode(display=False) as counter:
        row_terms(network, one, draws.keys(one.index.to(one.device), d), rows, ())
    return max(2 * SMALL * (2 * d + SMALL), counter.get_total_flops() // 2)


def warn_if_worse_than_reference(fitted: Fitted, samples: Samples) -> None:
    """Warn where a network explains the data that it is fitted to worse than the likeliest fitted reference, by far.

    Its mean log-density on the pilot's samples is then below that by more than half a nat a dimension.
    """
    dims = samples.x.shape[1] if samples.mask is None else float(samples.mask.sum(1).double().mean())
    below = 0.5 * fitted.nodes.curve_integral + fitted.likelier
    if below > max(1.0, 0.5 * dims):
        warn(
            f"on these data the network's log-density is {below:.3g} nats per sample below that of a reference fitted "
            "to them: is predicts=, the time that the network gets (schedule=), or the scale of the data another "
            "than in training, or is it not trained to the end, at the clean end above all, as by a flow's loss? There "
            "density_loss trains, and probability_flow_log_prob asks less of it"
        )
