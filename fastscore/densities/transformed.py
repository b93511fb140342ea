r"""The density of data in the user's own space, where the network knows a transformed one.

.. math:: \log p(x) = \log p_z(z) - \log|\det \partial T/\partial z|, \qquad x = T(z)

The determinant is exact, so an estimate's standard error is that of log p_z.

References:
    Density Estimation Using Real NVP (Dinh et al., 2017), https://arxiv.org/abs/1605.08803 (the change of variables)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform

from ..density import ScoreDensity
from ..estimator.comparison import Comparison
from ..estimator.estimate import Estimate
from ..estimator.protocol import Density, check_density, of_core
from ..estimator.samples import check_batch
from ..process import masks
from ..process.network import model_device
from ..reference.gaussians import Reference
from ..support.modes import differentiable, ordinary
from ..transforms import moved
from .bijection import believed, check_bijection

FIT_BATCH = 4096


class Transformed(Density):
    """A density seen through a bijection: all that takes a `ScoreDensity` takes it, with the user's data.

    Arguments:
        density: of z, the network's own data; a `ScoreDensity`, or a `Transformed` one to go through two bijections.
        transform: bijective, from z to the user's x, as in `torch.distributions.TransformedDistribution`; see
            `fastscore.transforms` for z-scores, logits and whitening. Its tensors move with `.to(device)`; it is
            no part of `state_dict()`, which holds the network and what `fit` found.

    Raises:
        TypeError: if either is something else.
        ValueError: if the transform is not bijective, or the density one in a subspace; at the first data, if its
            inverse does not undo it, or its log-determinant is not that of its derivative.

    Example:
        >>> density = ScoreDensity(model, VP(), predicts="eps")  # trained on (x - mean) / std
        >>> Transformed(density, zscore(mean, std)).fit(train).log_prob(x)
    """

    def __init__(self, density: Density, transform: Transform) -> None:
        super().__init__()
        if check_density(density).subspace:
            raise ValueError(
                f"a transform changes the density of every entry, and {density.subspace} have fewer dimensions than "
                "entries; give the density positions in the network's own scale, and for a factor s of them add "
                "dims * log(1 / s) to log_prob"
            )
        if not isinstance(transform, Transform):
            raise TypeError(
                f"transform must be a torch.distributions Transform such as fastscore.transforms.zscore(mean, std), "
                f"got {type(transform).__name__}"
            )
        if not transform.bijective:
            raise ValueError(
                f"transform must be bijective, got {transform}; a map that loses information has no density"
            )
        self.density, self.transform = density, transform
        self._checked: Transform | None = None  # which of the transforms was asked

    model, schedule, predicts = of_core("model"), of_core("schedule"), of_core("predicts")
    nfe, log_snr_range = of_core("nfe"), of_core("log_snr_range")

    @property
    def core(self) -> ScoreDensity:
        """The `ScoreDensity` of z."""
        return self.density.core

    @differentiable
    def log_prob(self, x: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Return log p(x) in nats, shape (B,), differentiable in x and the network's parameters.

        Arguments:
            x: data in the user's space, floating point, shape (B, *shape).
            options: as in `ScoreDensity.log_prob`; a mask needs an elementwise transform.

        Raises:
            ValueError: if x lies outside the transform's range (named by sample), and as `ScoreDensity.log_prob`.
        """
        z, log_det = self.to_network(x, mask)
        found = self.core.log_prob(z, mask=mask, **options)
        return (found.double() - log_det).to(found.dtype)

    @ordinary
    @torch.no_grad()
    def estimate(self, x: Tensor, *, mask: Tensor | None = None, **options: Any) -> Estimate:
        """Return log p(x) with its standard error; arguments as in `ScoreDensity.estimate`.

        `bits_per_dim(bins, low, high)` of the result takes low and high in the user's space. The curve over log-SNR
        is that of z.

        Raises:
            ValueError: as `log_prob`.
        """
        z, log_det = self.to_network(x, mask)
        found = self.core.estimate(z, mask=mask, **options)
        return replace(found, log_prob=(found.log_prob.double() - log_det).to(found.log_prob.dtype))

    def compare(
        self, x: Tensor, cond_a: dict[str, Any], cond_b: dict[str, Any], *, mask: Tensor | None = None, **options: Any
    ) -> Comparison:
        """Return log p(x | a) - log p(x | b): the determinant cancels. As in `ScoreDensity.compare`."""
        return self.core.compare(self.to_network(x, mask)[0], cond_a, cond_b, mask=mask, **options)

    def fit(self, data: Tensor, *, mask: Tensor | None = None, **options: Any) -> Transformed:
        """Fit the reference and the nodes to data in the user's space, as in `ScoreDensity.fit`; return self."""
        check_batch(data)
        # In batches through the device of the network, which the data may not fit.
        device = model_device(self.core.model, data.device)
        counted, parts = None if mask is None else masks.broadcast_mask(mask, data), []
        for start in range(0, len(data), FIT_BATCH):
            chosen = slice(start, start + FIT_BATCH)
            some = None if counted is None else counted[chosen].to(device)
            parts.append(self.to_network(data[chosen].to(device), some)[0].to(data.device))
        self.core.fit(torch.cat(parts), mask=mask, **options)
        return self

    def with_reference(self, reference: Reference | None) -> Transformed:
        """Return the density through the same bijection with another reference of z, as `ScoreDensity` does."""
        return Transformed(self.density.with_reference(reference), self.transform)

    def to_network(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return z, in the dtype of x, and log|det dx/dz| of the entries that count, in float64, shape (B,).

        Raises:
            ValueError: if x is not floating point (B, *shape), lies outside the transform's range or on its edge; if
                the transform changes the number of dimensions; for a mask and a transform that is not elementwise.
        """
        check_batch(x)
        if mask is not None and max(self.transform.domain.event_dim, self.transform.codomain.event_dim) > 0:
            raise ValueError(
                f"a mask needs a transform that acts on every entry by itself, such as zscore or Logit, got "
                f"{self.transform}; leave the mask out, or give the density without the transform"
            )
        self.transform = moved(self.transform, x.device)
        event = self.transform.codomain.event_dim
        if event >= x.ndim:
            raise ValueError(
                f"x must have the transform's {event} dimensions and a batch before them, got shape {tuple(x.shape)}"
            )
        try:
            wide, z = self._inverse(x)
            inside = self.transform.codomain.check(wide.detach()).reshape(len(x), -1).all(1)
        except (RuntimeError, AssertionError, IndexError) as error:  # torch's own say so in any of these
            if "size of tensor" not in str(error) and not believed(self.transform):
                raise
            raise ValueError(
                f"x has shape {tuple(x.shape[1:])} a sample, and {self.transform} is one of samples of another shape: "
                f"{str(error).splitlines()[0]}; give x as the transform, or the estimator it is of, takes it"
            ) from None
        if z.shape[:1] != x.shape[:1] or z.numel() != x.numel():
            raise ValueError(
                f"the transform must keep the number of dimensions, got x {tuple(x.shape)} and z {tuple(z.shape)}; "
                "densities in spaces of other dimension do not compare"
            )
        inside &= torch.isfinite(z.detach().to(x.dtype)).reshape(len(x), -1).all(1)
        inside |= ~torch.isfinite(wide.detach()).reshape(len(x), -1).all(1)  # of which the density itself complains
        if not bool(inside.all()):
            first = int((~inside).nonzero()[0])
            remedy = "check the scaling, or dequantize"
            if mask is not None:
                remedy += ", or give the entries that the mask leaves out a number inside of the range"
            raise ValueError(
                f"x must lie inside the range of {self.transform}, got {int((~inside).sum())} of {len(x)} samples "
                f"outside or on its edge, first sample {first}; {remedy}"
            )
        log_det = self.transform.log_abs_det_jacobian(z, wide).to(torch.float64)
        if log_det.ndim == 0:  # the same for all that it is a number of
            log_det = log_det.expand(z.shape[: z.ndim - self.transform.domain.event_dim])
        log_det = log_det.reshape(len(x), -1)
        self._check_once(z, wide, log_det)
        if mask is not None:
            log_det = masks.inside(log_det, masks.mask_rows(mask, x))
        inner, inner_log_det = self.density.to_network(z.to(x.dtype), mask)
        return inner, inner_log_det + log_det.sum(1)

    def _inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x and z = T^-1(x), in float64 where the transform's own tensors go with it, else in the dtype of x."""
        wide = x.to(torch.float64)
        try:
            return wide, self.transform.inv(wide)
        except RuntimeError as error:  # of a product with a matrix in another dtype
            if "dtype" not in str(error):
                raise
            if x.dtype == torch.float64:
                raise ValueError(
                    f"x is {x.dtype} and {self.transform} has tensors of another dtype: {error}; give both the same"
                ) from None
            return x, self.transform.inv(x)

    def _check_once(self, z: Tensor, x: Tensor, log_det: Tensor) -> None:
        if self._checked is not self.transform and len(x) and not believed(self.transform):
            check_bijection(self.transform, z[:1], x[:1], log_det[:1])
        self._checked = self.transform

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformed:
        super()._apply(fn, recurse)
        self.transform = moved(self.transform, fn(torch.zeros((), device="cpu")).device)
        return self

    def extra_repr(self) -> str:
        return f"(transform): {self.transform}"
