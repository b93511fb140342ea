r"""The other density that people know: integrate the probability-flow ODE and its divergence.

With s = log(sigma / alpha) = -log_snr / 2 and u the variance-preserving state (alpha^2 + sigma^2 = 1) the flow of every
schedule reads

.. math:: \frac{du}{ds} = \sigma\hat\epsilon(u) - \sigma^2 u, \qquad
    \log p(x) = \log p_{s_1}\big(u(s_1) / \alpha_1\big)
    + \int_{s_0}^{s_1} \mathrm{tr}\,\frac{\partial\, \sigma\hat\epsilon}{\partial u}\, ds

where p_s is the density of x + e^s eps. The volume that sigma^2 u takes away is that between u and u / alpha, so it
cancels. At both ends u hardly moves, which saves the solver a quarter of the steps that u / alpha would take.

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
    if density.schedule.discrete:
        raise ValueError(
            f"the ODE needs a continuous schedule, got {density.schedule!r}; give the one the table came from"
        )
    samples = check_samples(x, None, (cond,), density.model)
    signs = _signs(samples, seed, probes) if trace == "hutchinson" else None
    lo, hi = density.schedule.log_snr_range
    ends = samples.x.new_tensor([-hi / 2, -lo / 2])
    field = _Field(density, samples, signs, (-hi / 2, -lo / 2))
    columns = samples.x.new_zeros(len(samples), 1 if signs is None else probes)
    start = samples.x.detach() * _alpha(ends[0])
    # An adaptive solver would step past the end and interpolate, where no network was trained.
    options = {"step_t": ends[1:]} if method in ADAPTIVE else None
    path = odeint(field, (start, columns), ends, rtol=rtol, atol=atol, method=method, options=options)
    u, divergence = (part[-1] for part in path)
    prior = _diffused(density.reference.gaussian(), torch.exp(2 * ends[1].double()))
    log_prob = (prior.log_prob(u / _alpha(ends[1]))[:, None] + divergence).to(samples.x.dtype)
    count = log_prob.shape[1]
    error = log_prob.std(1) / count**0.5 if count > 1 else torch.zeros_like(log_prob[:, 0])
    return FlowLogProb(log_prob.mean(1), error if signs is not None else torch.zeros_like(error), field.nfe)


class _Field:
    """The right-hand side of the ODE: velocity and its divergence."""

    def __init__(self, density: ScoreDensity, samples: Samples, signs: Tensor | None, ends: tuple[float, float]):
        self.density, self.samples, self.signs, self.ends, self.nfe = density, samples, signs, ends, 0

    def __call__(self, s: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        self.nfe += 1
        s = s.clamp(*self.ends)  # rounding must not carry the network past its range
        alpha = _alpha(s)
        sigma = torch.exp(s) * alpha
        with torch.enable_grad():
            u = state[0].detach().requires_grad_()
            noise_part = sigma * self._eps_hat(s, u, alpha)
            divergence = self._divergence(noise_part, u)
        return noise_part.detach() - sigma**2 * state[0], divergence

    def _eps_hat(self, s: Tensor, u: Tensor, alpha: Tensor) -> Tensor:
        schedule, samples = self.density.schedule, self.samples
        time = schedule.time(-2 * s.double()[None])
        own_alpha, _ = schedule.alpha_sigma(time)
        c_f, c_x = (c.to(u) for c in eps_from(self.density.predicts, schedule, time))
        x_t = (own_alpha.to(u) / alpha) * u
        rows = time.to(u.device)
        output = predict(
            self.density.model, x_t[:, None], rows, samples.conds[0], samples.shape, self.density.time_dtype
        )
        return c_f * output[:, 0] + c_x * x_t

    def _divergence(self, noise_part: Tensor, u: Tensor) -> Tensor:
        def vjp(v: Tensor) -> Tensor:
            return torch.autograd.grad(noise_part, u, v, retain_graph=True)[0]

        if self.signs is None:
            one = torch.eye(u.shape[1]).to(u)
            return sum(vjp(row.expand_as(u))[:, i : i + 1] for i, row in enumerate(one))
        return torch.stack([(vjp(v) * v).sum(1) for v in self.signs], 1)


def _alpha(s: Tensor) -> Tensor:
    """Return the variance-preserving alpha at s = log(sigma / alpha)."""
    return torch.sigmoid(-2 * s).sqrt()


def _signs(samples: Samples, seed: int, probes: int) -> Tensor:
    d = samples.x.shape[1]
    drawn = [noise.words(seed, samples.index, p, noise.STREAM_PROBE, d) for p in range(probes)]
    return torch.stack([torch.where(w < 0, -1.0, 1.0) for w in drawn]).to(samples.x)


def _diffused(gaussian: Reference, variance: Tensor) -> Reference:
    """The Gaussian convolved with N(0, variance I)."""
    basis = gaussian.basis if gaussian.full else None
    return Reference(gaussian.weight, gaussian.mean, gaussian.variance + variance.to(gaussian.variance), basis)
