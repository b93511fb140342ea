"""What `fit` measures of references that are fitted to each sample's own draws: nodes, base, and whether they pay.

Samples are evaluated at evenly spread draws. How far a draw's term lies off the mean of its neighbours says how much
variance is left at its log-SNR, of the fitted reference and of the schedule's N(0, std^2), whichever leaves less. A
fitted reference may be the worse one to begin with: what it has learned of other images, the draws unlearn. Estimates
are told by it all the same: beyond the range of log-SNR, in which the network is asked, it stands for the network.

A mixture knows where a network like itself decides between components. One component, which is what a sample picks to
begin with, does not, and terms that the decision makes are large, and may be so rare that few samples show any. How
much these add is measured where it costs no evaluation of the network: on the mixture's own density, whose estimates
are made for many samples and seeds. It counts in the choice, and in the bars of single samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..process.schedules import Schedule
from ..reference.gaussians import Reference
from .control import why_not_tried
from .estimator import Estimator
from .methods import DENSITY
from .network_density import NetworkDensity, network_of
from .nodes import NodeDensity
from .planner import Wanted
from .samples import Samples
from .statistics import bends

Step = Callable[[str, int], None]

BINS, SAMPLES, DRAWS = 32, 16, 128
COMPARED = 8  # samples, whose stated variances by both controls are compared
EVALUATIONS = 2 * (SAMPLES + COMPARED) * DRAWS
LARGE = 8  # times these evaluations has a fit that leaves them
# Samples and seeds on the mixture's own density; four samples at least, and of all no more numbers than these.
DECIDING, NUMBERS, SEEDS = 32, 100_000, 8
# A reference is nearer to the data that it was fitted to than to others, and a few samples leave that much open.
MOST_LOSS = 1.25


def evaluations_of_own(noise: str, samples: Samples, wanted: Wanted, evaluations: int) -> int:
    """Return how many of a fit's evaluations to leave to `pilot_of_own`, all of which a calibration may take else."""
    if evaluations < LARGE * EVALUATIONS or why_not_tried(noise, samples, wanted._replace(nfe=DRAWS)):
        return 0
    return EVALUATIONS


def pilot_of_own(density: NetworkDensity, samples: Samples, wanted: Wanted, left: int, step: Step) -> None:
    """Set the nodes, the base and whether it pays (`FittedNodes`) by what is left of some samples' variance.

    Where "auto" would not take it anyway, or fewer evaluations are left than that needs, nothing is measured.

    Arguments:
        samples: the fit's, of which the first are held out.
        wanted: their seed and memory.
        left: evaluations that may be spent.
        step: is told of those that were.
    """
    wanted = wanted._replace(nfe=DRAWS)
    if left < EVALUATIONS or why_not_tried(density.noise, samples, wanted):
        return
    nodes, (lo, hi) = density.nodes, density.log_snr_range
    even = NodeDensity.uniform(lo, hi, BINS)
    nodes.own_share = even.share
    found = []
    for base in (True, False):
        nodes.own_base = torch.tensor(base, device="cpu")
        deviation = _deviation(density, samples.select(_first(SAMPLES, samples)), wanted, even.edges)
        found.append((float(deviation @ even.edges.diff()), base, deviation))
        step("control", SAMPLES * DRAWS)
    _, base, deviation = min(found)
    best = NodeDensity.from_spread(even.edges, deviation, torch.full_like(deviation, torch.inf))
    # Half of them go everywhere alike: where draws are few they are also too few to fit to.
    nodes.own_base, nodes.own_share = torch.tensor(base, device="cpu"), best.half_uniform().share
    some = samples.select(_first(COMPARED, samples))
    reference, own = (_variance(density, control, some, wanted) for control in ("reference", "self"))
    many = samples.select(_first(min(DECIDING, max(4, NUMBERS // samples.x.shape[1])), samples))
    missed = _missed(density, many, wanted)
    nodes.own_missed, own = torch.tensor(DRAWS * missed, dtype=torch.float64, device="cpu"), own + missed
    # By the mean of logarithms: of a few samples one that is far off would decide for all.
    loss = float((own / reference).log().mean().exp())
    nodes.own_pays = torch.tensor(loss < MOST_LOSS, device="cpu")
    step("control", 2 * COMPARED * DRAWS)


def _first(count: int, samples: Samples) -> Tensor:
    return torch.arange(min(count, len(samples)), device=samples.device)


class _OfReference(nn.Module):
    """The exact noise prediction of a reference's own density."""

    def __init__(self, reference: Reference, schedule: Schedule) -> None:
        super().__init__()
        self.reference, self.schedule = reference, schedule

    def forward(self, x_t: Tensor, t: Tensor, **cond: object) -> Tensor:
        alpha, sigma = (v.to(x_t.device) for v in self.schedule.alpha_sigma(t))
        return self.reference.eps(x_t.flatten(1)[None], alpha, sigma)[0].reshape(x_t.shape)


def _missed(density: NetworkDensity, samples: Samples, wanted: Wanted) -> float:
    """Return what rare terms add to the variance of log p by draws on the reference's own density, nats squared.

    That is by how much a sample's mean variance over seeds lies above what is typical of its seeds, averaged over
    samples. Of even noise the two are the same but for a share of about the draws' number.
    """
    reference = density.reference.on(samples.device)
    if reference.components == 1:
        return 0.0
    model = _OfReference(reference, density.schedule)
    network = replace(network_of(density), model=model, predicts="eps", programs=None, compiled=None, time_dtype=None)
    found = []
    for seed in range(wanted.seed, wanted.seed + SEEDS):
        own, base = density._controlled("self", wanted._replace(seed=seed), samples)
        plan = density.planner.plan(network, density.nodes, base, samples, (None,), own)
        estimator = Estimator(network, base, density.nodes, (None,), DENSITY)
        found.append(estimator.evaluate(samples, plan, lambda count: None).variance[1])
    variance = torch.stack(found)
    return float((variance.mean(0) - variance.log().mean(0).exp()).mean())


def _deviation(density: NetworkDensity, samples: Samples, wanted: Wanted, edges: Tensor) -> Tensor:
    """Return the standard deviation of f in each bin, averaged over samples as variances are, float64, (BINS,)."""
    wanted, reference = density._controlled("self", wanted, samples)
    plan, programs = density._plan(samples, wanted, reference=reference)
    total, count = torch.zeros(2, BINS, dtype=torch.float64, device="cpu")
    for part in plan.run(samples, programs, reference):
        square = bends(part.block(part.f).double()).square().cpu() / 1.5  # a bend has 1 + 2/4 times a term's variance
        at = part.rule.log_snr.cpu()[..., 1:-1].expand_as(square).flatten()
        k = (torch.searchsorted(edges, at, right=True) - 1).clamp(0, BINS - 1)
        total.index_add_(0, k, square.flatten())
        count.index_add_(0, k, torch.ones_like(at))
    return (total / count.clamp(min=1)).sqrt()


def _variance(density: NetworkDensity, control: str, samples: Samples, wanted: Wanted) -> Tensor:
    """Return the variance of log p by its draws of each sample, nats squared."""
    wanted, reference = density._controlled(control, wanted, samples)
    plan, programs = density._plan(samples, wanted, reference=reference)
    estimator = Estimator(network_of(density), reference, density.nodes, programs, DENSITY)
    return estimator.evaluate(samples, plan, lambda count: None).variance[1]
