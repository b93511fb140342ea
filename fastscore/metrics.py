r"""Log-density as metrics of torchmetrics: over batches, epochs and processes.

With estimates L_i of N samples and their variances v_i,

.. math:: \mathrm{mean} = \tfrac1N \sum_i L_i, \qquad
    \mathrm{stderr}^2 = \frac{\mathrm{Var}(L_i)}{N} + c^2, \qquad
    \mathrm{estimate\_stderr}^2 = \frac{\sum_i v_i}{N^2} + c^2

with c^2 the variance that samples with the same nodes have in common (`fastscore.estimator.statistics.GroupSums`).

The spread of the L_i contains both how samples differ and the noise of their estimates, so the first is the whole error
of the mean as one of the data's distribution, and never to be added to the second. The second alone is the error on
these very samples: what another seed changes, and what more evaluations lower.

Needs torchmetrics: `pip install torchmetrics`.

References:
    TorchMetrics (Detlefsen et al., 2022), https://doi.org/10.21105/joss.04101
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .estimator.bins import HIGH, LOW, Bins, count_outside, in_numbers, log_width, warn_if_outside
from .estimator.estimate import Estimate
from .estimator.protocol import Density, check_density
from .estimator.rules import GROUPS
from .estimator.samples import check_batch
from .estimator.statistics import GroupSums
from .process.conditions import takes_conditions
from .runs.ranks import of_default_group
from .support.untouched import evaluating

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "fastscore.metrics needs the package torchmetrics; install it with: pip install torchmetrics"
    ) from error


class NegativeLogLikelihood(Metric):
    """Mean of -log p(x) in nats with its standard errors, over all samples of all processes.

    The noise of a sample is keyed by the order in which it arrives, as sample n of process r counts as index
    n x processes + r: no two samples share their noise, and the same data give the same number after every `reset`.
    Pass `sample_index` (from the data set) to make it independent of the order and the number of processes, and where
    metrics are merged (`merge_state`, `torchmetrics.wrappers.Running`), since each counts its own arrivals.

    Arguments:
        density: `ScoreDensity` or `Transformed`; not part of this module, so it is neither moved nor stored with it.
        nfe: evaluations per sample; the density's own by default.
        seed: key of the noise.
        options: of `torchmetrics.Metric`, such as `process_group`.

    Raises:
        TypeError: if the density is none.

    Example:
        >>> metric = NegativeLogLikelihood(density, nfe=64)
        >>> for x in loader:
        ...     metric.update(x)
        >>> metric.compute()  # {"nll": ..., "nll_stderr": ..., "nll_estimate_stderr": ...}
    """

    name = "nll"
    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    def __init__(self, density: Density, nfe: int | None = None, seed: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self._density = (check_density(density),)  # in a tuple, or it would become a submodule
        self.nfe, self.seed = nfe, seed
        # Of each group of samples that shares its nodes, since such samples share an error too.
        for state in GroupSums._fields:
            self.add_state(state, torch.zeros(GROUPS, dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("variance", torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("dims", torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="max")
        # Samples whose noise is keyed by the order of arrival, and by an index.
        for state in ("arrived", "indexed"):
            self.add_state(state, torch.zeros((), dtype=torch.int64, device="cpu"), dist_reduce_fx="sum")

    @takes_conditions
    def update(
        self,
        x: Tensor,
        *,
        sample_index: Tensor | None = None,
        mask: Tensor | None = None,
        cond: dict[str, Any] | None = None,
        **named: Any,
    ) -> None:
        """Take in a batch, shape (B, *shape), evaluated in eval mode.

        Arguments:
            sample_index: int64, shape (B,), of the data set; by default the order of arrival, unique over processes.
            mask: which entries count, as in `ScoreDensity.estimate`; samples may then have dimensions of their own.
            cond, named: keyword arguments of the network, as in `ScoreDensity.estimate`.

        Raises:
            ValueError: if the samples have other dimensions than those before; if some batches have a `sample_index`
                and others have none; and as `ScoreDensity.estimate`.
        """
        (density,) = self._density
        check_batch(x)
        arrived = sample_index is None
        if arrived != bool(self.arrived) and bool(self.count.any()):
            raise ValueError(
                f"this batch has {'no' if arrived else 'a'} sample_index and those before had "
                f"{'none' if self.arrived else 'one'}: samples of both may have the same noise; pass it always or never"
            )
        if sample_index is None:
            sample_index = self._arrivals(x)
        with evaluating(density.model):
            options = {"nfe": self.nfe, "seed": self.seed, "sample_index": sample_index, "progress": False}
            found = density.estimate(x, **options, mask=mask, cond=cond).check()
        if mask is None and int(self.dims) not in (0, found.dims):
            raise ValueError(
                f"samples had {int(self.dims)} dimensions so far and now {found.dims}; use one metric each"
            )
        self._see(x, mask)
        value, scale = self._in_unit(replace(found, log_prob=found.log_prob.double()))
        for state, more in zip(self._sums(), GroupSums.of(value.to(self.total), found.jump * scale, found.group)):
            state += more
        self.variance += (found.variance * scale**2).to(self.total).sum()
        self.arrived += len(x) * arrived
        self.indexed += len(x) * (not arrived)
        if mask is None:
            self.dims = torch.full_like(self.dims, found.dims)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Take in the states of another metric, for `merge_state` and `torchmetrics.wrappers.Running`.

        Raises:
            ValueError: where samples of both may have the same noise, or have different dimensions.
        """
        other = {name: incoming_state[name].sum() for name in ("count", "arrived", "dims") if name in incoming_state}
        if len(other) == 3 and other["count"] and self.count.any():
            if other["arrived"] or self.arrived:
                raise ValueError(
                    f"each {type(self).__name__} keys the noise by its own order of arrival, so that samples of two "
                    "have the same; pass sample_index= to update, the place of each sample in the data set"
                )
            if other["dims"] and self.dims and other["dims"] != self.dims:
                raise ValueError(
                    f"samples had {int(self.dims)} dimensions in one metric and {int(other['dims'])} in the other; "
                    "keep them apart"
                )
        super()._reduce_states(incoming_state)

    def forward(self, x: Tensor, **options: Any) -> dict[str, Tensor]:
        """Take in a batch and return the values of that batch on this process alone."""
        before = [state.clone() for state in self._sums()]
        self.update(x, **options)
        return self._values(*(now - old for now, old in zip(self._sums(), before)))

    def compute(self) -> dict[str, Tensor]:
        """Return the mean over all samples, its standard error, and the part of it that is the estimates' own noise.

        The standard error of a single sample is NaN. Values are float64, in the metric's unit.

        Raises:
            ValueError: before any sample was taken in; if some processes passed a `sample_index` and others did not.
        """
        if self.arrived and self.indexed:
            raise ValueError(
                f"{int(self.indexed)} samples have a sample_index and {int(self.arrived)} of other processes none, so "
                "that some may have the same noise; pass it in all processes or in none"
            )
        return self._values(*self._sums())

    def _sums(self) -> tuple[Tensor, ...]:
        return *(getattr(self, name) for name in GroupSums._fields), self.variance

    def _values(self, *sums: Tensor) -> dict[str, Tensor]:
        *of_groups, variance = (each.double() for each in sums)  # whatever `set_dtype` has made of them
        of_groups = GroupSums(*of_groups)
        samples = of_groups.count.sum()
        if not samples:
            raise ValueError(f"{type(self).__name__} has seen no sample; call update(x) first")
        mean, error = of_groups.mean_with_error()
        return {
            self.name: mean,
            f"{self.name}_stderr": error,
            f"{self.name}_estimate_stderr": (variance / samples.square() + of_groups.common_variance()).sqrt(),
        }

    def _see(self, x: Tensor, mask: Tensor | None) -> None:
        """Look at a batch that was taken in."""

    def _in_unit(self, found: Estimate) -> tuple[Tensor, Tensor | float]:
        """Return every sample's value in the metric's unit, and how many of these a nat is."""
        return -found.log_prob, 1.0

    def _arrivals(self, x: Tensor) -> Tensor:
        rank, ranks = of_default_group()
        return (int(self.count.sum()) + torch.arange(len(x), device=x.device)) * ranks + rank


class BitsPerDim(NegativeLogLikelihood):
    """Mean bits per dimension with its standard errors, over all samples of all processes.

    With masks a sample's bits are divided by its own number of entries, and the mean is over samples.

    Arguments:
        density, nfe, seed, options: as in `NegativeLogLikelihood`.
        bins, low, high: levels of discrete data and the ends of the dequantized data, in the user's space, or a
            `fastscore.Levels` alone, as in `Estimate.bits_per_dim`; data outside [low, high) are warned of.

    Raises:
        ValueError: for fewer than 2 bins, or high <= low.
    """

    name = "bits_per_dim"

    def __init__(
        self,
        density: Density,
        bins: Bins = None,
        low: float = LOW,
        high: float = HIGH,
        nfe: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(density, nfe, seed, **options)
        log_width(bins, low, high)  # raises
        self.levels, self._told = in_numbers(bins, low, high), bins is None

    def _see(self, x: Tensor, mask: Tensor | None) -> None:
        """Warn, once, of data outside [low, high)."""
        if not self._told:
            self._told = warn_if_outside(count_outside(x, mask, *self.levels[1:]), *self.levels)

    def _in_unit(self, found: Estimate) -> tuple[Tensor, Tensor]:
        return found.bits_per_dim(*self.levels), 1 / (found.dims * math.log(2))
