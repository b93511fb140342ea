r"""What an estimate returns: log-density, honest error bar, cost, and what remains outside.

With g_s = -w_s N f_s / 2 for draw s of N, log p = log q + mean(g), and its variance comes from successive
differences, because neighbouring draws share almost the same log-SNR:

.. math:: \mathrm{Var} = \sum_s (g_s - g_{s-1})^2 \,/\, (2 (N-1) N)

The plain variance over draws would count the integrand's course over log-SNR as noise and be far too large. Student's
t then widens it for the degrees of freedom that the differences have (`draw_variance`).

References:
    The Mean Square Successive Difference (von Neumann et al., 1941), https://doi.org/10.1214/aoms/1177731677
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .nodes import Rule


class Curve(NamedTuple):
    r"""The integrand over log-SNR: log p = log q + its integral.

    Attributes:
        log_snr: nodes, float64, shape (N,).
        mean: -(E||eps - eps_hat||^2 - E||eps - eps_q||^2) / 2 averaged over the batch, nats per unit log-SNR.
        stderr: its standard error over the batch; NaN for one sample.
    """

    log_snr: Tensor
    mean: Tensor
    stderr: Tensor


class Comparison(NamedTuple):
    """A paired difference of log-densities (nats) and its standard error, each of shape (B,)."""

    difference: Tensor
    stderr: Tensor


@dataclass(frozen=True)
class Estimate:
    """The result of `ScoreDensity.estimate`.

    Attributes:
        log_prob: log-density of each sample, nats, shape (B,).
        stderr: its standard error, nats, shape (B,); +- 1.96 of it covers the exact integral 95 % of the time.
        nfe: network evaluations spent on each sample, int64, shape (B,).
        log_snr_curve: where in log-SNR the integral comes from (`Curve`), averaged over the batch.
        truncation: bound, in nats per sample, of what lies outside the schedule's range, see `truncation_bound`.
        discretization: for method "density" a bound of the node rule's own error, in nats, averaged over the batch
            (its noise included); for "discrete" and "elbo" their difference to the integral on the same evaluations.
        dims: dimensions d of a sample.
        method: "density", "discrete" or "elbo".
        noise: "sobol" or "independent".
    """

    log_prob: Tensor
    stderr: Tensor
    nfe: Tensor
    log_snr_curve: Curve
    truncation: float
    discretization: float
    dims: int
    method: str
    noise: str

    def bits_per_dim(self, bins: int | None = None, low: float = -1.0, high: float = 1.0) -> Tensor:
        r"""Return bits per dimension, shape (B,); lower is better.

        .. math:: -\big(\log p(x)/d + \log\Delta\big) / \log 2, \qquad \Delta = (high - low) / bins

        Discrete data with `bins` levels, dequantized by x = low + Delta (level + u), u uniform in [0, 1), has the
        log-probability log p(x) + d log Delta (in expectation over u, a lower bound): for 8-bit data in [-1, 1)
        Delta = 2/256. Without `bins` the data are continuous, Delta = 1, and the number is a differential entropy
        rate, which may be negative and depends on the units of x.
        """
        return -(self.log_prob / self.dims + log_width(bins, low, high)) / math.log(2)

    def bits_per_dim_stderr(self) -> Tensor:
        """Return the standard error of `bits_per_dim`, shape (B,)."""
        return self.stderr / (self.dims * math.log(2))

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the lower and upper end of a normal confidence interval for each log_prob, nats."""
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, such as 0.95; got {level}")
        z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64, device="cpu")))
        return self.log_prob - z * self.stderr, self.log_prob + z * self.stderr

    def mean(self) -> tuple[float, float]:
        """Return the batch mean of log_prob and its standard error as an estimate of the data's, nats.

        The spread between samples contains both their own variation and the estimates' noise.
        """
        spread = float(self.log_prob.std()) if len(self.log_prob) > 1 else math.nan
        return float(self.log_prob.mean()), spread / math.sqrt(len(self.log_prob))

    def __repr__(self):
        mean, error = self.mean()
        nfe = float(self.nfe.double().mean())
        return (
            f"Estimate({len(self.log_prob)} samples, {self.dims} dims, log_prob {mean:.4g} +- {error:.2g} nats, "
            f"stderr {float(self.stderr.mean()):.2g} a sample, {nfe:.0f} evaluations a sample, "
            f"truncation <= {self.truncation:.2g})"
        )


def draw_sum(f: Tensor, rule: Rule, weight: Tensor | None = None) -> Tensor:
    """Return -1/2 sum_s w_s f_s, shape (B,), float64."""
    return -0.5 * (f.to(torch.float64) @ (rule.weight if weight is None else weight).to(f.device))


def draw_variance(f: Tensor, rule: Rule) -> Tensor:
    r"""Return the variance of `draw_sum` such that +- 1.96 standard errors cover 95 %, shape (B,), float64.

    Student's t with the degrees of freedom of `successive_variance` widens the bar by

    .. math:: t_{0.975}(\nu) / 1.96 \approx 1 + 1.21/\nu + 1.44/\nu^2
    """
    variance, nu = successive_variance(f.to(torch.float64) * (0.5 * rule.weight).to(f.device))
    return widened(variance, nu)


def successive_variance(terms: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the variance of the terms' sum along the last dimension, and its degrees of freedom.

    Successive differences d_s have about :math:`\nu = 2 (\sum d_s^2)^2 / \sum d_s^4` degrees of freedom: 2N/3 for even
    noise, fewer where a short stretch of log-SNR makes most of it.

    Arguments:
        terms: float64, shape (..., N), ascending in log-SNR.
    """
    n = terms.shape[-1]
    square = terms.diff(dim=-1).square()
    total = square.sum(-1)
    # At least one degree of freedom, also where there is no noise at all.
    nu = (2 * total.square() / square.square().sum(-1).clamp(min=1e-300)).clamp(min=1.0)
    return total * n / (2 * (n - 1)), nu


def widened(variance: Tensor, nu: Tensor) -> Tensor:
    """Return a variance such that +- 1.96 standard errors cover 95 % under Student's t with nu degrees of freedom."""
    return (1 + 1.21 / nu + 1.44 / nu**2).square() * variance


def student_quantile(tail: float, nu: Tensor) -> Tensor:
    r"""Return Student's t that is exceeded with probability `tail`, shape of nu, by its expansion in :math:`1/\nu`.

    Within 3 % of the exact quantile for nu >= 3 and tails down to 0.001.

    References:
        Handbook of Mathematical Functions, 26.7.5 (Abramowitz and Stegun, 1964)
    """
    z = -float(torch.special.ndtri(torch.tensor(tail, dtype=torch.float64, device="cpu")))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / nu**power for power, term in enumerate(terms, 1))


class CurveSum:
    """Accumulates the curve over chunks of samples."""

    def __init__(self, rule: Rule):
        self.rule, self.count = rule, 0
        self.total = torch.zeros_like(rule.log_snr)
        self.squares = torch.zeros_like(self.total)

    def add(self, f: Tensor) -> None:
        half = -0.5 * f.to(torch.float64).cpu()
        self.count += len(half)
        self.total += half.sum(0)
        self.squares += half.square().sum(0)

    def curve(self) -> Curve:
        mean = self.total / self.count
        variance = (self.squares / self.count - mean**2).clamp(min=0) / max(self.count - 1, 0)
        return Curve(self.rule.log_snr, mean, variance.sqrt())


def truncation_bound(curve: Curve) -> float:
    r"""Bound what the integrand holds beyond both ends of the range, in nats per sample.

    Past the ends the difference to the reference decays like the signal-to-noise ratio (noisy end) and like its
    inverse (clean end), so each tail is about its end value times one unit of log-SNR. The end value is the mean of
    the outermost twentieth of the draws, plus twice its standard error.
    """
    n = max(1, len(curve.mean) // 20)
    bound = 0.0
    for end in (slice(None, n), slice(-n, None)):
        error = curve.stderr[end].nan_to_num(0.0).square().sum().sqrt() / n
        bound += float(curve.mean[end].mean().abs() + 2 * error)
    return bound


def discretization_bound(curve: Curve, rule: Rule) -> float:
    """Return half of how far the batch mean moves when every third draw stands for its neighbours too, in nats.

    Cells three times as wide make nine times the error of a second-order rule, so the rule's own is an eighth of the
    move where the integrand is smooth. The noise of the mean moves it as well: a bound, not a measurement.
    """
    n = len(curve.mean) // 3 * 3
    widths, mean = rule.density_weight[:n], curve.mean[:n]
    coarse = (widths.reshape(-1, 3).sum(1) * mean[1::3]).sum()
    return float(((widths * mean).sum() - coarse).abs()) / 2


def log_width(bins: int | None, low: float, high: float) -> float:
    """Return the logarithm of a level's width, 0 without bins; raise ValueError where there is none."""
    if bins is None:
        return 0.0
    if bins < 2 or not high > low:
        raise ValueError(f"bits_per_dim needs bins >= 2 and high > low, got bins={bins}, low={low}, high={high}")
    return math.log((high - low) / bins)
