r"""Reference densities q: the control variate that carries most of the integral exactly.

For a Gaussian mixture q everything about the diffusion is known in closed form: log q(x), the best noise prediction

.. math:: \epsilon_q(x_t) = \sum_k \pi_k(x_t)\, \sigma\,(\alpha^2 C_k + \sigma^2)^{-1} (x_t - \alpha m_k)

with :math:`\pi_k` the posterior of component k, and for one Gaussian also the expected residual. With s the
signal-to-noise ratio, c an eigenvalue of C and y that coordinate of x - m:

.. math:: E\|\epsilon - \epsilon_q\|^2 = \sum_i \left(\frac{s c_i}{1 + s c_i}\right)^2 + \frac{s\, y_i^2}{(1 + s c_i)^2}

The density formula holds for q as it does for the network, so subtracting the two leaves the mismatch alone.

References:
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..process.masks import inside, summed
from ..support.autocast import own_dtypes
from ..support.buffers import FittedBuffers
from ..support.host import kind_of, positive
from . import turning
from .levels import Level

SCALE_RATIO = 1e-3  # of the narrowest to the widest dimension, at least
FACTORS = ("channels", "rows", "columns")


class Reference(FittedBuffers):
    r"""A Gaussian mixture in d dimensions: isotropic, diagonal, with full covariances, or diagonal in cosines.

    Component k is N(m_k, U_k diag(v_k) U_k^T); without `basis`, U is the identity. With `factors` the data are turned
    first (`fastscore.reference.turning`), and means and variances are those of their coordinates. A last dimension of
    1 in `mean` and `variance` stands for any d, so the default N(0, std^2 I) needs no data. Parameters stay float64
    whatever `.to(dtype)` asks for: they are small, and log q(x) is as exact as they are.

    Methods that take a mask, bool, answer for the marginal of the entries where it is True. Covariances that are not
    along the axes have none in closed form for every time at once: a mask has to be True everywhere then.

    Arguments:
        weight: mixture weights, shape (K,).
        mean: means, shape (K, d) or (K, 1).
        variance: variances along the basis, shape of mean.
        basis: orthogonal matrices with eigenvectors in columns, shape (K, d, d), or None.
        factors: orthonormal matrices (C, C), (H, H) and (W, W) for data of shape (C, H, W), or none; without `basis`.

    Raises:
        ValueError: for shapes that do not fit, weights that do not sum to 1, or variances that are not positive.
    """

    def __init__(
        self,
        weight: Tensor,
        mean: Tensor,
        variance: Tensor,
        basis: Tensor | None = None,
        factors: turning.Factors = (),
    ) -> None:
        _check(weight, mean, variance, basis, factors)
        given = weight, mean, variance, basis, *factors
        self._store(*(value if value is None else value.detach().clone() for value in given))

    def _store(self, weight: Tensor, mean: Tensor, variance: Tensor, basis: Tensor | None, *factors: Tensor) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("mean", mean), ("variance", variance)):
            self.register_buffer(name, _kept(value))
        empty = self.mean.new_empty(0)
        self.register_buffer("basis", empty if basis is None else _kept(basis))
        for name, value in zip(FACTORS, factors or [empty] * len(FACTORS)):
            self.register_buffer(name, _kept(value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "basis" in state_dict:  # of a version that knew no factors
            for name in FACTORS:
                state_dict.setdefault(prefix + name, self.mean.new_empty(0))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def from_tensors(cls, tensors: list[Tensor]) -> Reference:
        """Return the reference whose `tensors` these are; unchecked and not copied, so that a compiler can trace it."""
        reference = cls.__new__(cls)
        reference._store(*tensors)
        return reference

    @classmethod
    def isotropic(cls, std: float = 1.0) -> Reference:
        """N(0, std^2 I) in any dimension."""
        std = positive("std", std, "in units of the data")
        variance = torch.full((1, 1), std**2, device="cpu")
        return cls(torch.ones_like(variance[0]), torch.zeros_like(variance), variance)

    @property
    def components(self) -> int:
        return len(self.weight)

    @property
    def full(self) -> bool:
        """Whether the covariances are full matrices."""
        return self.basis.numel() > 0

    @property
    def factors(self) -> list[Tensor]:
        """What turns the data: matrices along channels, rows and columns, all empty if nothing does."""
        return [getattr(self, name) for name in FACTORS]

    @property
    def turned(self) -> bool:
        """Whether means and variances are those of turned data."""
        return any(factor.numel() for factor in self.factors)

    @property
    def alike(self) -> bool:
        """Whether it is one Gaussian with the same variance in all directions."""
        return self.components == 1 and not self.full and not self.turned and self.variance.shape[1] == 1

    @property
    def along_axes(self) -> bool:
        """Whether the covariances are diagonal in the data themselves, so that entries have marginals."""
        return not self.full and not self.turned

    def scales(self) -> tuple[float, float]:
        """Return the standard deviations of the data in their narrowest and widest dimension, as the mixture has them.

        Directions that hardly vary at all, as constant pixels, count as a thousandth of the widest.
        """
        weight, means, own, basis = map(self.host, ("weight", "mean", "variance", "basis"))
        if self.full:
            own = torch.einsum("kij,kj->ki", basis.square(), own)
        if self.turned:
            factors = [self.host(name) for name in FACTORS]
            own = turning.turn_back(own, [factor.square() for factor in factors])
            means = turning.turn_back(means, factors)
        total = weight @ (own + (means - weight @ means).square())
        largest = float(total.max()) ** 0.5
        return max(float(total.min()) ** 0.5, SCALE_RATIO * largest), largest

    def tensors(self) -> list[Tensor]:
        """Return weight, mean, variance and basis, as the ops take them, and the factors where there are some."""
        return [self.weight, self.mean, self.variance, self.basis, *(self.factors if self.turned else [])]

    def flops(self, d: int) -> int:
        """Multiply-adds times two of one control-variate row, as `torch.utils.flop_counter` counts a network's."""
        if self.full:
            return (2 if self.components == 1 else 4 * self.components) * d * d
        return turning.flops(self.factors, d) + (0 if self.components == 1 else 8 * self.components * d)

    def log_prob(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return log q(x) in nats, shape (B,), for x and mask of shape (B, d); computed in float64, differentiable."""
        x = self.turn(x.to(torch.float64))
        logs = [self.component(k, x, mask)[1] for k in range(self.components)]
        return torch.logsumexp(torch.stack(logs), 0) if self.components > 1 else logs[0]

    def component(self, k: int, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return turned samples (B, d) in the basis of a component, centred, and its weighted log-density, (B,)."""
        y = inside(x - self.mean[k], mask)
        y = y @ self.basis[k] if self.full else y
        terms = y**2 / self.variance[k] + (2 * math.pi * self.variance[k]).log()
        return y, torch.sub(self.weight[k].log(), inside(terms, mask).sum(1), alpha=0.5)

    @own_dtypes
    def residual(
        self, x: Tensor, x_t: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        r"""Return :math:`\|\epsilon - \epsilon_q(x_t)\|^2`, shape (B, R), in the dtype of x_t.

        Arguments:
            x: data, shape (B, d).
            x_t, eps: its noised rows and their noise, shape (B, R, d); the noise is zero outside of the mask.
            alpha, sigma: of each row, float64, shape (R,); where `alike`, of every sample's own rows (B, R) as well.
            mask: of the samples, shape (B, d).
        """
        if self.turned:  # norms stay, and so does what noise is
            x, eps = self.turn(x), self.turn(eps)
            a, s = (v.to(x.dtype)[:, None] for v in (alpha, sigma))
            x_t = None if self.components == 1 else a * x[:, None] + s * eps
        if self.components == 1:
            return self._gaussian_residual(x, eps, alpha, sigma, mask)
        rows = None if mask is None else mask[:, None]
        return torch.linalg.vector_norm(eps - self._eps(x_t, alpha, sigma, rows), dim=-1).square()

    @own_dtypes
    def eps(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Return the best noise prediction :math:`\epsilon_q(x_t)`, in the shape of x_t, zero outside of the mask.

        Arguments:
            x_t, alpha, sigma: as in `residual`.
            mask: broadcasts to x_t, in its last dimension d.
        """
        return self._turn_back(self._eps(self.turn(x_t), alpha, sigma, mask))

    def _eps(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.full:
            return self._full_eps(x_t, alpha, sigma)
        if self.components > 1:
            return self._diagonal_eps(x_t, alpha, sigma, mask)
        alpha, sigma = alpha[:, None], sigma[:, None]
        gain = sigma / (alpha**2 * self.variance + sigma**2)
        return inside(gain.to(x_t.dtype) * (x_t - (alpha * self.mean).to(x_t.dtype)), mask)

    def eps_and_divergence(
        self, x_t: Tensor, alpha: float, sigma: float, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\epsilon_q(x_t)`, shape (B, d), and its divergence, shape (B,), at one time.

        Both are of the entries that count, if a mask (B, d) says which; the others are zero (`levels.Level`).
        """
        level = Level.of(self.tensors(), alpha, sigma, x_t.shape[1], x_t.dtype, mask)
        eps, divergence = level.eps_and_divergence(x_t, mask)
        return eps, divergence.expand(len(x_t))

    def scaled(self, factor: float) -> Reference:
        """Return the mixture of factor * x."""
        return Reference.from_tensors(
            [self.weight, factor * self.mean, factor**2 * self.variance, self.basis, *self.tensors()[4:]]
        )

    def diffused(self, variance: float) -> Reference:
        """Return the mixture convolved with N(0, variance I)."""
        weight, mean, own, *rest = self.tensors()
        return Reference.from_tensors([weight, mean, own + variance, *rest])

    def turn(self, x: Tensor) -> Tensor:
        """Return samples, shape (..., d), in the coordinates that means and variances are of."""
        return turning.turn(x, self.factors) if self.turned else x

    def _turn_back(self, x: Tensor) -> Tensor:
        return turning.turn_back(x, self.factors) if self.turned else x

    def _gaussian_residual(self, x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor | None) -> Tensor:
        """For one Gaussian eps - eps_q = keep eps - pull (x - m), with keep = alpha^2 C / (alpha^2 C + sigma^2)."""
        y = inside(x - self.mean[0].to(x.dtype), mask)
        if self.full:  # the norm is the same in the eigenbasis
            basis = self.basis[0].to(x.dtype)
            y, eps = y @ basis, eps @ basis
        alpha, sigma = alpha[..., None], sigma[..., None]
        signal = alpha**2 * self.variance  # (R, d) or (R, 1); of every sample's own rows (B, R, 1)
        total = torch.addcmul(signal, sigma, sigma)
        keep, pull = (signal / total).to(x.dtype), (alpha * sigma / total).to(x.dtype)
        if keep.shape[-1] > 1:
            return torch.linalg.vector_norm(keep * eps - pull * y[:, None], dim=-1).square()
        # Isotropic, the default: inner products instead of passes over the rows.
        keep, pull = keep[..., 0], pull[..., 0]
        eps_norm = torch.linalg.vector_norm(eps, dim=-1)
        cross = torch.bmm(eps, y[:, :, None])[..., 0]
        return (keep * eps_norm).square() - 2 * keep * pull * cross + pull**2 * y.square().sum(1, keepdim=True)

    def _diagonal_eps(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, mask: Tensor | None) -> Tensor:
        """Posterior mean of the noise by four batched matrix products; nothing of size rows x K x d x B is stored."""
        alpha, sigma = alpha[:, None, None], sigma[:, None, None]
        own_mean, variance = (v.expand(-1, x_t.shape[-1]) for v in (self.mean, self.variance))
        center = self.weight @ own_mean  # expanding squares about it keeps float32 accurate
        mean = (own_mean - center) * alpha  # (R, K, d)
        total = alpha**2 * variance + sigma**2
        gain = 1 / total
        spread = total.log() + gain * mean**2
        seen = None if mask is None else mask.transpose(0, 1)
        # (R, 1, K), or with a mask (R, B, K)
        spread = spread.sum(-1)[:, None] if seen is None else seen.to(spread) @ spread.mT
        bias = self.weight.log() - 0.5 * spread
        gain, gain_mean, bias = (v.to(x_t.dtype) for v in (gain, gain * mean, bias))
        y = inside((x_t - (alpha[:, 0] * center).to(x_t.dtype)).transpose(0, 1), seen)  # (R, B, d)
        logits = bias - 0.5 * (y * y) @ gain.mT + y @ gain_mean.mT
        posterior = logits.softmax(-1)  # (R, B, K)
        eps_q = sigma.to(x_t.dtype) * (y * (posterior @ gain) - posterior @ gain_mean)
        return inside(eps_q, seen).transpose(0, 1)

    def _full_eps(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Posterior mean of the noise, one component after the other with a running softmax."""
        dtype, top, mass, mean_eps = x_t.dtype, None, 0.0, 0.0
        for k in range(self.components):
            basis = self.basis[k].to(dtype)
            total = alpha[:, None] ** 2 * self.variance[k] + sigma[:, None] ** 2  # (R, d)
            z = (x_t - (alpha[:, None] * self.mean[k]).to(dtype)) @ basis
            scaled = z * (1 / total).to(dtype)
            bias = self.weight[k].log() - 0.5 * total.log().sum(-1)
            logit = bias.to(dtype) - 0.5 * (z * scaled).sum(-1)  # (B, R)
            new_top = logit if top is None else torch.maximum(top, logit).detach()
            keep = 0.0 if top is None else (top - new_top).exp()[..., None]
            weight = (logit - new_top).exp()[..., None]
            mass = mass * keep + weight
            mean_eps = mean_eps * keep + weight * (scaled @ basis.mT)
            top = new_top
        return sigma[:, None].to(dtype) * mean_eps / mass

    def gaussian(self) -> Reference:
        """Return the single Gaussian with the same mean and covariance (itself, if it is one already)."""
        if self.components == 1:
            return self
        mean = self.weight @ self.mean
        spread = (self.mean - mean) * self.weight[:, None].sqrt()
        if self.full:
            within = (self.basis * (self.weight[:, None] * self.variance)[:, None, :]) @ self.basis.mT
            variance, basis = torch.linalg.eigh(within.sum(0) + spread.T @ spread)
            return Reference(self.weight.new_ones(1), mean[None], variance[None], basis[None])
        variance = (self.weight @ self.variance + (spread**2).sum(0))[None]
        return Reference(self.weight.new_ones(1), mean[None], variance, factors=self.tensors()[4:])

    def expected_residual(self, x: Tensor, snr: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        r"""Return :math:`\sum_t w_t E\|\epsilon - \epsilon_q\|^2` at signal-to-noise ratios s_t; one Gaussian only.

        Arguments:
            x, mask: data and which entries count, shape (B, d).
            snr, weight: float64, shape (T,).

        Returns:
            float64, shape (B,).
        """
        y2, c = self._centred(x, mask)
        sc1 = 1 + snr[:, None] * c
        constant = summed(weight @ (snr[:, None] * c / sc1) ** 2, mask)
        return constant + y2 @ (weight @ (snr[:, None] / sc1**2))

    def expected_integral(self, x: Tensor, lo: float, hi: float, mask: Tensor | None = None) -> Tensor:
        r"""Return :math:`\int_{lo}^{hi} E\|\epsilon - \epsilon_q\|^2 d\lambda`, float64, (B,); one Gaussian only."""
        y2, c = self._centred(x, mask)

        def primitive(log_snr: float) -> Tensor:
            sc1 = 1 + math.exp(log_snr) * c
            return summed(sc1.log() + 1 / sc1, mask) - y2 @ (1 / (c * sc1))

        return primitive(hi) - primitive(lo)

    def _centred(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.components != 1:
            raise ValueError(
                f"closed-form residuals need one Gaussian, got {self.components} components; use .gaussian()"
            )
        y = inside(self.turn(x.to(torch.float64)) - self.mean[0], mask)
        y = y @ self.basis[0] if self.full else y
        return y**2, self.variance[0].expand(x.shape[1])

    def __repr__(self) -> str:
        kind = "full" if self.full else "isotropic" if self.mean.shape[1] == 1 else "diagonal"
        within = " in cosines" if self.turned else ""
        return f"Reference({self.components} x {kind} Gaussian{within})"


def _kept(value: Tensor) -> Tensor:
    """Return a buffer as a loaded state would hold it: a transposed one rounds otherwise in products."""
    return value.detach().to(torch.float64).contiguous()


def _check(weight: Tensor, mean: Tensor, variance: Tensor, basis: Tensor | None, factors: turning.Factors) -> None:
    given = {"weight": weight, "mean": mean, "variance": variance} | ({} if basis is None else {"basis": basis})
    shapes = {"weight": "(K,)", "mean": "(K, d)", "variance": "(K, d)", "basis": "(K, d, d)"}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{name} of a reference must be a tensor {shapes[name]}, got {kind_of(value)}; torch.tensor makes one"
            )
    if not isinstance(factors, tuple | list):
        raise ValueError(f"factors must be three orthonormal matrices, or none in a tuple (), got {kind_of(factors)}")
    devices = {str(t.device) for t in (weight, mean, variance, basis, *factors) if isinstance(t, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"a reference's tensors must be on one device, got {', '.join(sorted(devices))}; move them")
    if mean.shape != variance.shape or mean.ndim != 2 or weight.shape != mean.shape[:1]:
        raise ValueError(
            f"a reference needs weight (K,), mean (K, d) and variance (K, d); got {tuple(weight.shape)}, "
            f"{tuple(mean.shape)} and {tuple(variance.shape)}"
        )
    if factors and (len(factors) != len(FACTORS) or basis is not None or not turning.are_basis(factors, mean.shape[1])):
        raise ValueError(
            "factors must be three orthonormal matrices, of channels, rows and columns, for samples of "
            f"{mean.shape[1]} numbers and without a basis; got {[tuple(getattr(f, 'shape', ())) for f in factors]}"
        )
    if bool((weight < 0).any()) or abs(float(weight.double().sum()) - 1) > 1e-5:
        raise ValueError(f"weights must sum to 1, got {float(weight.double().sum()):.6g}; divide by their sum")
    if not bool((variance > 0).all()) or not bool(torch.isfinite(mean).all()):
        raise ValueError(f"variances must be positive and means finite, got a variance of {float(variance.min()):.3g}")
