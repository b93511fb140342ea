"""A density as a `torch.distributions.Distribution`, for code that knows no diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ..estimator.protocol import Density, check_density
from ..process.conditions import Conditions, merged
from ..support.host import seed_of, whole
from ..support.structure import flatten
from .transformed import Transformed
from .zero_mean import TOLERANCE

SEEDS = 1 << 62


def as_distribution(
    density: Density,
    event_shape: Sequence[int],
    *,
    nfe: int | None = None,
    seed: int | None = 0,
    memory: int | str | None = None,
    cond: dict[str, Any] | None = None,
    validate_args: bool | None = None,
    **named: Any,
) -> DensityDistribution:
    r"""Return a density as a `torch.distributions.Distribution`, whose `log_prob` is the density's own.

    It goes where a distribution is evaluated: `TransformedDistribution`, `Independent`, samplers that want a
    log-density and its gradient, Monte Carlo estimates of a divergence between two. It has no samples (`has_rsample` is
    False, and `sample` raises), no `mean` and no `entropy`.

    **Seeds.** The same values with the same seed give the same numbers: every call of `log_prob` uses the same noise,
    so that it is one fixed, differentiable function, as optimizers and samplers need it. The value at place i of a
    flattened batch has the i-th noise, so a value has another error, though no other expectation, at another place;
    calls with different values share their noise place by place, and so a part of their error. With `seed=None` every
    call draws a seed from torch's global generator: for training, and for means over many calls.

    Arguments:
        density: `ScoreDensity`, `Transformed` or `ZeroMeanDensity`. It is kept, not copied: training or fitting it
            changes the distribution.
        event_shape: shape of one sample, at least one dimension.
        nfe: network evaluations per value; the density's own by default.
        seed: of the noise, or None for another one in every call.
        memory: as in `ScoreDensity.estimate`.
        cond, named: conditions of the network. What `fastscore.per_sample` marks has one entry for each distribution of
            the batch, shape (B, ...), and makes the `batch_shape` (B,); everything else is shared by all, and the
            `batch_shape` is () without the former. A tensor whose first size is above one has to be marked, with
            `per_sample` or `fastscore.shared`, since the number of values cannot say later what it is.
        validate_args: whether `log_prob` looks at the shape and the support of its values; by default as
            `torch.distributions` does.

    Returns:
        A `Distribution` with `log_prob(value)` in nats for values of shape (\*sample, \*batch, \*event), differentiable
        in the value and in the parameters of the network. Its support is the reals, the range of the transform of a
        `Transformed` density, or the centred positions of a `ZeroMeanDensity`.

    Raises:
        TypeError: if density is none.
        ValueError: if event_shape is no shape or has no dimension, if conditions per sample differ in their number, if
            a condition could be either, or for a mask, which leaves no distribution of whole events.

    Example:
        >>> posterior = as_distribution(from_sbi(estimator, x), (3,), nfe=64)
        >>> posterior.log_prob(theta)  # theta: (..., 3)
        >>> many = as_distribution(from_sbi(estimator), (3,), condition=per_sample(observations))  # batch_shape (B,)
    """
    if "mask" in named:
        raise ValueError(
            "mask is no option of as_distribution: the density of some entries given the others is none of whole "
            "events; call density.log_prob(x, mask=...), and give a condition of this name by cond={'mask': ...}"
        )
    conditions, batch = _told_apart(merged(cond, named))
    options = {"nfe": nfe if nfe is None else whole("nfe", nfe), "memory": memory}
    event = _shape(event_shape)
    index = torch.arange(batch or 1, device="cpu").reshape(() if batch is None else (batch,))
    seed = seed if seed is None else seed_of(seed)
    return DensityDistribution(check_density(density), event, conditions, index, seed, options, validate_args)


class DensityDistribution(Distribution):
    """What `as_distribution` returns.

    Attributes:
        density: that is evaluated.
        seed: of the noise; None for another one in every call.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        density: Density,
        event_shape: torch.Size,
        conditions: Conditions,
        index: Tensor,
        seed: int | None,
        options: dict[str, Any],
        validate_args: bool | None = None,
    ) -> None:
        """Arguments: index says which entry of the conditions each member of the batch has, int64, batch_shape."""
        self.density, self.seed = density, seed
        self._conditions, self._index, self._options = conditions, index, options
        super().__init__(index.shape, event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Where the density is positive."""
        dims = len(self.event_shape)
        if self.density.subspace:
            return _Centred()
        base = self.density.transform.codomain if isinstance(self.density, Transformed) else constraints.real
        more = dims - base.event_dim
        return constraints.independent(base, more) if more > 0 else base

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density in nats, shape (*sample, *batch), of values (*sample, *batch, *event)."""
        if not isinstance(value, Tensor):
            raise TypeError(f"value must be a tensor, got {type(value).__name__}; torch.as_tensor(value) makes one")
        if self._validate_args and value.numel():  # torch's constraints do not look at nothing
            self._validate_sample(value)
        dims = len(self.event_shape)
        if value.shape[max(0, value.ndim - dims) :] != self.event_shape:
            raise ValueError(
                f"values must have the event_shape {tuple(self.event_shape)} last, got {tuple(value.shape)}; reshape "
                "them, or make the distribution for another event_shape"
            )
        lead = torch.broadcast_shapes(value.shape[: value.ndim - dims], self.batch_shape)
        if lead.numel() == 0:
            return value.new_zeros(lead)
        x = value.expand(lead + self.event_shape).reshape(-1, *self.event_shape)
        cond = self._conditions
        if cond.per_sample:
            chosen = self._index.expand(lead).reshape(-1)
            cond = replace(cond, per_sample={k: v[chosen.to(v.device)] for k, v in cond.per_sample.items()})
        seed = int(torch.randint(SEEDS, (), device="cpu")) if self.seed is None else self.seed
        return self.density.log_prob(x, seed=seed, cond=cond.marked(), **self._options).reshape(lead)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> DensityDistribution:
        """Return the same distribution with another batch_shape, to which its own broadcasts."""
        index = self._index.expand(torch.Size(batch_shape))
        made = DensityDistribution(
            self.density, self.event_shape, self._conditions, index, self.seed, self._options, validate_args=False
        )
        made._validate_args = self._validate_args
        return made

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Raise NotImplementedError: a density is evaluated here, and not drawn from."""
        raise NotImplementedError(
            f"a {type(self.density).__name__} as a distribution has log_prob and no samples, got sample_shape "
            f"{tuple(sample_shape)}; draw with the sampler of the library that trained the network"
        )

    sample = rsample

    @property
    def mean(self) -> Tensor:
        """Raise NotImplementedError, as all moments do: they are integrals over x, and only log_prob is known."""
        raise self._unknown("mean")

    @property
    def variance(self) -> Tensor:
        raise self._unknown("variance")

    def entropy(self) -> Tensor:
        raise self._unknown("entropy")

    def cdf(self, value: Tensor) -> Tensor:
        raise self._unknown("cdf")

    def icdf(self, value: Tensor) -> Tensor:
        raise self._unknown("icdf")

    def _unknown(self, name: str) -> NotImplementedError:
        return NotImplementedError(
            f"a {type(self.density).__name__} as a distribution has log_prob and no {name}; estimate it over samples "
            "of the library that trained the network, the entropy as the mean of -log_prob"
        )

    def __repr__(self) -> str:
        shapes = f"event_shape: {self.event_shape}, batch_shape: {self.batch_shape}"
        return f"{type(self).__name__}({type(self.density).__name__}, {shapes}, seed: {self.seed})"


class _Centred(constraints.Constraint):
    """Positions (..., M, D) whose mean over M is zero, up to what `ZeroMeanDensity` projects away."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        off = value.mean(-2).abs().amax(-1)
        return off <= TOLERANCE * value.abs().amax((-1, -2))


def _told_apart(given: dict[str, object]) -> tuple[Conditions, int | None]:
    """Return the conditions, those that are marked per sample as the batch's, and the size of the batch, if any are."""
    leaves, _ = flatten(given)
    tensors = {path: leaf for path, leaf in leaves.items() if isinstance(leaf.value, Tensor) and leaf.value.ndim}
    sizes = {path: len(leaf.value) for path, leaf in tensors.items() if leaf.per_sample}
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{path!r} {size}" for path, size in sizes.items())
        raise ValueError(f"conditions per sample must have the same first size, got {said}; it is the batch_shape")
    for path, leaf in tensors.items():
        if leaf.per_sample is None and len(leaf.value) > 1:
            raise ValueError(
                f"condition {path!r} of shape {tuple(leaf.value.shape)} could be one entry for each distribution of a "
                "batch, or shared by all; mark it with fs.per_sample(...) or fs.shared(...)"
            )
    batch = next(iter(sizes.values()), None)
    told = Conditions.of(given, batch or 1)
    either = {path: told.per_sample[path] for path in told.guessed}  # of first size one, which is the same in both ways
    own = {path: value for path, value in told.per_sample.items() if path not in either}
    return replace(told, per_sample=own, shared=told.shared | either), batch


def _shape(given: Sequence[int]) -> torch.Size:
    """Return a shape of one dimension at least."""
    entries = tuple(given) if isinstance(given, Sequence) else ()
    if not entries or not all(type(size) is int and size > 0 for size in entries):
        raise ValueError(
            f"event_shape must be the shape of one sample with one dimension at least, got {given!r}; samples of one "
            "number have the shape (1,)"
        )
    return torch.Size(entries)
