"""Conditional flow matching with sigma > 0, torchcfm's path: noise is added to the straight path."""

from __future__ import annotations

import torch
from torch import Tensor

from ..support.host import as_float64, finite
from .alpha_sigma import AlphaSigma
from .schedules import FlowMatching


class ConditionalFlow(AlphaSigma, FlowMatching):
    r"""Straight paths with noise of their own: x_t = s x + (1 - s) eps + sigma z, independent x, eps and z.

    s = t if `data_at` is 1, s = 1 - t if it is 0. The two noises are one of standard deviation
    :math:`\sqrt{(1-s)^2 + \sigma^2}`, and the velocity :math:`E[x - \epsilon \mid x_t]` that such a network learns is
    exactly the flow prediction of this schedule, not that of `FlowMatching`. The range ends at the noise that is left
    with the data, sigma.

    Arguments:
        sigma: standard deviation of the added noise, between 0 and 1, as in `ConditionalFlowMatcher(sigma)`.
        data_at: the time at which data lies.

    Raises:
        ValueError: unless 0 < sigma < 1 and data_at is 0 or 1.

    References:
        Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport (Tong et al., 2024),
        https://arxiv.org/abs/2302.00482
    """

    def __init__(self, sigma: float, data_at: int = 1) -> None:
        super().__init__(data_at)
        self.sigma = finite("sigma of ConditionalFlow", sigma)
        if not 0 < self.sigma < 1:
            raise ValueError(f"ConditionalFlow needs 0 < sigma < 1, got {sigma}; without added noise use FlowMatching")
        self.time_range = float(self.data_at), self.time_range[1]

    def scale(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return self._parts(self._share(log_snr))  # not by way of 1 - s, which would round a small s away

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._parts(self._from_time(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return self._from_time(self._share(log_snr))

    def _from_time(self, t: Tensor) -> Tensor:
        """Return s at time t, and the time at s: the same map."""
        t = as_float64(t)
        return t if self.data_at == 1 else 1 - t

    def _parts(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return s, torch.sqrt((1 - s) ** 2 + self.sigma**2)

    def _share(self, log_snr: Tensor) -> Tensor:
        """Return s: the root in (0, 1] of (1 - s)^2 + sigma^2 = exp(-log_snr) s^2, in the form that cancels least."""
        ratio, square = torch.exp(-as_float64(log_snr)), 1 + self.sigma**2
        return square / (1 + torch.sqrt((ratio * square - self.sigma**2).clamp(min=self.sigma**4)))
