r"""One CUDA graph for a whole estimate of a fixed shape: a training loop's many small launches become one.

Noise, tables, network, control variate and sum are captured once; a call copies new data (and, for a new seed, new
noise words) into the buffers that the graph reads, and replays it. Parameters are read where they lie, so an optimizer
step between two calls counts; what `fit` learned is fixed at capture.

    >>> captured = CapturedDensity(density, x, nfe=256)
    >>> log_prob, stderr = captured(x)
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import noise
from ..process.conditions import takes_conditions
from ..support.modes import ordinary
from .calibration import calibrated
from .estimate import mean_in_words
from .integrand import Rows, draw_values
from .protocol import Density, check_density
from .rounds import calibration_of, with_rounding
from .rules import Rule
from .samples import Samples
from .statistics import Spread, draw_sum


class _Group(NamedTuple):
    """The samples that share their nodes, in chunks, with the rows and the rule that a graph reads where they lie."""

    number: int
    parts: tuple[tuple[Tensor, Samples], ...]  # their indices, and all of them but x
    rows: Rows
    rule: Rule

    def copy_(self, other: _Group) -> None:
        """Take over another seed's nodes and noise."""
        for name in ("points", "time", "alpha", "sigma"):
            getattr(self.rows, name).copy_(getattr(other.rows, name))
        for own, new in zip(self.rows.coefficients, other.rows.coefficients):
            own.copy_(new)
        for name in ("weight", "curve", "remainder"):
            getattr(self.rule, name).copy_(getattr(other.rule, name))


class CapturedEstimate(NamedTuple):
    """Log-densities (nats) and their standard errors, each of shape (B,), in the dtype of the sums."""

    log_prob: Tensor
    stderr: Tensor

    def __repr__(self):
        mean = mean_in_words("log_prob", self.log_prob, self.stderr)
        return f"CapturedEstimate({len(self.log_prob)} samples, {mean})"


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
        cond: dict | None = None,
        **named,
    ):
        z, _ = check_density(density).to_network(x, mask)
        own_mask, cond = density.network_arguments(x, mask, cond)
        self.density, self.core, self.shape, self.mask = density, density.core, x.shape, mask
        samples, self.draws, chunks = self.core.prepare(z, nfe, seed, sample_index, memory, cond, own_mask)
        self.samples = replace(samples, x=samples.x.clone())
        self.at_once = max(1, chunks.rows // self.draws.rules.nfe)
        self.groups = [self._group(number) for number in samples.group.unique().tolist()]
        self.keys = self._keys(seed)
        self.programs = self.core.network.find_programs(self.samples)
        self.seed, self.graph, self.result = seed, None, None
        if samples.x.is_cuda:
            self._capture()

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
        self.samples.x.copy_(z.reshape(len(z), -1))
        if seed is not None and seed != self.seed:
            self.seed = seed
            self.keys.copy_(self._keys(seed))
            self.draws = replace(self.draws, rules=self.draws.rules.renewed(seed), seed=seed)
            for group in self.groups:
                group.copy_(self._group(group.number))
        if self.graph is None:
            self.result = self._estimate()
        else:
            self.graph.replay()
        log_prob, stderr = self.result[0] - log_det.to(self.samples.device), self.result[1].clone()
        log_prob, stderr = log_prob.to(self.samples.x.dtype), stderr.to(self.samples.x.dtype)
        if not bool(torch.isfinite(log_prob).all()):
            raise ValueError("the network returned NaN or inf; `estimate` on the same data names sample and log-SNR")
        return CapturedEstimate(log_prob, stderr)

    def _keys(self, seed: int) -> Tensor:
        return noise.sample_keys(self.draws.noise, seed, self.samples.index, self.samples.x.shape[1])

    def _group(self, number: int) -> _Group:
        x, rules, span = self.samples.x, self.draws.rules, range(len(self.draws))
        rule = rules.of(number)
        points = self.draws.points(span, x.shape[1], x.device)
        rows = Rows.of(self.core.network, rule, points, span, x)
        members = (self.samples.group == number).nonzero().flatten().split(self.at_once)
        parts = tuple((m.to(x.device), self.samples.select(m.to(x.device))) for m in members)
        moved = {name: getattr(rule, name).to(x.device) for name in ("weight", "curve", "remainder")}
        return _Group(number, parts, rows, replace(rule, **moved))

    def _estimate(self) -> tuple[Tensor, Tensor]:
        density = self.core
        network, calibration = density.network, calibration_of(density.nodes, self.samples, self.draws)
        x, mask = self.samples.x, self.samples.mask
        log_prob, variance = density.reference.log_prob(x, mask), torch.empty_like(x[:, 0]).double()
        for group in self.groups:
            rows = group.rows.with_programs(network, self.programs, self.samples)
            for members, part in group.parts:
                part = replace(part, x=x[members])
                f = draw_values(network, part, self.keys[members], rows, density.reference)
                log_prob = log_prob.index_add(0, members, draw_sum(f, group.rule))
                spread = Spread.of(f, group.rule, part.dims)
                variance[members] = calibrated(spread, self.draws.rules.nfe, calibration)[0]
        return log_prob, with_rounding(variance, log_prob, self.samples, density.log_snr_range).sqrt()

    def _capture(self) -> None:
        with torch.cuda.device(self.samples.x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # compiles kernels and fills caches, which a capture must not do
                for _ in range(2):
                    self._estimate()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = self._estimate()
