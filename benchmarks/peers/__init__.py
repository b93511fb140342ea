"""The methods of the race, one file a library; each has `methods(problem)`, what can run on that problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class Outcome(NamedTuple):
    """Log-densities (nats, (B,)) and the network passes that they took, a sample."""

    log_prob: Tensor
    forward: float
    backward: float = 0.0


class Method(NamedTuple):
    """One way to a log-density, and the efforts to try, cheapest first.

    Attributes:
        name: as the table says it.
        run: of (x, effort, seed).
        ladder: efforts.
        fit: seconds spent on data beforehand.
        random: whether the answer depends on the seed.
    """

    name: str
    run: Callable[[Tensor, object, int], Outcome]
    ladder: Sequence[object]
    fit: float = 0.0
    random: bool = True


TOLERANCES = tuple(10.0**-k for k in (1, 2, 3, 4, 5, 6))
STEPS = (4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96, 128)  # of a fixed grid
PROBES = tuple(4**k for k in range(7))  # of Hutchinson's estimator
PROBE_TOLERANCE = 1e-3  # of a solver whose error is that of the probes: 1e-5 is twice the evaluations for the same


def counted(network, x: Tensor, run: Callable[[], Tensor], vectors: int = 1) -> Outcome:
    """Run once and read the passes that the network counted.

    `vectors` is how many cotangents a backward pass carries where the library batches them with vmap, unseen by hooks.
    """
    network.passes.forward = network.passes.backward = 0
    log_prob = run()
    passes, count = network.passes, len(x)
    return Outcome(log_prob.detach(), passes.forward / count, vectors * passes.backward / count)


def normal_log_prob(x: Tensor) -> Tensor:
    """Return the log-density of N(0, I), shape (B,)."""
    return -0.5 * (x.square() + 1.8378770664093453).sum(1)
