"""Where in log-SNR a classifier evaluates: nodes of its own, over the range that its density has when it is called."""

from __future__ import annotations

import math

from ..estimator.network_density import NetworkDensity
from ..estimator.nodes import NodeDensity
from ..estimator.rules import Rules, make_rules
from ..process.schedules import SAME_END

PILOT_BINS, PILOT_DRAWS = 24, 8


def range_of(core: NetworkDensity) -> tuple[float, float]:
    """Return the range (lowest, highest) of the log-SNR by the schedule's ends and the reference's scales of this time.

    Raises:
        ValueError: if it does not go up.
    """
    lo, hi = core.schedule.range_for(*core.reference.scales())
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise ValueError(
            f"the range of log-SNR must go up from the noisy end to the clean one, got {(lo, hi)} of "
            f"{core.schedule!r} for data of standard deviations {core.reference.scales()}; set the schedule's "
            "time_range to (least noisy, noisiest), or scale the data to the noise that the network was trained on"
        )
    return lo, hi


def nodes_over(nodes: NodeDensity, log_snr_range: tuple[float, float]) -> NodeDensity:
    """Return the nodes over another range, cut or going on as they end; even pairs where nothing of them is left.

    They are moved from where they were placed at every call, and so are as they were where a range comes back.
    """
    lo, hi = log_snr_range
    first, last = float(nodes.edges[0]), float(nodes.edges[-1])
    if max(abs(lo - first), abs(hi - last)) <= SAME_END:
        return nodes
    return NodeDensity.pairs(lo, hi) if lo >= last or hi <= first else nodes.moved_to(lo, hi)


def pilot_rules(core: NetworkDensity, log_snr_range: tuple[float, float], paired: bool, seed: int) -> Rules:
    """Return evenly spread draws for the pilot: as many pairs as single ones."""
    even = NodeDensity.pairs if paired else NodeDensity.uniform
    draws = PILOT_BINS * PILOT_DRAWS
    return make_rules(even(*log_snr_range), draws * (1 + paired), core.schedule, seed=seed)
