r"""What an estimate returns: log-density, honest error bar, cost, and what remains outside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .bins import log_width
from .curve import Curve, CurveSum, table_error, truncation
from .faults import Faults
from .statistics import GroupSums


@dataclass(frozen=True)
class Comparison:
    """A paired difference of log-densities, and its standard error: `difference, stderr = density.compare(...)`.

    Attributes:
        difference: log p(x | a) - log p(x | b) of each sample, nats, shape (B,).
        stderr: its standard error, nats, shape (B,).
        jump, group: as in `Estimate`.
    """

    difference: Tensor
    stderr: Tensor
    jump: Tensor
    group: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.difference, self.stderr))

    def mean(self) -> tuple[float, float]:
        """Return the batch mean of the difference and its standard error as an estimate of the data's, nats."""
        return _on_host(GroupSums.of(self.difference, self.jump, self.group).mean_with_error())

    def __repr__(self):
        mean, error = self.mean()
        return (
            f"Comparison({len(self.difference)} samples, difference {mean:.4g} +- {error:.2g} nats, "
            f"stderr {float(self.stderr.mean()):.2g} a sample)"
        )


@dataclass(frozen=True)
class Estimate:
    """The result of `ScoreDensity.estimate`.

    Attributes:
        log_prob: log-density of each sample, nats, shape (B,).
        stderr: its standard error, nats, shape (B,); +- 1.96 of it covers the exact integral 95 % of the time.
        variance: of log_prob by its draws, nats squared, float64, shape (B,): what means over samples add up. `stderr`
            is wider where draws are few, since a single sample's interval needs more than the right variance.
        jump: of the draws' terms from the first to the last, nats, float64, shape (B,): by a twelfth of its square
            the variance that samples of a group have in common; see `fastscore.estimator.statistics`.
        nfe: network evaluations spent on each sample, int64, shape (B,).
        curve_sum: what `log_snr_curve` is made of.
        dims: dimensions d of a sample; with a mask the number of entries that count in each, int64, shape (B,).
        method: "density", "discrete" or "elbo".
        noise: "sobol" or "independent".
        group: which samples share their nodes, int64 in 0 .. 15, shape (B,); see `fastscore.estimator.rules`.
        ends: the integrand at both ends of the range, shape (B, 2, 7); see `fastscore.estimator.curve.ends`.
        offset: for "discrete" and "elbo" their difference to the integral on the same evaluations, nats, averaged over
            the batch; 0 for "density".
        table: the log-SNRs of a table that "density" integrates over by the trapezoid rule, None elsewhere.
        faults: what is told when a number is read on the host; see `fastscore.estimator.faults`.

    All tensors stay where the data are, and nothing waits for a GPU, until one of them or a number is read.
    """

    log_prob: Tensor
    stderr: Tensor
    variance: Tensor
    jump: Tensor
    nfe: Tensor
    curve_sum: CurveSum
    dims: int | Tensor
    method: str
    noise: str
    group: Tensor
    ends: Tensor
    offset: float | Tensor = 0.0
    table: Tensor | None = None
    faults: Faults | None = None

    def check(self) -> Estimate:
        """Return the estimate itself, once the device has said that all numbers are finite.

        On a CPU `ScoreDensity.estimate` has asked before; on a GPU the first number that is read on the host asks.

        Raises:
            ValueError: if the data or an evaluation had NaN or inf, with the first sample and where it arose.
        """
        if self.faults is not None:
            self.faults.tell()
        return self

    @cached_property
    def log_snr_curve(self) -> Curve:
        """Where in log-SNR the integral comes from, averaged over the batch."""
        self.check()
        return self.curve_sum.curve()

    @cached_property
    def discretization(self) -> float:
        """What the method's sum is off the integral, nats, averaged over the batch.

        For method "density" an estimate of the trapezoid rule's error over a table; zero on a continuous schedule,
        where nodes have no bias and their error is in `stderr`. For "discrete" and "elbo" their `offset`.
        """
        return float(self.offset) if self.table is None else table_error(self.log_snr_curve, self.table)

    @cached_property
    def truncation_per_sample(self) -> Tensor:
        """An estimate, for each sample, of what lies outside of the schedule's range, nats, shape (B,)."""
        return truncation(self.ends)

    @cached_property
    def truncation(self) -> float:
        """The largest of `truncation_per_sample`, nats."""
        self.check()
        return float(self.truncation_per_sample.max())

    def bits_per_dim(self, bins: int | None = None, low: float = -1.0, high: float = 1.0) -> Tensor:
        r"""Return bits per dimension, shape (B,); lower is better.

        .. math:: -\big(\log p(x)/d + \log\Delta\big) / \log 2, \qquad \Delta = (high - low) / bins

        Discrete data with `bins` levels, dequantized by x = low + Delta (level + u), u uniform in [0, 1), has the
        log-probability log p(x) + d log Delta (in expectation over u, a lower bound): for 8-bit data in [-1, 1)
        Delta = 2/256. Without `bins` the data are continuous, Delta = 1, and the number is a differential entropy
        rate, which may be negative and depends on the units of x. With a mask d is each sample's own. Whether the
        data lie in [low, high) is not known here: `evaluate_dataset` and `BitsPerDim` warn where they do not.
        """
        return -(self.log_prob / self.dims + log_width(bins, low, high)) / math.log(2)

    def bits_per_dim_stderr(self) -> Tensor:
        """Return the standard error of `bits_per_dim`, shape (B,)."""
        return self.stderr / self.dims / math.log(2)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the lower and upper end of a normal confidence interval for each log_prob, nats."""
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, such as 0.95; got {level}")
        z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64, device="cpu")))
        return self.log_prob - z * self.stderr, self.log_prob + z * self.stderr

    def mean(self) -> tuple[float, float]:
        """Return the batch mean of log_prob and its standard error as an estimate of the data's, nats.

        The spread between samples contains both their own variation and the estimates' noise; what the samples of a
        group have in common is added to it. The error of a single sample's mean is NaN.
        """
        self.check()
        return _on_host(GroupSums.of(self.log_prob, self.jump, self.group).mean_with_error())

    @property
    def dims_in_words(self) -> str:
        """`dims`, or from the least to the most where samples have their own."""
        least, most = (self.dims, self.dims) if isinstance(self.dims, int) else map(int, self.dims.aminmax())
        return f"{most}" if least == most else f"{least} to {most}"

    def __repr__(self):
        mean, error = self.mean()
        nfe = float(self.nfe.double().mean())
        return (
            f"Estimate({len(self.log_prob)} samples, {self.dims_in_words} dims, "
            f"log_prob {mean:.4g} +- {error:.2g} nats, stderr {float(self.stderr.mean()):.2g} a sample, "
            f"{nfe:.0f} evaluations a sample, "
            f"largest truncation about {self.truncation:.2g})"
        )


def _on_host(numbers: tuple[Tensor, Tensor]) -> tuple[float, float]:
    mean, error = torch.stack(numbers).tolist()
    return mean, error


def mean_in_words(name: str, value: Tensor, stderr: Tensor) -> str:
    """Return the mean of numbers (nats) with its error by their spread, and the mean of their own errors, if any."""
    value, stderr = (each.detach().double() for each in (value, stderr))
    spread = f" +- {float(value.std()) / math.sqrt(len(value)):.2g}" if len(value) > 1 else ""
    own = f", stderr {float(stderr.mean()):.2g} a sample" if bool((stderr > 0).any()) else ""
    return f"{name} {float(value.mean()):.4g}{spread} nats{own}"
