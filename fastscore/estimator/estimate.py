r"""What an estimate returns: log-density, honest error bar, cost, and what remains outside."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..support.host import share
from . import saved
from .bins import HIGH, LOW, Bins, log_width, refuse_of_a_probability
from .common_noise import refuse_common_noise, warn_of_common_noise
from .curve import SUMS, Curve, CurveSum, table_error, truncation, truncation_in_words
from .faults import Faults
from .joining import list_of
from .rules import group_of
from .saved import PER_SAMPLE, WORDS
from .statistics import GroupSums
from .trapezoids import size_of_error

IN_NUMPY = ("log_prob", "stderr", "variance", "nfe", "seed", "sample_index")


@dataclass(frozen=True, eq=False)  # tensors are compared entry by entry: an estimate equals itself alone
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
        method: "density", "discrete" or "elbo"; "discrete_log_prob" where log_prob is the log-probability of levels.
        noise: "sobol" or "independent".
        control: "reference", or "self" where every sample has one that is fitted to its own draws.
        seed, sample_index: of the noise of each sample, int64, shape (B,), on the CPU; seeds modulo 2^64. Samples of
            two calls with the same seed and the same index have the same noise.
        ends: the integrand at both ends of the range, shape (B, 2, 7); see `fastscore.estimator.curve.ends`.
        rule_error: what the method's sum is estimated to be off the integral, nats, and the variance of this estimate,
            float64, shape (B, 2); zeros on a continuous schedule.
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
    seed: Tensor
    sample_index: Tensor
    ends: Tensor
    rule_error: Tensor
    offset: float | Tensor = 0.0
    table: Tensor | None = None
    faults: Faults | None = None
    control: str = "reference"

    @classmethod
    def cat(cls, estimates: Sequence[Estimate]) -> Estimate:
        """Return the estimate of the samples of several estimates, in their order.

        It is that of one call on all of these samples, to rounding, with its mean and the error of it, its curve and
        its truncation, if each call had the `seed`, the `nfe` and the method of that one, and its own samples'
        `sample_index`. A sample that is in two of them, under two seeds, counts as two samples: take the mean of its
        numbers before the mean over samples.

            >>> parts = [density.estimate(x, sample_index=i) for x, i in zip(data.split(100), index.split(100))]
            >>> Estimate.cat(parts).mean()

        Arguments:
            estimates: one at least, on one device, by one method and kind of noise, with as many draws.

        Raises:
            TypeError: for what is no list of estimates.
            ValueError: for none, for estimates that differ in these, and where samples of two batches have the same
                noise, since each began to count at 0: no error of their mean would know of it.
        """
        parts = list_of(Estimate, "estimates", estimates)
        _refuse_unlike(parts)
        refuse_common_noise([part.seed for part in parts], [part.sample_index for part in parts])
        counts = [len(part.log_prob) for part in parts]
        alike = len({part.dims if isinstance(part.dims, int) else None for part in parts}) == 1
        one = parts[0].dims if alike else None
        every = [torch.as_tensor(part.dims, device=part.nfe.device).expand_as(part.nfe) for part in parts]
        return cls(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in PER_SAMPLE},
            curve_sum=CurveSum.joined([part.curve_sum for part in parts]),
            dims=one if isinstance(one, int) else torch.cat(every),
            method=parts[0].method,
            noise=parts[0].noise,
            control=parts[0].control,
            offset=sum(count * part.offset for count, part in zip(counts, parts)) / sum(counts),
            table=parts[0].table,
            faults=Faults.joined(part.faults for part in parts),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the estimate to a .npz file, whole or not at all, in the place of one that is there.

        Raises:
            ValueError: for another kind of file, or numbers that are not finite (`check`).
            FileNotFoundError: if there is no such folder.
        """
        saved.write(saved.path_of(path), to_arrays(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Estimate:
        """Return the estimate in a file of `save`, equal to the bit, on the CPU; nothing in the file is executed.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: for a file that `save` did not write, such as a result of `fastscore evaluate`, or that is
                damaged.
        """
        return from_arrays(saved.read(saved.path_of(path)))

    def check(self) -> Estimate:
        """Return the estimate itself, once the device has said that all numbers are finite.

        On a CPU `ScoreDensity.estimate` has asked before; on a GPU the first number that is read on the host asks.

        Raises:
            ValueError: if the data or an evaluation had NaN or inf, with the first sample and where it arose.
        """
        if self.faults is not None:
            self.faults.tell()
        return self

    @property
    def group(self) -> Tensor:
        """Which samples share their nodes, int64 in 0 .. 15, shape (B,), on the CPU (`fastscore.estimator.rules`)."""
        return group_of(self.sample_index)

    @cached_property
    def log_snr_curve(self) -> Curve:
        """Where in log-SNR the integral comes from, averaged over the batch."""
        self.check()
        return self.curve_sum.curve()

    @cached_property
    def discretization(self) -> float:
        """What the method's sum is off the integral, nats, averaged over the batch, in which signs cancel.

        For method "density" an estimate of the trapezoid rule's error over a table, too large where a short table meets
        few evaluations, and NaN for fewer than three timesteps; zero on a continuous schedule, where nodes have no bias
        and their error is in `stderr`. For "discrete" and "elbo" their `offset`.
        """
        return float(self.offset) if self.table is None else table_error(self.log_snr_curve, self.table)

    @cached_property
    def discretization_per_sample(self) -> Tensor:
        """How far the method's sum is off the integral for each sample, a size in nats, float64, shape (B,).

        For method "density" an estimate of the trapezoid rule's error over a table from a sample's own draws, where it
        stands out of their noise, and in steps wider than 3.5 a bound (`fastscore.estimator.trapezoids`); NaN for
        fewer than three timesteps, zero on a continuous schedule. For "discrete" and
        "elbo" the difference of sum and integral on the same evaluations. It is in no `stderr`; 1.96 of that, this and
        `truncation_per_sample` together are what one sample's log_prob may be off.
        """
        return size_of_error(self.rule_error)

    @cached_property
    def truncation_per_sample(self) -> Tensor:
        """An estimate, for each sample, of what lies outside of the schedule's range, nats, shape (B,).

        Infinite where fewer than four draws lie within the range.
        """
        return truncation(self.ends)

    @cached_property
    def truncation(self) -> float:
        """The largest of `truncation_per_sample`, nats."""
        self.check()
        return float(self.truncation_per_sample.max())

    def numpy(self) -> dict[str, np.ndarray]:
        """Return what is known of each sample in arrays of numpy on the host, each of shape (B,).

        log_prob, stderr, truncation and discretization in nats, variance in nats squared, nfe, seed and sample_index
        int64. The arrays are copies: writing into them changes no estimate.

        Raises:
            ValueError: as `check`.
        """
        self.check()
        found = {name: getattr(self, name) for name in IN_NUMPY} | {
            "truncation": self.truncation_per_sample,
            "discretization": self.discretization_per_sample,
        }
        return {name: value.detach().cpu().numpy().copy() for name, value in found.items()}

    def bits_per_dim(self, bins: Bins = None, low: float = LOW, high: float = HIGH) -> Tensor:
        r"""Return bits per dimension, shape (B,); lower is better.

        .. math:: -\big(\log p(x)/d + \log\Delta\big) / \log 2, \qquad \Delta = (high - low) / bins

        `bins` is a number, or a `fastscore.Levels`, which brings its own low and high:

            >>> result.bits_per_dim(levels)

        Discrete data with `bins` levels, dequantized by x = low + Delta (level + u), u uniform in [0, 1), has the
        log-probability log p(x) + d log Delta (in expectation over u, a lower bound): for 8-bit data in [-1, 1)
        Delta = 2/256. Without `bins` the data are continuous, Delta = 1, and the number is a differential entropy
        rate, which may be negative and depends on the units of x. With a mask d is each sample's own. Whether the
        data lie in [low, high) is not known here: `evaluate_dataset` and `BitsPerDim` warn where they do not. A result
        of `discrete_log_prob` is the log-probability already, and takes no bins.

        Raises:
            ValueError: for fewer than 2 bins, high <= low, ends without bins or that are not those of the levels, and
                for bins of a result of `discrete_log_prob`.
        """
        refuse_of_a_probability(self.method, bins)
        return -(self.log_prob / self.dims + log_width(bins, low, high)) / math.log(2)

    def bits_per_dim_stderr(self) -> Tensor:
        """Return the standard error of `bits_per_dim`, shape (B,)."""
        return self.stderr / self.dims / math.log(2)

    def mean_bits_per_dim(self, bins: Bins = None, low: float = LOW, high: float = HIGH) -> tuple[float, float]:
        """Return the batch mean of `bits_per_dim` and its standard error as an estimate of the data's, as papers do.

        Arguments, bits and errors raised are those of `bits_per_dim`; the standard error is that of `mean`.
        """
        self.check()
        warn_of_common_noise(self.seed, self.sample_index)
        in_bits = 1 / (self.dims * math.log(2))
        return GroupSums.of(self.bits_per_dim(bins, low, high), self.jump * in_bits, self.group).told()

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the lower and upper end of a normal confidence interval for each log_prob, nats."""
        level = share("level", level, 0.95)
        z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64, device="cpu")))
        return self.log_prob - z * self.stderr, self.log_prob + z * self.stderr

    def mean(self) -> tuple[float, float]:
        """Return the batch mean of log_prob and its standard error as an estimate of the data's, nats.

        The spread between samples contains both their own variation and the estimates' noise; what the samples of a
        group have in common is added to it. The error of a single sample's mean is NaN. Samples that were given the
        same `sample_index` have the same noise, of which it knows nothing; it warns of them.
        """
        self.check()
        warn_of_common_noise(self.seed, self.sample_index)
        return GroupSums.of(self.log_prob, self.jump, self.group).told()

    @property
    def dims_in_words(self) -> str:
        """`dims`, or from the least to the most where samples have their own."""
        least, most = (self.dims, self.dims) if isinstance(self.dims, int) else map(int, self.dims.aminmax())
        return f"{most}" if least == most else f"{least} to {most}"

    def __repr__(self) -> str:
        mean, error = GroupSums.of(self.check().log_prob, self.jump, self.group).told()
        spread = f" +- {error:.2g}" if len(self.log_prob) > 1 else ""
        nfe = float(self.nfe.double().mean())
        return (
            f"Estimate({len(self.log_prob)} sample{'s' * (len(self.log_prob) > 1)}, {self.dims_in_words} dims, "
            f"log_prob {mean:.4g}{spread} nats, stderr {float(self.stderr.mean()):.2g} per sample, "
            f"{nfe:.0f} evaluations per sample, {self._of_the_rule()}"
            f"{truncation_in_words(self.truncation)})"
        )

    def _of_the_rule(self) -> str:
        """Return the mean of `discretization_per_sample` in words where it is above the mean stderr; nothing else."""
        size = float(self.discretization_per_sample.mean())
        above = not size <= float(self.stderr.mean())  # NaN is told too
        return f"discretization about {size:.2g} per sample, " if above else ""


def to_arrays(estimate: Estimate) -> dict[str, np.ndarray]:
    """Return all that an estimate says in arrays by name, which a .npz file holds without pickle."""
    estimate.check()
    found = {name: getattr(estimate, name).detach().cpu().numpy() for name in PER_SAMPLE}
    found |= {f"curve_{name}": getattr(estimate.curve_sum, name).detach().cpu().numpy() for name in SUMS}
    found["curve_count"] = np.int64(estimate.curve_sum.count)
    found["dims"] = torch.as_tensor(estimate.dims, device="cpu").detach().numpy()
    found |= {name: np.array(getattr(estimate, name)) for name in WORDS}
    found["offset"] = np.float64(float(estimate.offset))
    return found if estimate.table is None else found | {"table": estimate.table.detach().cpu().numpy()}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Estimate:
    """Return the estimate that `to_arrays` made these of, on the CPU."""
    dims = torch.from_numpy(np.asarray(arrays["dims"]))
    sums = (torch.from_numpy(arrays[f"curve_{name}"]) for name in SUMS)
    return Estimate(
        **{name: torch.from_numpy(arrays[name]) for name in PER_SAMPLE},
        curve_sum=CurveSum(*sums, int(arrays["curve_count"])),
        dims=dims if dims.ndim else int(dims),
        **{name: str(arrays[name]) for name in WORDS if name in arrays},
        offset=float(arrays["offset"]),
        table=torch.from_numpy(arrays["table"]) if "table" in arrays else None,
    )


def _refuse_unlike(estimates: Sequence[Estimate]) -> None:
    """Raise ValueError where estimates cannot be one, with what differs."""
    for name, values in {
        "methods": [each.method for each in estimates],
        "kinds of noise": [each.noise for each in estimates],
        "control variates": [each.control for each in estimates],
        "devices": [str(each.log_prob.device) for each in estimates],
        "numbers of draws": [len(each.curve_sum.log_snr) for each in estimates],
        "tables": [None if each.table is None else each.table.numpy().tobytes() for each in estimates],
    }.items():
        if len(set(values)) > 1:
            got = "others" if name == "tables" else ", ".join(map(str, dict.fromkeys(values)))
            raise ValueError(
                f"estimates that are joined must have the same {name}, got {got}; call one density for all, with the "
                "same arguments but the samples and their own"
            )


def mean_in_words(name: str, value: Tensor, stderr: Tensor) -> str:
    """Return the mean of numbers (nats) with its error by their spread, and the mean of their own errors, if any."""
    value, stderr = (each.detach().double() for each in (value, stderr))
    spread = f" +- {float(value.std()) / math.sqrt(len(value)):.2g}" if len(value) > 1 else ""
    own = f", stderr {float(stderr.mean()):.2g} per sample" if bool((stderr > 0).any()) else ""
    return f"{name} {float(value.mean()):.4g}{spread} nats{own}"
