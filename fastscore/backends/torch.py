r"""The definition of truth: both ops in plain PyTorch, for any device and for float32 and float64.

.. math:: \epsilon = \pm\mathrm{normal}((P \oplus Q) M), \quad x_t = \alpha x + \sigma\epsilon, \qquad
    r^2 = \| c\,(a\,\epsilon + b\,x - \mathrm{prediction}) \|^2

Shapes: B samples, R rows (draws with their antithetic twins) a sample, d dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import noise


def perturb(
    x: Tensor, keys: Tensor, points: Tensor, sign: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (x_t, eps), each (B, R, d); x (B, d), keys (B, 2, d) and points (R, d) int32, the others (R,)."""
    eps = noise.normal(noise.combine(keys, points), sign[:, None], x.dtype)
    x_t = sigma[None, :, None] * eps
    return x_t.addcmul_(alpha[None, :, None], x[:, None]), eps


def residual(prediction: Tensor, x: Tensor, eps: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return the squared norm of c (a eps + b x - prediction), shape (B, R)."""
    # A network that predicts eps, the common kind, needs one pass instead of three. (Asking a GPU would stall it.)
    plain = x.device.type == "cpu" and bool((a == 1).all()) and bool((b == 0).all())
    error = eps - prediction if plain else _error(prediction, x, eps, a, b)
    return (c * torch.linalg.vector_norm(error, dim=-1)).square_()


def residual_backward(
    grad: Tensor, prediction: Tensor, x: Tensor, eps: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `residual` with respect to prediction (B, R, d) and x (B, d)."""
    grad_error = (2 * c.square() * grad)[..., None] * _error(prediction, x, eps, a, b)
    return -grad_error, (b[:, None] * grad_error).sum(1)


def _error(prediction, x, eps, a, b):
    return torch.addcmul(a[:, None] * eps, b[:, None], x[:, None]) - prediction
