"""What the bound of a latent diffusion model returns: its value, its error bar, and the terms that it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..estimator.bins import HIGH, LOW, Bins, log_width
from ..estimator.calibration import NORMAL_95
from ..estimator.common_noise import warn_of_common_noise
from ..estimator.estimate import Estimate
from ..estimator.rules import group_of
from ..estimator.statistics import GroupSums, widened

# Student's t of 1, 2, ... degrees of freedom that 5 % exceed on both sides together (Abramowitz and Stegun, table
# 26.10). The expansion of `widened` is within 1 % of it from here on.
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571)


@dataclass(frozen=True, eq=False)
class BoundEstimate:
    r"""The result of `LatentBound.estimate`: a lower bound of log p(x), which is `reconstruction` less `rate`.

    Attributes:
        log_prob: the lower bound of each sample's log-density, nats, shape (B,).
        stderr: its standard error, nats, shape (B,): of the encoder's draws and of the diffusion's together. +- 1.96 of
            it covers the exact bound 95 % of the time.
        variance: of log_prob by its draws, nats squared, float64, shape (B,): what means over samples add up. `stderr`
            is wider by Student's t and, with few latents, by their skewness.
        reconstruction: E log p(x|z), nats, shape (B,).
        rate: E [log q(z|x) - log p(z)], nats, shape (B,): what the latents cost.
        entropy: of q(z|x), nats, exact, shape (B,); `rate` is -entropy - E log p(z).
        nfe: network evaluations spent on each sample, by all draws, int64, shape (B,).
        dims: entries d of x.
        decoder_std: sigma_x of p(x|z), in the units of x.
        latents: the estimate of log p(u) of each draw, of the scaled latents: with its curve, its truncation, and its
            own part of `nfe`.
        sample_index: of the noise of each sample, int64, shape (B,), on the CPU.
    """

    log_prob: Tensor
    stderr: Tensor
    variance: Tensor
    reconstruction: Tensor
    rate: Tensor
    entropy: Tensor
    nfe: Tensor
    dims: int
    decoder_std: float
    latents: tuple[Estimate, ...]
    sample_index: Tensor

    @classmethod
    def of(
        cls,
        reconstruction: Tensor,
        log_prior: Tensor,
        entropy: Tensor,
        dims: int,
        decoder_std: float,
        latents: tuple[Estimate, ...],
    ) -> BoundEstimate:
        """Return the bound by terms of each draw.

        Arguments:
            reconstruction, log_prior: log p(x|z) and log p(z) in nats, float64, shape (draws, B), draws >= 2.
            entropy: float64, shape (B,).
        """
        draws, dtype = len(latents), latents[0].log_prob.dtype
        value = reconstruction + log_prior + entropy
        # Draws have noise of their own in all: encoder, nodes and diffusion. So their spread shows every error, with
        # one degree of freedom less than there are draws.
        variance, entries = value.var(0) / draws, latents[0].dims
        rate = -entropy - log_prior.mean(0)
        log_prob, stderr, reconstruction, rate, entropy = (
            v.to(dtype)
            for v in (
                value.mean(0),
                widened_for(variance, draws, entries).sqrt(),
                reconstruction.mean(0),
                rate,
                entropy,
            )
        )
        nfe = torch.stack([each.nfe for each in latents]).sum(0)
        index = latents[0].sample_index
        return cls(log_prob, stderr, variance, reconstruction, rate, entropy, nfe, dims, decoder_std, latents, index)

    @property
    def truncation_per_sample(self) -> Tensor:
        """An estimate of what lies outside of the schedule's range, nats, shape (B,), averaged over the draws."""
        return torch.stack([each.truncation_per_sample for each in self.latents]).mean(0)

    def check(self) -> BoundEstimate:
        """Return the bound itself, once the device has said that all numbers are finite; as `Estimate.check`.

        Raises:
            ValueError: if an evaluation had NaN or inf, with the first sample and where it arose.
        """
        for each in self.latents:
            each.check()
        return self

    def bits_per_dim(self, bins: Bins = None, low: float = LOW, high: float = HIGH) -> Tensor:
        """Return an upper bound of the bits per dimension of x, shape (B,); lower is better.

        As `Estimate.bits_per_dim`: with `bins` that of discrete data, which were dequantized in [low, high); a
        `fastscore.Levels` in the place of `bins` brings its own ends.
        """
        return -(self.log_prob / self.dims + log_width(bins, low, high)) / math.log(2)

    def bits_per_dim_stderr(self) -> Tensor:
        """Return the standard error of `bits_per_dim`, shape (B,)."""
        return self.stderr / self.dims / math.log(2)

    def mean(self) -> tuple[float, float]:
        """Return the batch mean of the bound and its standard error as an estimate of the data's, nats.

        As `Estimate.mean`. What samples with the same nodes have in common differs from draw to draw.
        """
        self.check()
        self._warn()
        return self._mean()

    def mean_bits_per_dim(self, bins: Bins = None, low: float = LOW, high: float = HIGH) -> tuple[float, float]:
        """Return the batch mean of `bits_per_dim` and its standard error, as `Estimate.mean_bits_per_dim`."""
        self.check()
        self._warn()
        jump = self._jump() / (self.dims * math.log(2))
        return GroupSums.of(self.bits_per_dim(bins, low, high), jump, group_of(self.sample_index)).told()

    def _mean(self) -> tuple[float, float]:
        return GroupSums.of(self.log_prob, self._jump(), group_of(self.sample_index)).told()

    def _warn(self) -> None:
        warn_of_common_noise(self.sample_index, self.latents[0].seed)

    def _jump(self) -> Tensor:
        return torch.stack([each.jump for each in self.latents]).mean(0) / math.sqrt(len(self.latents))

    def __repr__(self) -> str:
        mean, error = self.check()._mean()
        spread = f" +- {error:.2g}" if len(self.log_prob) > 1 else ""
        terms = ", ".join(f"{name} {float(getattr(self, name).mean()):.4g}" for name in ("reconstruction", "rate"))
        return (
            f"BoundEstimate({len(self.log_prob)} sample{'s' * (len(self.log_prob) > 1)}, {self.dims} dims, lower bound "
            f"of log_prob {mean:.4g}{spread} nats, {terms}, stderr {float(self.stderr.mean()):.2g} per sample, "
            f"{float(self.nfe.double().mean()):.0f} evaluations per sample in {len(self.latents)} draws, "
            f"decoder_std {self.decoder_std:.3g})"
        )


def widened_for(variance: Tensor, draws: int, entries: int) -> Tensor:
    r"""Return the variance of a mean such that +- 1.96 standard errors cover 95 %, by the spread of so many draws.

    Student's t is for normal draws. These are quadratic in the noise, and have about the skewness :math:`\sqrt{8/m}` of
    a squared norm in m dimensions, which counts as in `fastscore.estimator.statistics.Spread.widened`.

    Arguments:
        entries: m, of the latents.
    """
    freedom = draws - 1
    if freedom <= len(STUDENT_95):
        variance = (STUDENT_95[freedom - 1] / NORMAL_95) ** 2 * variance
    else:
        variance = widened(variance, torch.full_like(variance, freedom))
    return (1 + 1.08 * 8 / (entries * draws)) ** 2 * variance
