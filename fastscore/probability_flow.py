r"""The other density that people know: integrate the probability-flow ODE and its divergence.

The flow of every schedule, rescaled, is that of the straight path y = (1 - t) x + t eps, t = sigma / (alpha + sigma):

.. math:: \frac{dy}{dt} = v(y, t) = \hat\epsilon - \hat x = \frac{\hat\epsilon - y}{1 - t}, \qquad
    \log p(x) = \log p_{t_1}\Big(\frac{y(t_1)}{1 - t_1}\Big) + d \log\frac{1 - t_0}{1 - t_1}
    + \int_{t_0}^{t_1} \mathrm{tr}\,\frac{\partial v}{\partial y}\, dt

where p_t is the density of x + eps t / (1 - t). v is bounded and smooth at both ends, so a solver needs about half of
the evaluations that it needs in log-SNR. A fixed grid is equal steps in sqrt(t), shorter where there is little noise.

It agrees with `ScoreDensity.log_prob` where the network is an exact score. For a learned one they are two different
numbers: this one is the density of the deterministic sampler, the formula's is a bound for the stochastic one.

References:
    Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456
    FFJORD (Grathwohl et al., 2019), https://arxiv.org/abs/1810.01367
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import noise
from .density import ScoreDensity
from .network import predict
from .predictions import eps_from
from .reference import Reference
from .samples import Samples, check_samples

ADAPTIVE = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")  # of torchdiffeq
TRACES = ("exact", "hutchinson")
COLUMNS = 32  # backward passes in one call; it bounds their memory


class FlowLogProb(NamedTuple):
    """Log-density (nats, (B,)), its standard error over probes (zero for the exact trace), evaluations a sample."""

    log_prob: Tensor
    stderr: Tensor
    nfe: int


def probability_flow_log_prob(
    density: ScoreDensity,
    x: Tensor,
    *,
    trace: str = "exact",
    probes: int = 1,
    seed: int = 0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "dopri5",
    steps: int = 1,
    **cond,
) -> FlowLogProb:
    """Return the log-density of the probability-flow ODE, nats.

    Arguments:
        density: network, schedule (continuous) and reference; the latter's Gaussian, diffused, is the prior.
        x: data, shape (B, *shape).
        trace: "exact" (d vector-Jacobian products an evaluation) or "hutchinson" (one a probe, Rademacher signs).
        probes: number of Hutchinson probes, averaged; two at least give a standard error.
        seed: key of the probes.
        rtol, atol, method: of torchdiffeq's solver.
        steps: of a method with a fixed grid ("midpoint", "rk4", ...); others choose their own.
        cond: keyword arguments of the network.

    Raises:
        ImportError: without torchdiffeq; install fastscore[ode].
        ValueError: for an unknown trace, or a schedule that is a table.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError("probability_flow_log_prob needs torchdiffeq: pip install 'fastscore[ode]'") from error
    if trace not in TRACES or probes < 1:
        raise ValueError(f"trace must be one of {', '.join(TRACES)} with probes >= 1; got {trace!r}, probes={probes}")
    if steps < 1 or (steps > 1 and method in ADAPTIVE):
        raise ValueError(f"steps must be >= 1, and method one with a fixed grid; got steps={steps}, method={method!r}")
    if density.schedule.discrete:
        raise ValueError(
            f"the ODE needs a continuous schedule, got {density.schedule!r}; give the one the table came from"
        )
    samples = check_samples(x, None, (cond,), density.model)
    signs = _signs(samples, seed, probes) if trace == "hutchinson" else None
    lo, hi = density.schedule.log_snr_range
    t_0, t_1 = torch.sigmoid(torch.tensor([-hi / 2, -lo / 2], dtype=torch.float64))
    grid = torch.linspace(t_0**0.5, t_1**0.5, steps + 1, dtype=torch.float64).square()
    field = _Field(density, samples, signs, (float(t_0), float(t_1)))
    columns = samples.x.new_zeros(len(samples), 1 if signs is None else probes)
    start = samples.x.detach() * float(1 - t_0), columns
    if method == "midpoint":
        y, divergence = _midpoint(field, start, grid)
    else:
        grid = grid.to(samples.x)
        # An adaptive solver would step past the end and interpolate, where no network was trained.
        options = {"step_t": grid[1:]} if method in ADAPTIVE else None
        path = odeint(field, start, grid, rtol=rtol, atol=atol, method=method, options=options)
        y, divergence = (part[-1] for part in path)
    prior = _diffused(density.reference.gaussian(), torch.exp(torch.tensor(-lo, dtype=torch.float64)))
    scaled = prior.log_prob(y / float(1 - t_1)) + y.shape[1] * float(torch.log((1 - t_0) / (1 - t_1)))
    log_prob = (scaled[:, None] + divergence).to(samples.x.dtype)
    count = log_prob.shape[1]
    error = log_prob.std(1) / count**0.5 if count > 1 else torch.zeros_like(log_prob[:, 0])
    return FlowLogProb(log_prob.mean(1), error if signs is not None else torch.zeros_like(error), field.nfe)


class _Field:
    """The right-hand side of the ODE: velocity and its divergence."""

    def __init__(self, density: ScoreDensity, samples: Samples, signs: Tensor | None, ends: tuple[float, float]):
        self.density, self.samples, self.ends, self.nfe = density, samples, ends, 0
        self.exact = signs is None
        self.cotangents = torch.eye(samples.x.shape[1]).to(samples.x)[:, None] if signs is None else signs

    def __call__(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.at(self.table(t[None])[0], state)

    def table(self, t: Tensor) -> list[tuple[Tensor, float, float, float]]:
        """Return what the velocity needs to know of each time: the schedule's own, the scale of x_t, c_f and c_x."""
        t = t.detach().double().cpu().clamp(*self.ends)  # rounding must not carry the network past its range
        schedule = self.density.schedule
        time = schedule.time(-2 * torch.logit(t))
        c_f, c_x = eps_from(self.density.predicts, schedule, time)
        scale = schedule.alpha_sigma(time)[0] / (1 - t)
        rows = torch.stack([scale, c_f / (1 - t), (c_x * scale - 1) / (1 - t)], 1).tolist()
        return [(own, *row) for own, row in zip(time.to(self.samples.x.device).split(1), rows)]

    def at(self, row: tuple[Tensor, float, float, float], state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return velocity (B, d) and divergence (B, columns) at a time of the table."""
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            velocity = self.velocity(row, y)
        return velocity.detach(), self._divergence(velocity, y)

    def velocity(self, row: tuple[Tensor, float, float, float], y: Tensor) -> Tensor:
        """Return the velocity alone, (B, d)."""
        self.nfe += 1
        time, scale, c_f, c_x = row
        density, samples = self.density, self.samples
        x_t = (scale * y)[:, None]
        output = predict(density.model, x_t, time, samples.conds[0], samples.shape, density.time_dtype)
        return torch.add(c_f * output[:, 0], y, alpha=c_x)

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


def _midpoint(field: _Field, state: tuple[Tensor, Tensor], grid: Tensor) -> tuple[Tensor, Tensor]:
    """Integrate by the midpoint rule, which wants the divergence in the middle of a step only: half of the traces.

    All that the times decide is evaluated once, before the first step.
    """
    steps = grid.diff().tolist()
    times = torch.stack([grid[:-1], (grid[:-1] + grid[1:]) / 2], 1).flatten()
    table = field.table(times)
    y, divergence = state
    for step, at_start, at_middle in zip(steps, table[::2], table[1::2]):
        with torch.no_grad():
            velocity = field.velocity(at_start, y)
        velocity, trace = field.at(at_middle, (torch.add(y, velocity, alpha=step / 2), divergence))
        y, divergence = torch.add(y, velocity, alpha=step), torch.add(divergence, trace, alpha=step)
    return y, divergence


def _vjp(velocity: Tensor, y: Tensor, cotangents: Tensor) -> Tensor:
    """Return the products of cotangents (n, B, d) with the Jacobian, (n, B, d), in one pass where vmap can."""
    try:
        return torch.autograd.grad(velocity, y, cotangents, retain_graph=True, is_grads_batched=True)[0]
    except RuntimeError:  # a network with an operation that vmap cannot batch
        return torch.stack([torch.autograd.grad(velocity, y, v, retain_graph=True)[0] for v in cotangents])


def _signs(samples: Samples, seed: int, probes: int) -> Tensor:
    d = samples.x.shape[1]
    drawn = [noise.words(seed, samples.index, p, noise.STREAM_PROBE, d) for p in range(probes)]
    return torch.stack([torch.where(w < 0, -1.0, 1.0) for w in drawn]).to(samples.x)


def _diffused(gaussian: Reference, variance: Tensor) -> Reference:
    """The Gaussian convolved with N(0, variance I)."""
    basis = gaussian.basis if gaussian.full else None
    return Reference(gaussian.weight, gaussian.mean, gaussian.variance + variance.to(gaussian.variance), basis)
