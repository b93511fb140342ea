r"""The other density that people know: integrate the probability-flow ODE and its divergence.

The flow of every schedule, rescaled, is that of the straight path y = (1 - t) x + t eps, with t = sigma / (alpha + sigma):

.. math:: \frac{dy}{dt} = v(y, t) = \hat\epsilon - \hat x = \frac{\hat\epsilon - y}{1 - t}, \qquad
    \log p(x) = \log p_{t_1}\Big(\frac{y(t_1)}{1 - t_1}\Big) + d \log\frac{1 - t_0}{1 - t_1}
    + \int_{t_0}^{t_1} \mathrm{tr}\,\frac{\partial v}{\partial y}\, dt

where p_t is the density of x + eps t / (1 - t). v is bounded and smooth at both ends, so a solver needs about half of the
evaluations that it needs in log-SNR; of the equal steps of a fixed grid in sqrt(t) more lie where there is little noise.

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
    grid = torch.linspace(t_0**0.5, t_1**0.5, steps + 1, dtype=torch.float64).square().to(samples.x)
    field = _Field(density, samples, signs, (float(t_0), float(t_1)))
    columns = samples.x.new_zeros(len(samples), 1 if signs is None else probes)
    start = samples.x.detach() * float(1 - t_0)
    # An adaptive solver would step past the end and interpolate, where no network was trained.
    options = {"step_t": grid[1:]} if method in ADAPTIVE else None
    path = odeint(field, (start, columns), grid, rtol=rtol, atol=atol, method=method, options=options)
    y, divergence = (part[-1] for part in path)
    prior = _diffused(density.reference.gaussian(), torch.exp(torch.tensor(-lo, dtype=torch.float64)))
    scaled = prior.log_prob(y / float(1 - t_1)) + start.shape[1] * float(torch.log((1 - t_0) / (1 - t_1)))
    log_prob = (scaled[:, None] + divergence).to(samples.x.dtype)
    count = log_prob.shape[1]
    error = log_prob.std(1) / count**0.5 if count > 1 else torch.zeros_like(log_prob[:, 0])
    return FlowLogProb(log_prob.mean(1), error if signs is not None else torch.zeros_like(error), field.nfe)


class _Field:
    """The right-hand side of the ODE: velocity and its divergence."""

    def __init__(self, density: ScoreDensity, samples: Samples, signs: Tensor | None, ends: tuple[float, float]):
        self.density, self.samples, self.signs, self.ends, self.nfe = density, samples, signs, ends, 0

    def __call__(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.nfe += 1
        t = t.double().clamp(*self.ends)  # rounding must not carry the network past its range
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            velocity = self._velocity(t, y)
            divergence = self._divergence(velocity, y)
        return velocity.detach(), divergence

    def _velocity(self, t: Tensor, y: Tensor) -> Tensor:
        schedule, samples = self.density.schedule, self.samples
        time = schedule.time(-2 * torch.logit(t)[None])
        alpha, _ = schedule.alpha_sigma(time)
        c_f, c_x = eps_from(self.density.predicts, schedule, time)
        scale = alpha / (1 - t)  # of the schedule's own x_t
        own, rest = ((v / (1 - t)).to(y) for v in (c_f, c_x * scale - 1))
        output = predict(
            self.density.model,
            (scale.to(y) * y)[:, None],
            time.to(y.device),
            samples.conds[0],
            samples.shape,
            self.density.time_dtype,
        )
        return own * output[:, 0] + rest * y

    def _divergence(self, velocity: Tensor, y: Tensor) -> Tensor:
        """Return the trace, (B, 1), or each probe's estimate of it, (B, probes): many cotangents a backward pass."""
        if self.signs is None:
            one = torch.eye(y.shape[1]).to(y)
            found = [
                _vjp(velocity, y, rows[:, None].expand(-1, *y.shape))[torch.arange(len(rows)), :, at]
                for rows, at in zip(one.split(COLUMNS), torch.arange(y.shape[1]).split(COLUMNS))
            ]
            return torch.cat(found).sum(0)[:, None]
        return torch.cat([(_vjp(velocity, y, v) * v).sum(2) for v in self.signs.split(COLUMNS)]).T


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
