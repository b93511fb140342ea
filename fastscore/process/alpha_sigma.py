"""Processes that are known by their alpha and sigma at a time: log-SNR and scaling follow from the two."""

from __future__ import annotations

import torch
from torch import Tensor

from .schedules import Schedule


class AlphaSigma(Schedule):
    r"""A process given by (alpha, sigma) at its own time: :math:`\lambda = 2 \log(\alpha_t / \sigma_t)`.

    Subclasses define `alpha_sigma(t)`, its inverse `time(log_snr)` and `time_range`; a class that is another kind of
    schedule as well names this one first.
    """

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError(f"{type(self).__name__} must define alpha_sigma(t)")

    def log_snr(self, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return 2 * torch.log(alpha / sigma)

    def scale(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha_sigma(self.time(log_snr))
