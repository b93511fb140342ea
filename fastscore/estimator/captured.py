r"""One CUDA graph for a whole estimate of a fixed shape: a training loop's many small launches become one.

Noise, tables, network, control variate and sum are captured once; a call copies new data (and, for a new seed, new
noise words) into the buffers that the graph reads, and replays it. Parameters are read where they lie, so an optimizer
step between two calls counts; what `fit` learned is fixed at capture.

    >>> captured = CapturedDensity(density, x, nfe=256)
    >>> log_prob, stderr = captured(x)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..process.conditions import takes_conditions
from ..support.host import seed_of
from ..support.modes import ordinary
from ..support.untouched import undisturbed
from .estimator import Estimator
from .network_density import network_of
from .plan import Plan
from .planner import Wanted
from .protocol import Density, check_density
from .replay import Replay, depends_on
from .samples import Samples, deferred
from .schedule_ends import ScheduleEnds


class CapturedEstimate(NamedTuple):
    """Log-densities (nats) and their standard errors, each of shape (B,), in the dtype of the sums."""

    log_prob: Tensor
    stderr: Tensor

    def __repr__(self) -> str:
        mean, own = (float(each.double().mean()) for each in self)
        return f"CapturedEstimate({len(self.log_prob)} samples, log_prob {mean:.4g} nats, stderr {own:.2g} per sample)"


class CapturedDensity:
    """`estimate` of a density with method "density" for one shape of data, without gradients.

    Arguments:
        density: the density to capture; on a CPU every call computes afresh, with the same answer.
        x: data of the shape to come, (B, *shape).
        nfe, seed, sample_index, mask, memory, cond, named: as in `ScoreDensity.estimate`; mask and conditions are fixed
            at capture.

    Raises:
        TypeError: if the density is none.
        ValueError: as `ScoreDensity.estimate`; NaN or inf is reported without the place where it arose, which only
            `estimate` finds.
    """

    @takes_conditions
    @ordinary
    @torch.no_grad()
    def __init__(
        self,
        density: Density,
        x: Tensor,
        *,
        nfe: int | None = None,
        seed: int = 0,
        sample_index: Tensor | None = None,
        mask: Tensor | None = None,
        memory: int | str | None = None,
        cond: dict[str, Any] | None = None,
        **named: Any,
    ) -> None:
        z, _ = check_density(density).to_network(x, mask)
        own_mask, cond = density.network_arguments(x, mask, cond)
        self.density, self.core, self.shape, self.mask = density, density.core, x.shape, mask
        core = self.core
        samples = core.check(z, sample_index, cond, mask=own_mask)
        self.samples = replace(samples, conds=tuple(each.copy() for each in samples.conds))  # as they are now
        self.wanted = core.wanted(nfe, seed, self.samples, memory)
        self.reference, self.nodes = core.reference, core.nodes
        self._ends = ScheduleEnds(core.schedule, self.nodes)
        self._depends_on, self.replay = None, None
        with undisturbed(core.model):
            self._capture(self.samples, self.wanted)

    @ordinary
    @torch.no_grad()
    def __call__(self, x: Tensor, seed: int | None = None) -> CapturedEstimate:
        """Return (log_prob, stderr) in nats, each (B,), for data of the captured shape, in the dtype of the sums."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"x must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.shape != self.shape:
            raise ValueError(
                f"this graph takes x of shape {tuple(self.shape)}, got {tuple(x.shape)}; capture another for another "
                "shape"
            )
        z, log_det = self.density.to_network(x, self.mask)
        samples = replace(self.samples, x=z.reshape(len(z), -1).to(self.samples.x))
        wanted = self.wanted  # another thread may go on to another seed meanwhile
        if seed is not None:
            self.wanted = wanted = wanted._replace(seed=seed_of(seed))
        with undisturbed(self.core.model):
            replay, plan = self._capture(samples, wanted)
            _, numbers = replay(samples, plan)
        log_prob, stderr = numbers.told
        if not deferred(samples.device) and not bool(torch.isfinite(log_prob).all()):
            raise ValueError("the network returned NaN or inf; `estimate` on the same data names sample and log-SNR")
        return CapturedEstimate((log_prob.double() - log_det.to(samples.device)).to(log_prob.dtype), stderr)

    def _capture(self, samples: Samples, wanted: Wanted) -> tuple[Replay, Plan]:
        """Return the replay and the plan of a call.

        A network that reads other memory, or was traced anew, is captured again.
        """
        core = self.core
        self.nodes = self._ends.follow(core.schedule, self.nodes)
        network = replace(network_of(core), log_snr_range=self.nodes.log_snr_range)
        programs = network.find_programs(samples)
        plan = core.planner.plan(network, self.nodes, self.reference, samples, programs, wanted)
        estimator = Estimator(network, self.reference, self.nodes, programs, wanted.method)
        needs = depends_on(estimator, samples, plan)
        if needs != self._depends_on:
            self.replay, self._depends_on = Replay(estimator, samples, plan), needs
        return self.replay, plan
