r"""The right-hand side of the probability-flow ODE on the straight path, less the reference's own.

On y = (1 - t) x / s + t eps, with s the scale of the data, so that half of the path lies where noise and data are
alike, the network has the velocity v = (eps_hat - y) / (1 - t), the reference
v_q = (eps_q - y) / (1 - t) with the score -eps_q / t, and log(p / q) changes along the network's path by

.. math:: \nabla\cdot(v - v_q) + (v - v_q)\cdot\nabla\log q_t(y)
    = \frac{\nabla\cdot(\hat\epsilon - \epsilon_q) - (\hat\epsilon - \epsilon_q)\cdot\epsilon_q / t}{1 - t}

With a mask the path is that of the entries that count, and the others stand still where x has them: y = x there, with
the velocity zero, so that traces and products are those of the part that moves.

References:
    FFJORD (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from ..density import ScoreDensity
from ..estimator.samples import Samples
from ..ops import noise
from ..process.masks import inside
from ..process.network import predict
from ..process.predictions import eps_from
from ..reference.levels import Level
from ..support.autocast import own_dtypes
from ..support.host import seed_of

TABLES = 1 << 22  # numbers that the tables of some times take together, at most
COLUMNS = 32  # backward passes in one call; it bounds their memory
FEW_DIM = 13  # where probes are drawn without repetition; beyond, two of sixteen agree in one of 68 samples at most
dot = own_dtypes(torch.linalg.vecdot)


class Time(NamedTuple):
    """What the field needs to know of a time t of the path: the numbers that it decides, and more.

    x_t = scale y, and v = c_f output + c_y y. `own` is the schedule's own time, `level` what the reference is there.
    """

    t: float
    scale: float
    c_f: float
    c_y: float
    own: Tensor
    level: Level


class Field:
    """Velocity, and the rate of log(p / q) along it; `nfe` counts the network's calls.

    Arguments:
        density: network, schedule and reference.
        samples: whose conditions the network sees.
        signs: Rademacher probes, shape (probes, B, d), or None for the exact trace.
        ends: the smallest and the largest t.
        scale: s, the standard deviation of the data.
    """

    def __init__(
        self,
        density: ScoreDensity,
        samples: Samples,
        signs: Tensor | None,
        ends: tuple[float, float],
        scale: float,
    ) -> None:
        self.density, self.samples, self.ends, self.scale, self.nfe = density, samples, ends, scale, 0
        self.learned = learned(density, samples)
        self.reference = density.reference.scaled(1 / scale).tensors()
        self.exact = signs is None
        self.whole = self.exact and samples.x.shape[1] <= COLUMNS  # Jacobians, at the ends of the path
        self.cotangents = signs
        if signs is None:
            d = samples.x.shape[1]
            self.cotangents = torch.eye(d, dtype=samples.x.dtype, device=samples.device)[:, None]

    def __call__(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.at(next(self.times(t[None])), state[0])

    def times(self, t: Tensor) -> Iterator[Time]:
        """Yield what is known of times t (T,) in their order, some evaluated at once (`TABLES` bounds their memory)."""
        x, mask = self.samples.x, self.samples.mask
        numbers, own = numbers_of(self.density, self.scale, self.ends, t)
        here = torch.stack([numbers[:, 0], own.double()]).to(x.device)
        size = max(1, TABLES // (4 * x.shape[1] * len(self.reference[0]) * (1 if mask is None else len(x))))
        for start in range(0, len(numbers), size):
            rows, (there, own) = numbers[start : start + size].tolist(), here[:, start : start + size]
            sigmas = [row[0] for row in rows]
            levels = Level.each(self.reference, 1 - there, there, sigmas, x.shape[1], x.dtype, mask)
            yield from (Time(*row, *of_row) for row, of_row in zip(rows, zip(own.split(1), levels)))

    def at(self, time: Time, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, d) and the rate of log(p / q) (B, columns), differentiable.

        What the backward pass needs is evaluated again, so nothing but y is kept.
        """
        return _Rate.apply(self, time, y, *self.learned) if torch.is_grad_enabled() else self.rate(time, y)

    def velocity(self, time: Time, y: Tensor) -> Tensor:
        """Return the velocity alone, (B, d)."""
        return self._velocity(time, self._output(time, self._x_t(time, y)), y)

    def _x_t(self, time: Time, y: Tensor) -> Tensor:
        x_t, mask = time.scale * y, self.samples.mask
        return (x_t if mask is None else torch.where(mask, x_t, y))[:, None]

    def _output(self, time: Time, x_t: Tensor) -> Tensor:
        """Return what the network answers for x_t, both (B, 1, d)."""
        self.nfe += 1
        density, samples = self.density, self.samples
        return predict(density.model, x_t, time.own, samples.conds[0], samples.shape, density.time_dtype)

    def _velocity(self, time: Time, output: Tensor, y: Tensor) -> Tensor:
        return inside(torch.add(time.c_f * output[:, 0], y, alpha=time.c_y), self.samples.mask)

    def _with_jacobian(self, time: Time, y: Tensor) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
        """Return the velocity without a graph, and rows of the network's Jacobian by x_t, some at a time, (n, B, d).

        The derivative ends at x_t, since what leads from there to the velocity is two numbers: backward passes through
        these took a third of the time of a small network in 64 dimensions.
        """
        with torch.enable_grad():
            x_t = self._x_t(time, y.detach()).requires_grad_()
            output = self._output(time, x_t)

        def rows() -> Iterator[tuple[slice, Tensor]]:
            first = 0
            for v in self.cotangents.split(COLUMNS):
                some = slice(first, first + len(v))
                yield some, vjp(output, x_t, v[:, :, None].expand(-1, *x_t.shape), create_graph=False)[:, :, 0]
                first = some.stop

        return self._velocity(time, output.detach(), y), rows()

    def velocity_and_trace(self, time: Time, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, d) and the exact trace of its Jacobian (B,), without a graph."""
        velocity, rows = self._with_jacobian(time, y)
        each = [torch.diagonal(found[..., some], dim1=0, dim2=2) for some, found in rows]
        return velocity, inside(time.c_f * time.scale * torch.cat(each, 1) + time.c_y, self.samples.mask).sum(1)

    def noise_and_jacobian(self, time: Time, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the velocity, the noise seen, and its Jacobian, entry (j, i) by y_i, (B, i, j), without a graph."""
        mask, rest = self.samples.mask, 1 - time.t
        velocity, rows = self._with_jacobian(time, y)
        own = rest * time.c_f * time.scale * torch.cat([found for _, found in rows]).permute(1, 2, 0)
        torch.diagonal(own, dim1=1, dim2=2).add_(1 + rest * time.c_y)
        if mask is not None:
            own = torch.where(mask[:, :, None] & mask[:, None], own, 0)
        return velocity, torch.add(inside(y, mask), velocity, alpha=rest), own

    def rate(self, time: Time, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `at` does, without a graph."""
        if self.exact:
            velocity, trace = self.velocity_and_trace(time, y)
            _, rest = self._gap_and_rest(time, velocity, y)
            return velocity, (rest + trace)[:, None]
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            velocity, traced, rest = self.terms(time, y)
        parts = [part for _, part in self.traces(traced, y)]
        return velocity.detach(), rest.detach()[:, None] + torch.cat(parts, 1)

    def terms(self, time: Time, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the velocity (B, d), what to take the trace of (B, d), and the rate without that trace (B,)."""
        velocity = self.velocity(time, y)
        gap, rest = self._gap_and_rest(time, velocity, y)
        return velocity, velocity if self.exact else gap, rest

    def _gap_and_rest(self, time: Time, velocity: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity less the reference's (B, d), and the rate without the trace (B,)."""
        mask = self.samples.mask
        eps_q, divergence_q = time.level.eps_and_divergence(y, mask)
        gap = velocity - inside(eps_q - y, mask) / (1 - time.t)
        rest = -dot(gap, eps_q) / time.t
        # Probes see both Jacobians, so that they differ by the mismatch alone; the exact trace of q's is known.
        return gap, rest if not self.exact else rest - (divergence_q - self.samples.dims) / (1 - time.t)

    def traces(self, field: Tensor, y: Tensor, create_graph: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Yield parts of the trace, each with the columns that it adds to: all, or some probes' own estimates of it."""
        first = 0
        for v in self.cotangents.split(COLUMNS):
            found, last = vjp(field, y, v.expand(-1, *y.shape), create_graph), first + len(v)
            if self.exact:  # of row i of the Jacobian, element i
                yield slice(0, 1), torch.diagonal(found[..., first:last], dim1=0, dim2=2).sum(1, keepdim=True)
            else:
                yield slice(first, last), dot(inside(found, self.samples.mask), v).T
            first = last


def numbers_of(density: ScoreDensity, scale: float, ends: tuple[float, float], t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of `Time` at times t of the path, (T, 4), and the schedule's own times, (T,), on the host."""
    t = t.detach().double().cpu().clamp(*ends)  # rounding must not carry the network past its range
    schedule = density.schedule
    time = schedule.time(log_snr_of(t, scale))
    c_f, c_x = eps_from(density.predicts, schedule, time)
    here = scale * schedule.alpha_sigma(time)[0] / (1 - t)
    return torch.stack([t, here, c_f / (1 - t), (c_x * here - 1) / (1 - t)], 1), time


class _Rate(torch.autograd.Function):
    """`Field.at`: a trace and its gradient, one part of the columns after the other."""

    @staticmethod
    def forward(ctx: Any, field: Field, time: Time, y: Tensor, *learned: Tensor) -> tuple[Tensor, Tensor]:
        ctx.field, ctx.time = field, time
        ctx.save_for_backward(y, *learned)
        return field.rate(time, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_velocity: Tensor, grad_rate: Tensor) -> tuple[Tensor | None, ...]:
        y, *_ = ctx.saved_tensors  # raises where a weight has changed since
        field = ctx.field
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            inputs = y, *field.learned
            velocity, traced, rest = field.terms(ctx.time, y)
            found = _grad((grad_velocity * velocity).sum() + (grad_rate.sum(1) * rest).sum(), inputs)
            for columns, part in field.traces(traced, y, create_graph=True):
                if part.requires_grad:  # not where the field is linear
                    more = _grad((grad_rate[:, columns] * part).sum(), inputs)
                    found = [a + b for a, b in zip(found, more)]
        return None, None, *found


def learned(density: ScoreDensity, samples: Samples) -> list[Tensor]:
    """Return the tensors beside x that a gradient may reach: the network's parameters, and conditions."""
    (cond,) = samples.conds
    tensors = [*density.model.parameters(), *tree_leaves((cond.per_sample, cond.shared))]
    return [value for value in tensors if isinstance(value, Tensor) and value.requires_grad]


def _grad(value: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    return list(torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True))


def log_snr_of(t: Tensor, scale: float) -> Tensor:
    """Return the log-SNR at a time of the path."""
    return -2 * (torch.logit(t) + math.log(scale))


def time_of(log_snr: Tensor, scale: float) -> Tensor:
    """Return the time of the path at a log-SNR: the inverse of `log_snr_of`."""
    return torch.sigmoid(-0.5 * log_snr - math.log(scale))


def kinds(d: int) -> int:
    """Return how many probes in d dimensions differ by more than the sign of all; where they may repeat, no bound."""
    return 1 << (d - 1) if d <= FEW_DIM else sys.maxsize


def rademacher(samples: Samples, seed: int, probes: int) -> Tensor:
    """Return signs of shape (probes, B, d), keyed by sample as all noise is.

    In few dimensions no two of a sample's probes are the same, or the same but for the sign of all: equal ones would
    say nothing new, and agree as if there were no error.
    """
    d, seed = samples.x.shape[1], seed_of(seed)
    if d <= FEW_DIM:
        place = torch.randperm(kinds(d), generator=torch.Generator().manual_seed(seed % 2**64), device="cpu")[:probes]
        flips = 1 - 2 * (place[:, None] >> torch.arange(d, device="cpu") & 1)  # the last one never
        w = noise.words(seed, samples.index.to(samples.device), 0, noise.STREAM_PROBE, d)
        return torch.where(w < 0, -1.0, 1.0).to(samples.x) * flips[:, None].to(samples.x)
    drawn = [noise.words(seed, samples.index.to(samples.device), p, noise.STREAM_PROBE, d) for p in range(probes)]
    return torch.stack([torch.where(w < 0, -1.0, 1.0) for w in drawn]).to(samples.x)


def vjp(field: Tensor, y: Tensor, cotangents: Tensor, create_graph: bool) -> Tensor:
    """Return the products of cotangents (n, B, d) with the Jacobian, (n, B, d), in one pass where vmap can."""
    if not field.requires_grad:  # of a network whose answer is a constant
        return torch.zeros_like(cotangents)
    options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
    try:
        found = torch.autograd.grad(field, y, cotangents, is_grads_batched=True, **options)[0]
    except RuntimeError:  # a network with an operation that vmap cannot batch
        each = [torch.autograd.grad(field, y, v, **options)[0] for v in cotangents]
        found = None if each[0] is None else torch.stack(each)
    return torch.zeros_like(cotangents) if found is None else found  # the field may not depend on y
