r"""One CUDA graph for a whole estimate of a fixed shape: a training loop's many small launches become one.

Noise, tables, network, control variate and sum are captured once; a call copies new data (and, for a new seed, new
noise words) into the buffers that the graph reads, and replays it. Parameters are read where they lie, so an optimizer
step between two calls counts; what `fit` learned is fixed at capture.

    >>> captured = CapturedDensity(density, x, nfe=256)
    >>> log_prob, stderr = captured(x)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import noise
from .density import ScoreDensity
from .estimate import draw_sum, draw_variance
from .integrand import Rows, draw_values
from .pilot import variance_ratio


class CapturedDensity:
    """`ScoreDensity.estimate` with method "density" for one shape of data, without gradients.

    Arguments:
        density: the density to capture; on a CPU every call computes afresh, with the same answer.
        x: data of the shape to come, (B, *shape).
        nfe, seed, sample_index, memory, cond: as in `ScoreDensity.estimate`; conditions are fixed at capture.

    Raises:
        ValueError: as `ScoreDensity.estimate`; NaN or inf is reported without the place where it arose, which only
            `estimate` finds.
    """

    @torch.no_grad()
    def __init__(
        self,
        density: ScoreDensity,
        x: Tensor,
        *,
        nfe: int | None = None,
        seed: int = 0,
        sample_index: Tensor | None = None,
        memory: int | str | None = None,
        **cond,
    ):
        if not isinstance(density, ScoreDensity):
            raise TypeError(f"density must be a ScoreDensity, got {type(density).__name__}; wrap the network in one")
        self.density = density
        samples, draws, chunks = density.prepare(x, nfe, seed, sample_index, memory, cond)
        self.samples, self.draws = replace(samples, x=samples.x.clone()), draws
        self.rows = Rows.of(density.network, draws, range(len(draws)), samples.x)
        # Once, here: to look for them again would carry times to the device, which a capture refuses.
        self.programs = density.network.find_programs(self.samples)
        self.rule = replace(draws.rule, weight=draws.rule.weight.to(samples.x.device))
        calibrated = draws.noise == "sobol"
        self.ratio = variance_ratio(density.nodes.host("calibration"), draws.rule.nfe) if calibrated else 1.0
        self.keys = self._keys(seed)
        self.at_once = max(1, chunks.rows // max(1, draws.rule.nfe))
        self.seed, self.graph, self.result = seed, None, None
        if samples.x.is_cuda:
            self._capture()

    @torch.no_grad()
    def __call__(self, x: Tensor, seed: int | None = None) -> tuple[Tensor, Tensor]:
        """Return (log_prob, stderr) in nats, each (B,), for data of the captured shape, in the dtype of the sums."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ValueError(f"x must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.shape[1:] != self.samples.shape or len(x) != len(self.samples):
            raise ValueError(
                f"this graph takes x of shape {(len(self.samples), *self.samples.shape)}, got {tuple(x.shape)}; "
                "capture another for another shape"
            )
        self.samples.x.copy_(x.reshape(len(x), -1))
        if seed is not None and seed != self.seed:
            self.seed = seed
            self.keys.copy_(self._keys(seed))
            self.rows.points.copy_(self._points(seed))
        if self.graph is None:
            self.result = self._estimate()
        else:
            self.graph.replay()
        log_prob, stderr = (v.to(self.samples.x.dtype, copy=True) for v in self.result)
        if not bool(torch.isfinite(log_prob).all()):
            raise ValueError("the network returned NaN or inf; `estimate` on the same data names sample and log-SNR")
        return log_prob, stderr

    def _keys(self, seed: int) -> Tensor:
        return noise.sample_keys(self.draws.noise, seed, self.samples.index, self.samples.x.shape[1])

    def _points(self, seed: int) -> Tensor:
        d, device = self.samples.x.shape[1], self.samples.x.device
        points = noise.points(self.draws.noise, seed, range(len(self.draws)), len(self.draws), d, device)
        return points[self.rows.draw]

    def _estimate(self) -> tuple[Tensor, Tensor]:
        density, samples = self.density, self.samples
        network, parts = density.network, []
        rows = self.rows.with_programs(network, self.programs, samples)
        for start in range(0, len(samples), self.at_once):
            chosen = slice(start, start + self.at_once)
            parts.append(draw_values(network, samples.select(chosen), self.keys[chosen], rows, density.reference))
        f = torch.cat(parts)
        log_prob = density.reference.log_prob(samples.x) + draw_sum(f, self.rule)
        return log_prob, (self.ratio * draw_variance(f, self.rule)).sqrt()

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
