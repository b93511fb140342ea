r"""A mixture of Gaussians at a noise level: the noise that it would predict, with its divergence or its whole Jacobian.

With r_k = (alpha^2 C_k + sigma^2)^{-1} (x_t - alpha m_k), pi the posterior of the components and r the mean of r_k
under it,

.. math:: \epsilon_q = \sigma r, \qquad
    \frac{\partial \epsilon_q}{\partial x_t} = \sigma \Big(\sum_k \pi_k \big((\alpha^2 C_k + \sigma^2)^{-1}
    - r_k r_k^T\big) + r r^T\Big)

of which the divergence is the trace. All that the level decides is known beforehand, of all levels of a grid at once.
All components at once are K x B x d numbers: as many as an exact trace of a network has in hand anyway.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..process.masks import inside
from ..support.autocast import own_dtypes
from . import turning


class Level(NamedTuple):
    """What a mixture's posterior means need at one noise level, in the dtype of the data; made by `of` or `each`.

    Attributes:
        sigma: the level.
        gain: 1 / (alpha^2 C_k + sigma^2) along the basis, (K, d).
        mean: alpha m_k, (K, d) or (K, 1).
        trace: the sum of gain over the entries that count, (K, 1), or with a mask (K, B).
        bias: log-posterior of the components without its quadratic form, up to a constant, of that shape.
        basis: eigenvectors, (K, d, d), or none.
        factors: what turns the data (`fastscore.reference.turning`), or none.
    """

    sigma: float
    gain: Tensor
    mean: Tensor
    trace: Tensor
    bias: Tensor
    basis: Tensor | None
    factors: turning.Factors

    @classmethod
    def of(
        cls, tensors: list[Tensor], alpha: float, sigma: float, d: int, dtype: torch.dtype, mask: Tensor | None
    ) -> Level:
        """Return a mixture of `Reference.tensors()` at one level, for data (B, d) of which a mask says what counts."""
        gain, mean, trace, bias = _tables(tensors, alpha, sigma, d, dtype, mask)
        return cls(sigma, gain, mean, trace, bias, *_turns(tensors, dtype))

    @classmethod
    def each(
        cls,
        tensors: list[Tensor],
        alpha: Tensor,
        sigma: Tensor,
        sigmas: list[float],
        d: int,
        dtype: torch.dtype,
        mask: Tensor | None,
    ) -> list[Level]:
        """Return a mixture at levels alpha, sigma (T,), float64 on its device; `sigmas` are the same on the host."""
        tables = _tables(tensors, alpha[:, None, None], sigma[:, None, None], d, dtype, mask)
        basis, factors = _turns(tensors, dtype)
        each = zip(*(table.unbind() for table in tables))
        return [
            cls(own, gain, mean, trace, bias, basis, factors) for own, (gain, mean, trace, bias) in zip(sigmas, each)
        ]

    @property
    def _single(self) -> bool:
        return len(self.gain) == 1

    @own_dtypes
    def eps_and_divergence(self, x_t: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\epsilon_q(x_t)`, shape (B, d), and its divergence, (B,), or (1,) where it is that of all.

        Both are of the entries that count, if a mask (B, d) says which; the others are zero. Differentiable in x_t.
        """
        r_k, posterior = self._parts(x_t, mask)
        if posterior is None:
            return self._turn_back(self.sigma * self._back(r_k)[0]), self.sigma * self.trace[0]
        inner = (posterior * (self.trace - r_k.square().sum(2))).sum(0)
        r = torch.einsum("kb,kbd->bd", posterior, self._back(r_k))
        return self._turn_back(self.sigma * r), self.sigma * (inner + r.square().sum(1))

    @own_dtypes
    def eps_and_jacobian(self, x_t: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\epsilon_q(x_t)`, (B, d), and its Jacobian, symmetric, (B, d, d), or (1, d, d) of all.

        Rows and columns of entries that do not count, if a mask (B, d) says which do, are zero.
        """
        r_k, posterior = self._parts(x_t, mask)
        r_k = self._back(r_k)
        inverse = torch.diag_embed(self.gain)  # (K, d, d)
        if self.basis is not None:
            inverse = self.basis @ inverse @ self.basis.mT
        if posterior is None:
            r, jacobian = r_k[0], inverse
        else:
            r = torch.einsum("kb,kbd->bd", posterior, r_k)
            jacobian = torch.einsum("kb,kij->bij", posterior, inverse) + r[:, :, None] * r[:, None]
            jacobian = jacobian - torch.einsum("kb,kbi,kbj->bij", posterior, r_k, r_k)
        jacobian = self._turn_back(self._turn_back(jacobian).mT)
        if mask is not None:
            jacobian = torch.where(mask[:, :, None] & mask[:, None], jacobian, 0)
        return self._turn_back(self.sigma * r), self.sigma * jacobian

    def _parts(self, x_t: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return r_k along the basis, (K, B, d), and the posterior, (K, B); None of one component."""
        x_t = turning.turn(x_t, self.factors) if self.factors else x_t
        r_k = inside(x_t - self.mean[:, None], mask)
        r_k = r_k if self.basis is None else r_k @ self.basis
        if self._single:
            return r_k * self.gain[:, None], None
        posterior = (self.bias - 0.5 * (r_k.square() @ self.gain[..., None])[..., 0]).softmax(0)
        return r_k * self.gain[:, None], posterior

    def _back(self, r_k: Tensor) -> Tensor:
        return r_k if self.basis is None else r_k @ self.basis.mT

    def _turn_back(self, x: Tensor) -> Tensor:
        return turning.turn_back(x, self.factors) if self.factors else x


@own_dtypes
def _tables(
    tensors: list[Tensor],
    alpha: float | Tensor,
    sigma: float | Tensor,
    d: int,
    dtype: torch.dtype,
    mask: Tensor | None,
) -> list[Tensor]:
    """Return gain, mean, trace and bias, with the levels first where alpha and sigma are tensors (T, 1, 1)."""
    weight, mean, variance, *_ = tensors
    gain = 1 / (alpha**2 * variance + sigma**2)
    gain = gain.expand(*gain.shape[:-1], d)
    counted = torch.ones_like(variance[:1]).expand(1, d) if mask is None else mask.to(gain)
    bias = weight.log()[:, None] + 0.5 * gain.log() @ counted.mT
    return [value.to(dtype) for value in (gain, alpha * mean, gain @ counted.mT, bias)]


def _turns(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor | None, turning.Factors]:
    basis, factors = tensors[3], tensors[4:]
    return basis.to(dtype) if basis.numel() else None, factors
