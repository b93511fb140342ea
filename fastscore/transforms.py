r"""Bijections between the space in which a network lives and the one in which its user's data are given.

As in `torch.distributions.TransformedDistribution` a transform goes from the network's z to the user's x = T(z), so

.. math:: \log p(x) = \log p_z\big(T^{-1}(x)\big) - \log|\det \partial T / \partial z|

Any bijective `torch.distributions.Transform` serves, and compositions of them. Here are the ones that data
preparation needs most: `zscore`, `Logit` and `whiten`.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.distributions import AffineTransform, SigmoidTransform, Transform, constraints
from torch.distributions.transforms import _InverseTransform

from .support.host import all_finite, finite, floating, numbers


def zscore(mean: Tensor | float, std: Tensor | float) -> AffineTransform:
    """Return x = mean + std z, for a network trained on z = (x - mean) / std.

    Arguments:
        mean, std: numbers, or tensors that broadcast to one sample; std positive.

    Raises:
        ValueError: if std is not positive and finite.
    """
    expected = "a number, or numbers that broadcast to one sample"
    mean, std = (numbers(name, value, expected) for name, value in (("mean", mean), ("std", std)))  # in float64
    if not bool(torch.isfinite(mean).all()):
        raise ValueError("zscore needs a finite mean, got NaN or inf; leave out the samples that have them")
    if not bool((torch.isfinite(std) & (std > 0)).all()):
        raise ValueError(
            f"zscore needs std > 0, got a least one of {float(std.min())}; leave constant columns out, or use 1"
        )
    return AffineTransform(mean, std)


class Logit(Transform):
    r"""x = low + (high - low) sigmoid(z), for a network trained on z = log((x - low) / (high - x)).

    Unlike `SigmoidTransform` it does not clamp: data on either end has no finite z, and `Transformed` says so.

    Arguments:
        low, high: ends of the data's range, high > low.

    Raises:
        ValueError: if high <= low.
    """

    domain, bijective, sign = constraints.real, True, 1

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        self.low, self.high = finite("low of Logit", low), finite("high of Logit", high)
        if not self.high > self.low:
            raise ValueError(f"Logit needs high > low, got low={low}, high={high}")
        self.codomain = constraints.interval(self.low, self.high)

    def _call(self, z: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(z)

    def _inverse(self, x: Tensor) -> Tensor:
        return torch.log(x - self.low) - torch.log(self.high - x)

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        width = torch.log(z.new_tensor(self.high - self.low))
        return width + torch.nn.functional.logsigmoid(z) + torch.nn.functional.logsigmoid(-z)


class _Sigmoid(Logit):
    """torch's `SigmoidTransform`, by its name, without its clamps, which give data on either end a number."""

    def __repr__(self) -> str:
        return "SigmoidTransform()"


class Whitening(Transform):
    r"""x = mean + U diag(std) z with U orthogonal: principal components of the data, each of unit variance.

    No component is dropped, so the map stays bijective: a density in fewer dimensions is none in the data's space.

    Arguments:
        mean: one sample's shape.
        basis: U, eigenvectors in columns, shape (d, d), orthogonal.
        std: of the components, shape (d,), positive.

    Raises:
        ValueError: for shapes that do not fit, a basis that is not orthogonal, or a std that is not positive.
    """

    bijective = True

    def __init__(self, mean: Tensor, basis: Tensor, std: Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("basis", basis), ("std", std)):
            floating(f"{name} of Whitening", value, "of the data's d numbers")
        d = mean.numel()
        if basis.shape != (d, d) or std.shape != (d,):
            raise ValueError(
                f"Whitening of {d} dimensions needs basis ({d}, {d}) and std ({d},), "
                f"got {tuple(basis.shape)} and {tuple(std.shape)}; keep all components"
            )
        error = float((basis.T @ basis - torch.eye(d, dtype=basis.dtype, device=basis.device)).abs().max())
        # Rounding of a float32 product of d terms, with a margin.
        if error > 1e-5 * max(1.0, d**0.5):
            raise ValueError(
                f"Whitening needs an orthogonal basis, got one with U^T U off by {error:.2g}; use torch.linalg.eigh's"
            )
        if not bool((std > 0).all()):
            raise ValueError(
                f"Whitening needs std > 0 in every component, got a least one of {float(std.min()):.3g}; "
                "the data lie in a subspace: give `floor`, or leave out dependent columns"
            )
        self.mean, self.basis, self.std = mean, basis, std
        self.domain = self.codomain = constraints.independent(constraints.real, max(mean.ndim, 1))

    def _call(self, z: Tensor) -> Tensor:
        flat = (z.flatten(-self.mean.ndim) * self.std.to(z)) @ self.basis.T.to(z)
        return flat.unflatten(-1, self.mean.shape) + self.mean.to(z)

    def _inverse(self, x: Tensor) -> Tensor:
        flat = (x - self.mean.to(x)).flatten(-self.mean.ndim) @ self.basis.to(x) / self.std.to(x)
        return flat.unflatten(-1, self.mean.shape)

    def log_abs_det_jacobian(self, z: Tensor, x: Tensor) -> Tensor:
        return self.std.log().sum().expand(z.shape[: z.ndim - self.mean.ndim])


def whiten(data: Tensor, floor: float = 0.0) -> Whitening:
    """Return the whitening of data, shape (N, *shape): principal components with unit variance, float64.

    Arguments:
        data: floating point, N >= 2.
        floor: least standard deviation of a component, relative to the largest; for data in a subspace.

    Raises:
        ValueError: if the data lie in a subspace and floor is 0; for data that are not so, or not finite.
    """
    data = floating("data", data, "(N, *shape)")
    if data.ndim < 2 or len(data) < 2 or not data.numel():
        raise ValueError(
            f"whiten needs data of shape (N, *shape) with N >= 2, got {tuple(data.shape)}; numbers in a row are "
            "samples after data[:, None]"
        )
    if not all_finite(data):
        raise ValueError("whiten needs finite data, got NaN or inf; leave out the samples that have them")
    floor = finite("floor", floor)
    if not 0 <= floor < 1:
        raise ValueError(f"floor must be a share of the largest standard deviation, 0 or such as 0.001, got {floor:g}")
    x = data.detach().to(torch.float64).flatten(1)
    mean = x.mean(0)
    variance, basis = torch.linalg.eigh(torch.cov((x - mean).T).reshape(x.shape[1], x.shape[1]))
    # Eigenvalues below the rounding of the largest are zero.
    variance = torch.where(variance > 1e-14 * variance.max() * len(variance), variance, 0.0)
    std = variance.sqrt().clamp(min=floor * float(variance.max().sqrt()))
    return Whitening(mean.reshape(data.shape[1:]), basis, std)


def moved(transform: Transform, device: torch.device) -> Transform:
    """Return a transform with its tensors, and those of its parts, on a device: itself, or a copy if they are not.

    A `SigmoidTransform` among them is one that does not clamp.
    """
    if type(transform) is SigmoidTransform:
        return _Sigmoid()
    if isinstance(transform, _InverseTransform):
        forward = moved(transform.inv, device)
        return transform if forward is transform.inv else forward.inv
    there = {name: _moved(value, device) for name, value in vars(transform).items() if name != "_inv"}
    if all(value is getattr(transform, name) for name, value in there.items()):
        return transform
    other = object.__new__(type(transform))
    other.__dict__ = there | {"_inv": None}  # its inverse is made when it is asked for
    return other


def _moved(value: object, device: torch.device) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Transform):
        return moved(value, device)
    if isinstance(value, list | tuple):
        parts = [_moved(part, device) for part in value]
        return value if all(map(operator.is_, parts, value)) else type(value)(parts)
    return value
