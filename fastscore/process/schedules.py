r"""Forward processes: how a schedule's own time maps to log-SNR, and log-SNR to (alpha, sigma).

Every Gaussian diffusion noises data as

.. math:: x_t = \alpha_t x + \sigma_t \epsilon, \qquad \lambda_t = \log(\alpha_t^2 / \sigma_t^2)

and the density formula sees only the log-SNR :math:`\lambda`. A schedule is therefore two independent choices:
a *clock* (time to log-SNR and back, the methods `log_snr` and `time`) and a *scaling* (how large
:math:`\alpha` is at a given log-SNR). All arithmetic is float64; log-SNR decreases as noise grows.

References:
    Variational Diffusion Models (Kingma et al., 2021), https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..support.host import as_float64, finite, positive

# Ends this near to each other are one.
SAME_END = 0.01


class Cut(float):
    """An end of a process that goes on for ever: where it is cut for data of standard deviation one.

    For data of another scale it is cut elsewhere (`Schedule.range_for`). Any other number is an end that somebody
    stated, of training for one, whatever the number is: no network is asked beyond it.
    """


LOG_SNR_FLOOR, LOG_SNR_CEIL = Cut(-14.0), Cut(16.0)


class Schedule:
    """Map a network's own time coordinate to (alpha, sigma, log-SNR) and back.

    Subclasses define `log_snr(t)`, `time(log_snr)` and the pair `time_range` (least noisy, noisiest), and choose
    one of the scalings below by overriding `scale`. Class attribute `discrete` says whether the network knows
    only the timesteps of a table; `data_std` is the standard deviation of data that the schedule assumes.

    The ends of `time_range` are those of training: no network is asked beyond an end that a class, an argument or an
    assignment states. Without an end are `LiYan`, `Cosine`, `FlowMatching` and `LogSNR()` as they are made, and a
    `time_range` of your own at whose end the log-SNR is infinite; there the range follows the scale of the data.
    """

    discrete = False
    data_std = 1.0
    time_range: tuple[float, float]

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2), shape of t, float64."""
        raise NotImplementedError(f"{type(self).__name__} must define log_snr(t)")

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the schedule has this log-SNR, shape of log_snr, float64."""
        raise NotImplementedError(f"{type(self).__name__} must define time(log_snr)")

    def scale(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at a log-SNR; here variance-preserving, alpha^2 + sigma^2 = 1."""
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha, sigma) at time t, each of t's shape, float64."""
        return self.scale(self.log_snr(as_float64(t)))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (d alpha/dt, d sigma/dt) at time t; raises ValueError for a discrete table."""
        if self.discrete:
            raise ValueError(
                f"{self!r} is a table of timesteps and has no time derivative; "
                "predicts='flow' needs a continuous schedule such as FlowMatching()"
            )
        with torch.enable_grad():
            t = as_float64(t).detach().requires_grad_()
            alpha, sigma = self.alpha_sigma(t)
            d_sigma = torch.autograd.grad(sigma.sum(), t, retain_graph=True)[0]
            # A variance-exploding alpha is the constant 1 and does not depend on t at all.
            d_alpha = torch.autograd.grad(alpha.sum(), t)[0] if alpha.requires_grad else torch.zeros_like(d_sigma)
        return d_alpha, d_sigma

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """Range (lowest, highest) of the log-SNR for data of the standard deviation that the schedule assumes."""
        return self.range_for(self.data_std, self.data_std)

    def range_for(self, smallest: float, largest: float) -> tuple[float, float]:
        r"""Return the range (lowest, highest) of the log-SNR for data of some scales.

        A schedule has its own ends, as a network trained on sigma from 0.002 to 80 does, and they are never exceeded.
        One that goes on for ever, or further than the data need, is cut where the noise hides them, and where it no
        longer changes them:

        .. math:: [-14 - 2 \log s_{max},\; 16 - 2 \log s_{min}]

        Arguments:
            smallest, largest: standard deviations of the data in their narrowest and their widest dimension.
        """
        (clean, noisy), (least, most) = (float(self.log_snr(as_float64(t))) for t in self.time_range), self.time_range
        lowest, highest = LOG_SNR_FLOOR - 2 * math.log(largest), LOG_SNR_CEIL - 2 * math.log(smallest)
        noisy = lowest if isinstance(most, Cut) else max(noisy, lowest)
        return noisy, highest if isinstance(least, Cut) else min(clean, highest)

    def __repr__(self) -> str:
        fields = ", ".join(f"{k}={v:g}" for k, v in vars(self).items() if type(v) in (int, float))
        return f"{type(self).__name__}({fields})"


class LogSNR(Schedule):
    """The log-SNR itself as time, variance-preserving, trained on [lo, hi]: no network is asked beyond.

    An end that is not given is none: the network answers at every log-SNR there, and is asked as far as the scale of
    the data needs, -14 and 16 for data of standard deviation one. `LogSNR(-14, 16)` has ends, and `LogSNR()` has not.
    """

    def __init__(self, lo: float | None = None, hi: float | None = None) -> None:
        self.lo = LOG_SNR_FLOOR if lo is None else finite("lo of LogSNR", lo)
        self.hi = LOG_SNR_CEIL if hi is None else finite("hi of LogSNR", hi)
        require(self.lo < self.hi, f"LogSNR needs lo < hi, got lo={self.lo:g}, hi={self.hi:g}")

    @property
    def time_range(self) -> tuple[float, float]:
        return self.hi, self.lo

    @time_range.setter
    def time_range(self, ends: tuple[float, float]) -> None:
        self.hi, self.lo = ends

    def log_snr(self, t: Tensor) -> Tensor:
        return as_float64(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return as_float64(log_snr)


class LiYan(Schedule):
    """The paper's own process: alpha^2 = 1 - t, sigma^2 = t, t in (0, 1).

    References:
        A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
    """

    # float64 times whose log-SNR is the ceiling and the floor; t = 0 and t = 1 are at infinity.
    time_range = Cut(1 / (1 + math.exp(LOG_SNR_CEIL))), Cut(1 / (1 + math.exp(LOG_SNR_FLOOR)))

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.logit(as_float64(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-as_float64(log_snr))


class VP(Schedule):
    """Variance-preserving SDE: log alpha = -(beta_max - beta_min) t^2 / 4 - beta_min t / 2, t in [1e-5, 1].

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456
    """

    time_range = (1e-5, 1.0)

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        beta_min, beta_max = finite("beta_min of VP", beta_min), finite("beta_max of VP", beta_max)
        require(0 < beta_min < beta_max, f"VP needs 0 < beta_min < beta_max, got {beta_min:g}, {beta_max:g}")
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_snr(self, t: Tensor) -> Tensor:
        t = as_float64(t)
        loss = 0.5 * (self.beta_max - self.beta_min) * t**2 + self.beta_min * t  # -log alpha^2
        return -torch.log(torch.expm1(loss))

    def time(self, log_snr: Tensor) -> Tensor:
        loss = torch.nn.functional.softplus(-as_float64(log_snr))
        slope = self.beta_max - self.beta_min
        # The stable root of the quadratic: no cancellation as t -> 0.
        return 2 * loss / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * loss))


class Cosine(Schedule):
    """Cosine schedule: alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in (0, 1).

    References:
        Progressive Distillation (Salimans and Ho, 2022), https://arxiv.org/abs/2202.00512
    """

    time_range = tuple(Cut(2 / math.pi * math.atan(math.exp(-end / 2))) for end in (LOG_SNR_CEIL, LOG_SNR_FLOOR))

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(torch.tan(0.5 * math.pi * as_float64(t)))

    def time(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-0.5 * as_float64(log_snr)))


class _Exploding(Schedule):
    def scale(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr), torch.exp(-0.5 * log_snr)


class VE(_Exploding):
    """Variance-exploding SDE: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t, t in [0, 1].

    References:
        Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456
    """

    time_range = (0.0, 1.0)

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        self.sigma_min, self.sigma_max = _sigmas("VE", sigma_min, sigma_max)
        low, high = self.sigma_min, self.sigma_max
        if not low < 1 <= high:  # no noise is of the size of such data: they have the schedule's own scale
            self.data_std = math.sqrt(low * high)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + as_float64(t) * math.log(self.sigma_max / self.sigma_min))

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * as_float64(log_snr) - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


class EDM(_Exploding):
    """EDM: alpha = 1 and sigma itself is the time; `sigma_data` is the data's standard deviation.

    References:
        Elucidating the Design Space of Diffusion Models (Karras et al., 2022), https://arxiv.org/abs/2206.00364
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5) -> None:
        self.sigma_min, self.sigma_max = _sigmas("EDM", sigma_min, sigma_max)
        self.sigma_data = positive("sigma_data of EDM", sigma_data, "in units of the data")

    @property
    def data_std(self) -> float:
        return self.sigma_data

    @data_std.setter
    def data_std(self, std: float) -> None:
        self.sigma_data = std

    @property
    def time_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    @time_range.setter
    def time_range(self, ends: tuple[float, float]) -> None:
        self.sigma_min, self.sigma_max = ends

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(as_float64(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * as_float64(log_snr))


class FlowMatching(Schedule):
    """Straight paths x_t = s x + (1 - s) eps with s = t if `data_at` is 1, s = 1 - t if it is 0; t in (0, 1).

    Only for flows whose noise was drawn independently of the data. One trained on matched pairs (optimal transport in
    minibatches or exact, reflow) has no density by the formula, which is then too low by up to 6 nats per dimension:
    take `probability_flow_log_prob`. Noise added to the path (torchcfm's sigma > 0) is `ConditionalFlow`.

    References:
        Flow Matching for Generative Modeling (Lipman et al., 2023), https://arxiv.org/abs/2210.02747
    """

    def __init__(self, data_at: int = 1) -> None:
        require(
            getattr(data_at, "ndim", 0) == 0 and data_at in (0, 1),
            f"FlowMatching needs data_at = 0 or 1 (the time at which data lies), got {data_at!r}",
        )
        self.data_at = int(data_at)
        ends = (1 / (1 + math.exp(-LOG_SNR_CEIL / 2)), 1 / (1 + math.exp(-LOG_SNR_FLOOR / 2)))
        self.time_range = tuple(Cut(end if data_at == 1 else 1 - end) for end in ends)

    def scale(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(0.5 * log_snr), torch.sigmoid(-0.5 * log_snr)

    def log_snr(self, t: Tensor) -> Tensor:
        return (2 if self.data_at == 1 else -2) * torch.logit(as_float64(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid((0.5 if self.data_at == 1 else -0.5) * as_float64(log_snr))


def _sigmas(kind: str, sigma_min: object, sigma_max: object) -> tuple[float, float]:
    low, high = finite(f"sigma_min of {kind}", sigma_min), finite(f"sigma_max of {kind}", sigma_max)
    require(0 < low < high, f"{kind} needs 0 < sigma_min < sigma_max, got {low:g}, {high:g}")
    return low, high


def require(condition: bool, message: str) -> None:
    """Raise ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)
