r"""The right-hand side of the probability-flow ODE on the straight path, less the reference's own.

On y = (1 - t) x / s + t eps, with s the scale of the data, so that half of the path lies where noise and data are
alike, the network has the velocity v = (eps_hat - y) / (1 - t), the reference
v_q = (eps_q - y) / (1 - t) with the score -eps_q / t, and log(p / q) changes along the network's path by

.. math:: \nabla\cdot(v - v_q) + (v - v_q)\cdot\nabla\log q_t(y)
    = \frac{\nabla\cdot(\hat\epsilon - \epsilon_q) - (\hat\epsilon - \epsilon_q)\cdot\epsilon_q / t}{1 - t}

References:
    FFJORD (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import noise
from .density import ScoreDensity
from .network import predict
from .predictions import eps_from
from .samples import Samples
from .untouched import uncompiled

COLUMNS = 32  # backward passes in one call; it bounds their memory


class Time(NamedTuple):
    """What the field needs to know of a time t of the path: its schedule's own, and numbers that it decides.

    x_t = scale y, and v = c_f output + c_y y.
    """

    t: float
    own: Tensor
    scale: float
    c_f: float
    c_y: float


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
    ):
        self.density, self.samples, self.ends, self.scale, self.nfe = density, samples, ends, scale, 0
        self.reference = density.reference.scaled(1 / scale)
        self.exact = signs is None
        self.cotangents = signs
        if signs is None:
            d = samples.x.shape[1]
            self.cotangents = torch.eye(d, dtype=samples.x.dtype, device=samples.device)[:, None]

    def __call__(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.at(self.table(t[None])[0], state[0])

    def table(self, t: Tensor) -> list[Time]:
        """Return the times of a grid, all evaluated at once."""
        t = t.detach().double().cpu().clamp(*self.ends)  # rounding must not carry the network past its range
        schedule = self.density.schedule
        time = schedule.time(log_snr_of(t, self.scale))
        c_f, c_x = eps_from(self.density.predicts, schedule, time)
        scale = self.scale * schedule.alpha_sigma(time)[0] / (1 - t)
        rows = torch.stack([scale, c_f / (1 - t), (c_x * scale - 1) / (1 - t)], 1).tolist()
        return [Time(at, own, *row) for at, own, row in zip(t.tolist(), time.to(self.samples.x.device).split(1), rows)]

    def at(self, time: Time, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the velocity (B, d) and the rate of log(p / q) (B, columns)."""
        with torch.enable_grad(), uncompiled():
            y = y.detach().requires_grad_()
            velocity = self.velocity(time, y)
            # Probes see both Jacobians, so that they differ by the mismatch alone; the exact trace of q's is known.
            at = y.detach() if self.exact else y
            eps_q, divergence_q = self.reference.eps_and_divergence(at, 1 - time.t, time.t)
            gap = velocity - (eps_q - at) / (1 - time.t)
        divergence = self._divergence(gap, y)
        if self.exact:
            divergence = divergence - ((divergence_q - y.shape[1]) / (1 - time.t))[:, None]
        along = torch.linalg.vecdot(gap.detach(), eps_q.detach()) / time.t
        return velocity.detach(), divergence - along[:, None]

    def velocity(self, time: Time, y: Tensor) -> Tensor:
        """Return the velocity alone, (B, d)."""
        self.nfe += 1
        density, samples = self.density, self.samples
        x_t = (time.scale * y)[:, None]
        output = predict(density.model, x_t, time.own, samples.conds[0], samples.shape, density.time_dtype)
        return torch.add(time.c_f * output[:, 0], y, alpha=time.c_y)

    def _divergence(self, velocity: Tensor, y: Tensor) -> Tensor:
        """Return the trace, (B, 1), or each probe's estimate of it, (B, probes): many cotangents a backward pass."""
        products, first = [], 0
        for v in self.cotangents.split(COLUMNS):
            found = _vjp(velocity, y, v.expand(-1, *y.shape))
            if self.exact:  # of row i of the Jacobian, element i
                found = torch.diagonal(found[..., first : first + len(v)], dim1=0, dim2=2)
                products.append(found.sum(1, keepdim=True))
            else:
                products.append(torch.linalg.vecdot(found, v).T)
            first += len(v)
        if len(products) == 1:
            return products[0]
        return torch.cat(products, 1).sum(1, keepdim=True) if self.exact else torch.cat(products, 1)


def log_snr_of(t: Tensor, scale: float) -> Tensor:
    """Return the log-SNR at a time of the path."""
    return -2 * (torch.logit(t) + math.log(scale))


def time_of(log_snr: Tensor, scale: float) -> Tensor:
    """Return the time of the path at a log-SNR: the inverse of `log_snr_of`."""
    return torch.sigmoid(-0.5 * log_snr - math.log(scale))


def rademacher(samples: Samples, seed: int, probes: int) -> Tensor:
    """Return signs of shape (probes, B, d), keyed by sample as all noise is."""
    d = samples.x.shape[1]
    drawn = [noise.words(seed, samples.index, p, noise.STREAM_PROBE, d) for p in range(probes)]
    return torch.stack([torch.where(w < 0, -1.0, 1.0) for w in drawn]).to(samples.x)


def _vjp(velocity: Tensor, y: Tensor, cotangents: Tensor) -> Tensor:
    """Return the products of cotangents (n, B, d) with the Jacobian, (n, B, d), in one pass where vmap can."""
    try:
        return torch.autograd.grad(velocity, y, cotangents, retain_graph=True, is_grads_batched=True)[0]
    except RuntimeError:  # a network with an operation that vmap cannot batch
        return torch.stack([torch.autograd.grad(velocity, y, v, retain_graph=True)[0] for v in cotangents])
