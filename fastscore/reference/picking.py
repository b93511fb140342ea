r"""A mixture of which every sample has one component as its reference, picked by the sample itself.

For a fixed x the density formula holds for every q, so q may be chosen by looking at x, as long as it is not chosen by
the noise. With the component k* of the largest weighted density,

.. math:: k^*(x) = \operatorname{argmax}_k\, w_k N(x; m_k, C_k), \qquad \log q(x) = \log N(x; m_{k^*}, C_{k^*})

the reference of a sample is one Gaussian. Its residual is linear in the noise, in the coordinates of its basis

.. math:: e_q = \kappa z + m, \qquad \kappa = \frac{\alpha^2 v}{\alpha^2 v + \sigma^2}, \qquad
    m = -\frac{\alpha\sigma\,(U^T x - m_k)}{\alpha^2 v + \sigma^2}

with z the noise, so that its moments are known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..support.autocast import own_dtypes
from . import turning
from .gaussians import Reference


class Picked(Reference):
    """A `Reference` whose every sample has the component that explains it best alone.

    `log_prob` is that of the component, without its weight: what stands before an integral along the component's own
    residuals. It is no density in x.
    """

    @classmethod
    def of(cls, reference: Reference, shape: tuple[int, ...]) -> Picked:
        """Return the mixture with picked components, for samples of a shape.

        An isotropic one of images is told in cosines, in which it is the same: every orthonormal basis has its
        covariances diagonal, and in this one the network's residuals are nearly so.
        """
        own = reference.tensors()
        if reference.mean.shape[1] == 1 and (factors := turning.cosines_of(shape, reference.mean.device)):
            d = math.prod(shape)
            mean, variance = (v.expand(-1, d) for v in own[1:3])
            own = [own[0], turning.turn(mean, factors), variance, own[3], *factors]
        return cls.from_tensors(own)

    def pick(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return of each sample (B, d) the picked component k, int64, its log-density, and its centred coordinates.

        The last two are float64, (B,) and (B, d).
        """
        x = self.turn(x.to(torch.float64))
        y, joint = self.component(0, x)
        picked = torch.zeros_like(joint, dtype=torch.int64)
        for k in range(1, self.components):
            own, log_prob = self.component(k, x)
            better = log_prob > joint
            y, joint = torch.where(better[:, None], own, y), torch.where(better, log_prob, joint)
            picked = picked.masked_fill(better, k)
        return picked, joint - self.weight.log()[picked], y

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the log-density of each sample's component, nats, float64, (B,)."""
        return self.pick(x)[1]

    def expected_integral(self, x: Tensor, lo: float, hi: float, mask: Tensor | None = None) -> Tensor:
        """Return the integral of each sample's component, as `Reference.expected_integral`, float64, (B,)."""
        picked, _, y = self.pick(x)
        variance = self.variance.expand(-1, x.shape[1])[picked]

        def primitive(log_snr: float) -> Tensor:
            sc1 = 1 + math.exp(log_snr) * variance
            return (sc1.log() + 1 / sc1 - y.square() / (variance * sc1)).sum(1)

        return primitive(hi) - primitive(lo)

    @own_dtypes
    def coordinates(self, vectors: Tensor, component: Tensor) -> Tensor:
        """Return vectors of the samples, (B, R, d), in the basis of their components, int64, (B,)."""
        if not self.full:
            return self.turn(vectors)
        basis = self.basis.to(vectors.dtype)
        return vectors @ (basis[0] if self.components == 1 else basis[component])
