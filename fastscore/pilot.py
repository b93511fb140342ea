r"""The pilot: what `ScoreDensity.fit` learns from data, so that later estimates need fewer evaluations.

1. Candidate references are fitted by expectation-maximization; those with the best held-out log q go on.
2. A few held-out samples are evaluated in 48 bins of log-SNR, with antithetic twins. The same network answers serve
   every candidate. Kept is the reference with the smallest variance times cost,

   .. math:: \Big(\int \mathrm{sd}(f_\lambda)\,d\lambda\Big)^2 \cdot (1 + \mathrm{flops}_q / \mathrm{flops}_{net})

   where the integral is the standard error that the best nodes attain, and those nodes are kept with it.
3. Low-discrepancy noise is smoother than its successive differences show. Replicates of pilot samples measure the
   ratio of true variance to the successive-difference variance, so that its error bars are tight and still cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import noise
from .estimate import draw_sum, draw_variance
from .integrand import Draws, Network, Rows, evaluate, row_terms
from .memory import Chunks
from .mixture import fit_mixture
from .nodes import NodeDensity, Rule, make_rule
from .reference import Reference
from .samples import Samples

BINS = 48
PILOT_SAMPLES = 64
MIN_PILOT_SAMPLES = 4
MIN_CALIBRATION_SAMPLES = 16
DRAWS_PER_BIN = 4  # antithetic pairs; three degrees of freedom a bin and sample
CALIBRATION_NFE = (16, 32, 64, 128, 256, 512)
CALIBRATION_SAMPLES = 96
PILOT_DRAWS = max(BINS * DRAWS_PER_BIN, *CALIBRATION_NFE)
REPLICATES = 4
NORMAL_95 = 1.96
EM_SAMPLES = 5000
HELD_OUT = EM_SAMPLES // 4  # as many as are held out of what the candidates are fitted to
FULL_MAX_DIM = 1024
FULL_MIXTURE_MAX_DIM = 256
MIXTURE_SIZES = (5, 10, 20, 40)
FINALISTS = 3

KINDS = ("auto", "isotropic", "diagonal", "full", "mixture")

Step = Callable[[str, int], None]  # what was done, and how many evaluations it took


@dataclass(frozen=True)
class Fitted:
    """What a pilot found: reference, nodes, and (log2 nfe, log variance ratio) of low-discrepancy noise."""

    reference: Reference
    nodes: NodeDensity
    calibration: Tensor


@dataclass(frozen=True)
class PilotPlan:
    """How much a pilot may spend: network evaluations, how to cut them for a reference, whom to tell, and where."""

    evaluations: int
    seed: int
    chunks: Callable[[Reference], Chunks]
    step: Step
    device: torch.device


def run_pilot(network: Network, samples: Samples, kind: str, plan: PilotPlan) -> Fitted:
    """Fit reference, nodes and calibration, as far as the evaluations go.

    Raises:
        ValueError: for an unknown kind of reference, or fewer than 20 samples.
    """
    if kind not in KINDS:
        raise ValueError(f"reference must be one of {', '.join(KINDS)}; got {kind!r}")
    if len(samples) < 20:
        raise ValueError(f"fit needs at least 20 samples, got {len(samples)}")
    generator = torch.Generator().manual_seed(plan.seed)
    order = torch.randperm(len(samples), generator=generator, device="cpu").to(samples.x.device)
    held, train = order[: len(order) // 5], order[len(order) // 5 :]
    # The data may lie on another device, and not fit on the network's: only what is used goes there.
    held = samples.select(held[:HELD_OUT]).to(plan.device)
    train = samples.x[train[:EM_SAMPLES]].to(plan.device)
    found = candidates(train, held.x, kind, network.schedule.data_std, plan.seed)
    per_sample = 2 * BINS * DRAWS_PER_BIN
    count = min(len(held), PILOT_SAMPLES, max(plan.evaluations // 4, MIN_PILOT_SAMPLES * per_sample) // per_sample)
    if count < MIN_PILOT_SAMPLES or count * per_sample > plan.evaluations:
        nodes = NodeDensity.uniform(*network.schedule.log_snr_range)
        return Fitted(found[0], nodes, torch.empty(2, 0, dtype=torch.float64, device="cpu"))
    fitted = pilot(network, held.select(slice(0, count)), found, plan)
    per_replicate = REPLICATES * sum(CALIBRATION_NFE)
    count = min(len(held), CALIBRATION_SAMPLES, (plan.evaluations - count * per_sample) // per_replicate)
    if count < MIN_CALIBRATION_SAMPLES or samples.x.shape[1] > noise.SOBOL_MAX_DIM:
        return fitted
    return calibrate(network, held.select(slice(0, count)), fitted, plan)


def candidates(train: Tensor, held_out: Tensor, kind: str, data_std: float, seed: int) -> list[Reference]:
    """Return the references that deserve a pilot, on the device of the training samples."""
    n, d = train.shape
    if kind == "isotropic":
        return [Reference.isotropic(float(train.square().mean().sqrt())).on(train.device)]
    plain = {"diagonal": [False], "full": [True], "mixture": []}.get(kind, [False] + [True] * (d <= FULL_MAX_DIM))
    found = [fit_mixture(train, 1, full, seed) for full in plain]
    mixtures = []
    if kind in ("auto", "mixture"):
        for full in [False, True] if d <= FULL_MIXTURE_MAX_DIM else [False]:
            mixtures += [fit_mixture(train, k, full, seed) for k in MIXTURE_SIZES if len(train) >= 20 * k]
        mixtures.sort(key=lambda q: -float(q.log_prob(held_out).mean()))
    found += mixtures[:FINALISTS]
    if not found:
        raise ValueError(f"a mixture reference needs at least {20 * MIXTURE_SIZES[0]} training samples, got {n}")
    return found + [Reference.isotropic(data_std).on(train.device)] * (kind == "auto")


def pilot(network: Network, samples: Samples, references: list[Reference], plan: PilotPlan) -> Fitted:
    """Choose reference and nodes on held-out samples; the calibration stays empty."""
    rule = _pilot_rule(network, BINS, DRAWS_PER_BIN)
    rows = Rows.of(network, Draws(rule, "independent", plan.seed), range(len(rule.log_snr)), samples.x)
    rows = rows.with_programs(network, network.find_programs(samples), samples)
    d = samples.x.shape[1]
    at_once = max(1, min(plan.chunks(q).rows for q in references) // rule.nfe)
    terms = []
    for start in range(0, len(samples), at_once):
        part = samples.select(slice(start, start + at_once))
        keys = noise.sample_keys("independent", plan.seed, part.index, d)
        errors, controls = row_terms(network, part, keys, rows, tuple(references))
        terms.append((errors - controls).double().cpu())  # (Q, b, R): errors has one condition and broadcasts
        plan.step("pilot", len(part) * rule.nfe)
    f = torch.cat(terms, 1).reshape(len(references), len(samples), BINS, DRAWS_PER_BIN, 2)
    if not bool(torch.isfinite(f).all()):
        raise ValueError(
            "the network returned NaN or inf on the data given to fit(); check its weights and the schedule's range"
        )
    lo, hi = network.schedule.log_snr_range
    edges = torch.linspace(lo, hi, BINS + 1, dtype=torch.float64, device="cpu")
    net_flops = _network_flops(network, samples)
    scored = []
    for q, reference in enumerate(references):
        single = f[q].var(2).mean((0, 2)).sqrt()  # over draws; averaged over samples and the two signs
        pair = f[q].mean(3).var(2).mean(0).sqrt()
        best = torch.minimum(single, 2**0.5 * pair)
        cost = 1 + reference.flops(d) / net_flops
        scored.append((float((best * edges.diff()).sum()) ** 2 * cost, NodeDensity.from_spread(edges, single, pair)))
    winner = min(range(len(scored)), key=lambda i: scored[i][0])
    return Fitted(references[winner], scored[winner][1], torch.empty(2, 0, dtype=torch.float64, device="cpu"))


def calibrate(network: Network, samples: Samples, fitted: Fitted, plan: PilotPlan) -> Fitted:
    """Measure how much smaller the variance of low-discrepancy noise is than its successive differences say."""
    table, chunks, truth = [], plan.chunks(fitted.reference), None
    for nfe in sorted(CALIBRATION_NFE, reverse=True):
        rule = make_rule(fitted.nodes, nfe, network.schedule)
        sums, variances = [], []
        for replicate in range(REPLICATES):
            draws = Draws(rule, "sobol", plan.seed, 1 + replicate)
            parts = [f for _, f in evaluate(network, samples, draws, fitted.reference, chunks)]
            sums.append(torch.cat([draw_sum(f, rule) for f in parts]))
            variances.append(torch.cat([draw_variance(f, rule) for f in parts]))
            plan.step(f"calibration at {nfe}", len(samples) * rule.nfe)
        sums, stderr = torch.stack(sums), torch.stack(variances).sqrt().clamp(min=1e-12)
        # The mean of the largest estimates is the truth for the smaller ones, and costs itself a degree of freedom.
        own_mean = (REPLICATES / (REPLICATES - 1)) ** 0.5 if truth is None else 1.0
        truth = sums.mean(0) if truth is None else truth
        # A quantile rather than the mean square: with heavy tails it is what makes intervals cover. The 96 % point for
        # 95 % intervals, since its own error, a percent from so few samples, should fall to the wide side.
        z = own_mean * torch.quantile((sums - truth).abs() / stderr, 0.96)
        table.append((math.log2(nfe), 2 * math.log(max(float(z), 1e-2) / NORMAL_95)))
    table.reverse()
    return Fitted(fitted.reference, fitted.nodes, _smooth(torch.tensor(table, dtype=torch.float64, device="cpu").T))


def _smooth(table: Tensor) -> Tensor:
    """Replace the log ratios by their parabola in log2 nfe, which has half of the six measurements' noise."""
    at, log_ratio = table
    powers = torch.stack([torch.ones_like(at), at, at**2], 1)
    return torch.stack([at, powers @ torch.linalg.lstsq(powers, log_ratio[:, None]).solution[:, 0]])


def variance_ratio(calibration: Tensor, nfe: int) -> float:
    """Return the calibrated ratio at nfe: linear in the logarithms, constant beyond the ends; 1 without calibration."""
    if calibration.numel() == 0:
        return 1.0
    at, log_ratio = calibration.cpu()
    u = torch.tensor(float(nfe), dtype=torch.float64, device="cpu").log2().clamp(at[0], at[-1])
    k = int((torch.searchsorted(at, u, right=True) - 1).clamp(0, len(at) - 2))
    part = (u - at[k]) / (at[k + 1] - at[k])
    return float((log_ratio[k] + part * (log_ratio[k + 1] - log_ratio[k])).exp())


def _pilot_rule(network: Network, bins: int, draws: int) -> Rule:
    lo, hi = network.schedule.log_snr_range
    n = bins * draws
    log_snr = lo + (hi - lo) * (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n
    time = network.schedule.time(log_snr)
    log_snr = network.schedule.log_snr(time)  # a table answers at its nearest entry
    width = torch.full_like(log_snr, (hi - lo) / n)
    return Rule(log_snr, time, width, width, torch.ones(n, dtype=torch.bool, device="cpu"))


def _network_flops(network: Network, samples: Samples) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which importing fastscore must not

    one = samples.select(slice(0, 1))
    rows = Rows.of(network, Draws(_pilot_rule(network, 1, 1), "independent", 0), range(1), one.x)
    with FlopCounterMode(display=False) as counter:
        row_terms(network, one, noise.sample_keys("independent", 0, one.index, one.x.shape[1]), rows, ())
    return max(1, counter.get_total_flops() // 2)
