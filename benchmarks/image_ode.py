r"""The probability-flow ODE of an image network with Hutchinson's trace, in the code of the libraries that people use.

Its number is the density of the ODE, another one than the bound of the formula where the network is learned. What is
compared is what chance adds: the variance over probes. A pass backwards counts as two evaluations, as its time does.
flow_matching (CC-BY-NC: compared with, never depended on) runs its own `ODESolver.compute_likelihood`; score_sde, which
is no package, is its published likelihood with torchdiffeq's dopri5, for the variance-preserving process at log-SNR
:math:`\lambda` as time,

.. math:: \frac{dx}{d\lambda} = \tfrac12 \sigma^2 x - \tfrac12 \sigma \hat\epsilon
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from image_networks import SCHEDULE
from torch import Tensor, nn

BACKWARD = 2  # evaluations that a vector-Jacobian product takes the time of
TOLERANCE = 1e-3  # of dopri5, absolute and relative
ENDS = SCHEDULE.lo, SCHEDULE.hi

Likelihood = Callable[[Tensor, int], tuple[Tensor, float]]  # (x, seed) -> log p, evaluations per sample


class Counted(nn.Module):
    """A network's noise prediction at one log-SNR for all rows, with the rows that it evaluated."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows = network, 0

    def forward(self, x_t: Tensor, log_snr: Tensor) -> Tensor:
        self.rows += len(x_t)
        alpha, sigma = (v.to(x_t) for v in SCHEDULE.scale(log_snr))
        return alpha * self.network(x_t, log_snr.to(x_t).expand(len(x_t))) + sigma * x_t


def flow_matching(network: nn.Module) -> Likelihood:
    """Return flow_matching's likelihood of the same network as a velocity, x_t = t x + (1 - t) eps."""
    from flow_matching.solver import ODESolver

    eps_of = Counted(network)
    start, end = ((torch.tensor(e, dtype=torch.float64) / 2).sigmoid() for e in ENDS)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.double().clamp(start, end)
        log_snr = 2 * torch.logit(t)
        size = torch.hypot(t, 1 - t).to(x)
        eps = eps_of(x / size, log_snr)
        return (x - eps) / t.to(x)  # the data, (x - (1 - t) eps) / t, less the noise

    def run(x: Tensor, seed: int) -> tuple[Tensor, float]:
        eps_of.rows = 0
        torch.manual_seed(seed)
        solver = ODESolver(velocity_model=velocity)
        options = {"step_size": None, "method": "dopri5", "atol": TOLERANCE, "rtol": TOLERANCE}
        _, found = solver.compute_likelihood(x_1=x, log_p0=_normal, exact_divergence=False, **options)
        return found.detach().double(), (1 + BACKWARD) * eps_of.rows / len(x)

    return run


def score_sde(network: nn.Module) -> Likelihood:
    """Return score_sde's likelihood: Rademacher signs, one probe for the whole path, dopri5."""
    from torchdiffeq import odeint

    eps_of = Counted(network)

    def run(x: Tensor, seed: int) -> tuple[Tensor, float]:
        eps_of.rows = 0
        signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1

        def field(log_snr: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            sigma = SCHEDULE.scale(log_snr.double())[1].to(x)
            with torch.enable_grad():
                u = state[0].detach().requires_grad_()
                drift = 0.5 * sigma * (sigma * u - eps_of(u, log_snr.double()))
                (grad,) = torch.autograd.grad(drift, u, signs)
            return drift.detach(), (grad * signs).flatten(1).sum(1)

        states = x, torch.zeros(len(x))
        times = torch.tensor(ENDS[::-1])
        u, change = (v[-1] for v in odeint(field, states, times, method="dopri5", rtol=TOLERANCE, atol=TOLERANCE))
        return (_normal(u) + change).double(), (1 + BACKWARD) * eps_of.rows / len(x)

    return run


LIBRARIES = {"flow_matching": flow_matching, "score_sde": score_sde}


def _normal(x: Tensor) -> Tensor:
    return torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1)
