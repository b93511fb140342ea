"""What `fit` measures of references that are fitted to each sample's own draws: whether they leave less variance."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .control import why_reference
from .estimator import Estimator
from .methods import DENSITY
from .network_density import NetworkDensity, network_of
from .planner import Wanted
from .samples import Samples
from .self_fitted import FEWEST_DRAWS

SAMPLES = 8
EVALUATIONS = 2 * SAMPLES * FEWEST_DRAWS
# Beside the time that fitting adds, which docs/images.md lists, and what 8 samples leave open.
LEAST_GAIN = 1.25


def measure_self(
    density: NetworkDensity, samples: Samples, wanted: Wanted, left: int, step: Callable[[str, int], None]
) -> None:
    """Set `nodes.self_pays` by the variance of both controls on some samples, with as few draws as there may be.

    Where "auto" would not take it anyway, or fewer evaluations are left than it needs, nothing is measured.

    Arguments:
        samples: the fit's, of which the first are held out.
        wanted: their seed and memory.
        left: evaluations that may be spent.
        step: is told of those that were.
    """
    wanted = wanted._replace(nfe=FEWEST_DRAWS)
    if left < EVALUATIONS or why_reference(density.noise, density.nodes, samples, wanted):
        return
    some = samples.select(torch.arange(min(SAMPLES, len(samples)), device=samples.device))
    reference, own = (_variance(density, control, wanted, some) for control in ("reference", "self"))
    step("control", EVALUATIONS)
    density.nodes.self_pays = torch.tensor(own * LEAST_GAIN < reference, device="cpu")


def _variance(density: NetworkDensity, control: str, wanted: Wanted, samples: Samples) -> float:
    """Return the mean variance of log p by its draws, nats squared."""
    wanted, reference = density.controlled(control, wanted, samples)
    plan, programs = density._plan(samples, wanted, reference=reference)
    found = Estimator(network_of(density), reference, density.nodes, programs, DENSITY).evaluate(
        samples, plan, lambda count: None
    )
    return float(found.variance[1].mean())
