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

BLOCK = 1 << 18  # numbers of a tensor that there are several of at once


class Picked(Reference):
    """A `Reference` whose every sample has the component that explains it best alone.

    `log_prob` is that of the component, without its weight: what stands before an integral along the component's own
    residuals. It is no density in x.
    """

    @property
    def told(self) -> Picked | None:
        """Another one by which estimates are told, None for itself; draws are fitted beside this one.

        Log q is of that one, and so is what lies beyond the range of log-SNR, where a reference stands for the network.
        """
        found = self._modules.get("told")
        assert isinstance(found, Picked | None)
        return found

    def told_by(self, other: Picked) -> Picked:
        """Return the same, by which draws are fitted, with another one by which estimates are told."""
        found = Picked.from_tensors(self.tensors())
        found._modules["told"] = other
        return found

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
        """Return the log-density of each sample's component, nats, float64, (B,), by the one that tells."""
        return (self.told or self).pick(x)[1]

    def course_apart(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        r"""Return :math:`E\|e_{told}\|^2 - E\|e_q\|^2` of each sample at each level of noise, float64, (R, B)."""
        return self.told._course(x, alpha, sigma) - self._course(x, alpha, sigma)

    def _course(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the mean squared residual of each sample's component at each level, float64, (R, B)."""
        picked, _, y = self.pick(x)
        variance, square, found = self.variance.expand(-1, x.shape[1])[picked], y.square(), []
        for a, s in zip(*(v.square()[:, None, None].split(max(1, BLOCK // x.numel())) for v in (alpha, sigma))):
            total = a * variance + s
            found.append((((a * variance).square() + a * s * square) / total.square()).sum(-1))
        return torch.cat(found)

    @own_dtypes
    def coordinates(self, vectors: Tensor, component: Tensor) -> Tensor:
        """Return vectors of the samples, (B, R, d), in the basis of their components, int64, (B,)."""
        if not self.full:
            return self.turn(vectors)
        basis = self.basis.to(vectors.dtype)
        return vectors @ (basis[0] if self.components == 1 else basis[component])
