"""What `fit` measures of references that are fitted to each sample's own draws: nodes, base, and whether they pay.

Samples are evaluated at evenly spread draws. How far a draw's term lies off the mean of its neighbours says how much
variance is left at its log-SNR, of the fitted reference and of the schedule's N(0, std^2), whichever leaves less. A
fitted reference may be the worse one to begin with: what it has learned of other images, the draws unlearn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    # By the mean of logarithms: of a few samples one that is far off would decide for all.
    loss = float((own / reference).log().mean().exp())
    nodes.own_pays = torch.tensor(loss < MOST_LOSS, device="cpu")
    step("control", 2 * COMPARED * DRAWS)


def _first(count: int, samples: Samples) -> Tensor:
    return torch.arange(min(count, len(samples)), device=samples.device)


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
