r"""The three methods of an estimate: log p = base(x) - 1/2 sum_s w_s f_s, one base and one set of weights each.

With lambda_1 > lambda_2 > ... a table's log-SNRs and t = sigmoid(-lambda) the paper's time, a whole table's weights and
bases are

============  ==========================================  =============================================  ===============
method        weight of entry i                           base                                           source
============  ==========================================  =============================================  ===============
``density``   its cell's width in log-SNR                 log q(x)                                       the integral
``discrete``  (t_{i+1} - t_i) / (t_i (1 - t_i))           -(1 + log(2 pi t_1)) d/2 - r                   Li and Yan 2024
``elbo``      exp(lambda_{i-1} - lambda_i) - 1            log N(x_1; 0, t_1) - KL(x_T || N(0, 1)) - r    Ho et al. 2020
============  ==========================================  =============================================  ===============

The integral is by the trapezoid rule on a table, and its tails are q's. A sum has no tails, and puts back what the
control variate takes, r = 1/2 sum_i w_i E||eps - eps_q||^2, which is known in closed form for a single Gaussian.

References:
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..process.masks import inside
from ..process.schedules import LOG_SNR_CEIL, LOG_SNR_FLOOR, Schedule
from ..reference.gaussians import Reference
from ..support.host import as_float64

TABLE_STEPS = 1000  # timesteps of a sum where the schedule itself is continuous


class Method(ABC):
    """What is summed, and what stands outside of the sum.

    Attributes:
        name: by which a caller asks for it.
    """

    name: ClassVar[str]

    @abstractmethod
    def table(self, schedule: Schedule) -> tuple[Tensor, Tensor] | None:
        """Return times and ascending log-SNRs of all that there is to sum over; None where it is an integral."""

    @abstractmethod
    def weights(self, log_snr: Tensor) -> Tensor:
        """Return the weight of every entry of an ascending table of log-SNRs, float64, shape (T,)."""

    @abstractmethod
    def control_variate(self, reference: Reference) -> Reference:
        """Return the reference whose residual is subtracted."""

    @abstractmethod
    def base(self, reference: Reference, x: Tensor, schedule: Schedule, mask: Tensor | None = None) -> Tensor:
        """Return the term outside the sum, nats, float64, shape (B,); `reference` as `control_variate` gives it."""

    def by_trapezoids(self, schedule: Schedule) -> Tensor | None:
        """Return the table over which an integral is summed, with an error of its own; None where there is none."""
        return None

    def __repr__(self) -> str:
        return self.name


class Density(Method):
    """The integral over log-SNR."""

    name = "density"

    def table(self, schedule: Schedule) -> tuple[Tensor, Tensor] | None:
        return table_of(schedule) if schedule.discrete else None

    def weights(self, log_snr: Tensor) -> Tensor:
        middles = (log_snr[1:] + log_snr[:-1]) / 2
        return torch.cat([log_snr[:1], middles, log_snr[-1:]]).diff()

    def control_variate(self, reference: Reference) -> Reference:
        return reference

    def base(self, reference: Reference, x: Tensor, schedule: Schedule, mask: Tensor | None = None) -> Tensor:
        return reference.log_prob(x, mask)

    def by_trapezoids(self, schedule: Schedule) -> Tensor | None:
        table = self.table(schedule)
        return None if table is None else table[1]


class Sum(Method):
    """A sum over timesteps, of which the integral is the limit."""

    @abstractmethod
    def constant(self, x: Tensor, log_snr: Tensor, d: float | Tensor, mask: Tensor | None) -> Tensor:
        """Return what no timestep of a table sees, nats, float64, shape (B,), for d entries that count."""

    def table(self, schedule: Schedule) -> tuple[Tensor, Tensor]:
        return table_of(schedule)

    def control_variate(self, reference: Reference) -> Reference:
        return reference.gaussian()

    def base(self, reference: Reference, x: Tensor, schedule: Schedule, mask: Tensor | None = None) -> Tensor:
        d = x.shape[1] if mask is None else mask.sum(1, dtype=torch.float64)
        _, log_snr = self.table(schedule)
        weight = self.weights(log_snr).to(x.device)
        control = reference.expected_residual(x, log_snr.exp().to(x.device), weight, mask)
        return self.constant(x, log_snr, d, mask) - 0.5 * control


class Discrete(Sum):
    """Li and Yan's sum, whose last cell ends at t = 1."""

    name = "discrete"

    def weights(self, log_snr: Tensor) -> Tensor:
        t = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), torch.sigmoid(-log_snr)])
        return (t[:-1] - t[1:]) / (t[1:] * (1 - t[1:]))

    def constant(self, x: Tensor, log_snr: Tensor, d: float | Tensor, mask: Tensor | None) -> Tensor:
        return -(1 + math.log(2 * math.pi) + _log_first(log_snr)) * d / 2 + x.new_zeros(len(x), dtype=torch.float64)


class Elbo(Sum):
    """DDPM's variational bound with posterior variances, and a Gaussian decoder of variance t_1 at the first step."""

    name = "elbo"

    def weights(self, log_snr: Tensor) -> Tensor:
        # The least noisy entry is the decoder's: its weight is 1 / alphas_cumprod.
        return torch.cat([torch.expm1(log_snr.diff()), 1 + torch.exp(-log_snr[-1:])])

    def constant(self, x: Tensor, log_snr: Tensor, d: float | Tensor, mask: Tensor | None) -> Tensor:
        return -(math.log(2 * math.pi) + _log_first(log_snr)) * d / 2 - prior_kl(x, float(log_snr[0]), mask)


DENSITY = Density()
METHODS: dict[str, Method] = {method.name: method for method in (DENSITY, Discrete(), Elbo())}


def method_of(name: str) -> Method:
    """Return the method of a name.

    Raises:
        ValueError: if there is none.
    """
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {name!r}")
    return METHODS[name]


def table_of(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Return (time, log_snr) of the discrete process of a schedule, noisiest first.

    A table is itself; a continuous schedule is cut into 1000 equal steps of its own time, the first one step from
    the clean end.
    """
    if schedule.discrete:
        time = torch.arange(schedule.time_range[1], -1, -1, device="cpu")
    else:
        clean, noisy = _finite_ends(schedule)
        time = torch.linspace(noisy, clean, TABLE_STEPS + 1, dtype=torch.float64, device="cpu")[:-1]
    return time, schedule.log_snr(time)


def _finite_ends(schedule: Schedule) -> tuple[float, float]:
    """Return the least noisy and the noisiest time, cut as an endless schedule of ours where log-SNR is infinite."""
    ends = as_float64(schedule.time_range)
    log_snr = schedule.log_snr(ends)
    if bool(log_snr.isinf().any()):
        ends = torch.where(log_snr.isinf(), schedule.time(log_snr.clamp(LOG_SNR_FLOOR, LOG_SNR_CEIL)), ends)
    clean, noisy = ends.tolist()
    return clean, noisy


def prior_kl(x: Tensor, log_snr: float, mask: Tensor | None = None) -> Tensor:
    """Return KL(N(alpha x, sigma^2) || N(0, 1)) at the noisiest step, nats, float64, shape (B,)."""
    alpha2, sigma2 = 1 / (1 + math.exp(-log_snr)), 1 / (1 + math.exp(log_snr))
    x2 = inside(x.to(torch.float64), mask).square().sum(1)
    d = x.shape[1] if mask is None else mask.sum(1, dtype=torch.float64)
    return 0.5 * (alpha2 * x2 + d * (sigma2 - 1 - math.log(sigma2)))


def _log_first(log_snr: Tensor) -> float:
    """Return log t of the least noisy entry."""
    return math.log(1 / (1 + math.exp(float(log_snr[-1]))))
