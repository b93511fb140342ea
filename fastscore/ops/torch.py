r"""The definition of truth: all ops in plain PyTorch, for any device and for float32 and float64.

.. math:: \epsilon = \pm\mathrm{normal}((P \oplus Q) M), \quad x_t = \alpha x + \sigma\epsilon, \qquad
    r^2 = \| c\,(a\,\epsilon + b\,x - \mathrm{prediction}) \|^2

Shapes: B samples, R rows (draws with their antithetic twins) a sample, d dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..process.masks import inside
from ..reference.gaussians import Reference
from . import noise
from .instructions import decode
from .interpreter import run
from .task import Evaluation


def perturb(
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    sign: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    keep_eps: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (x_t, eps), each (B, R, d); x (B, d), keys (B, 2, d) and points (R, d) int32, the others (R,).

    Here alpha and sigma, and the numbers a, b and c of `residual`, may be those of every sample's own rows, (B, R).
    """
    eps = noise.normal(noise.combine(keys, points), sign[:, None], x.dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return alpha[..., None] * x[:, None] + sigma[..., None] * eps, eps
    x_t = sigma[..., None] * eps
    x_t = x_t.addcmul_(alpha[..., None], x[:, None])
    return x_t.to(dtype or x.dtype), eps if keep_eps else eps.new_empty(0)


def residual(
    prediction: Tensor,
    x: Tensor,
    eps: Tensor,
    keys: Tensor,
    points: Tensor,
    sign: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
) -> Tensor:
    """Return the squared norm of c (a eps + b x - prediction), shape (B, R); an empty eps is made from its words."""
    eps = _eps(eps, x, keys, points, sign)
    # A network that predicts eps, the common kind, needs one pass instead of three. (Asking a GPU would stall it.)
    short = x.device.type == "cpu" and not torch.is_grad_enabled()
    plain = short and bool((a == 1).all()) and bool((b == 0).all())
    error = eps - prediction if plain else _error(prediction, x, eps, a, b)
    return (c * torch.linalg.vector_norm(error, dim=-1)).square()


def residual_backward(
    grad: Tensor,
    prediction: Tensor,
    x: Tensor,
    eps: Tensor,
    keys: Tensor,
    points: Tensor,
    sign: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `residual` with respect to prediction (B, R, d) and x (B, d)."""
    eps = _eps(eps, x, keys, points, sign)
    grad_error = (2 * c.square() * grad)[..., None] * _error(prediction, x, eps, a, b)
    return -grad_error, (b[:, None] * grad_error).sum(1)


def control(
    x: Tensor, keys: Tensor, points: Tensor, sign: Tensor, alpha: Tensor, sigma: Tensor, reference: list[Tensor]
) -> Tensor:
    """Return the squared norm of eps - eps_q, shape (B, R); alpha and sigma in float64."""
    x_t, eps = perturb(x, keys, points, sign, alpha.to(x), sigma.to(x))
    return Reference.from_tensors(reference).residual(x, x_t, eps, alpha, sigma)


def density_mlp(given: Evaluation) -> Tensor:
    """Return the residual of a row program minus the reference's, shape (B, R)."""
    x, keys, points, rows, alpha, sigma, code, weights, tables, reference = given
    sign, row_alpha, row_sigma, a, b, c = rows.unbind(1)
    x_t, eps = perturb(x, keys, points, sign, row_alpha, row_sigma)
    prediction = run(decode(code), weights, tables, x_t.to(weights[0].dtype)).to(x.dtype)
    f = residual(prediction, x, eps, keys, points, sign, a, b, c)
    return f - Reference.from_tensors(reference).residual(x, x_t, eps, alpha, sigma) if reference else f


def loss_rows(
    x: Tensor, words: Tensor, numbers: Tensor, signs: int, reference: list[Tensor], mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_t, eps, the reference's squared error and log q(x), as the op of that name; mask (B, d)."""
    q, exact = Reference.from_tensors(reference), numbers[:2]
    alpha, sigma = exact.to(x.dtype)[..., None]
    eps = inside(_signed(words, signs, x.dtype), mask)
    x_t = alpha * x + sigma * eps
    x_t = x_t if mask is None else torch.where(mask, x_t, x)
    # As one sample, since the reference takes the times of its rows.
    rows = x_t.reshape(1, -1, x.shape[1])
    seen = None if mask is None else mask.expand(x_t.shape).reshape(rows.shape)
    error = eps - q.eps(rows, *exact.reshape(2, -1).repeat(1, signs), seen).reshape(eps.shape)
    return x_t, eps, error.square().sum(-1), q.log_prob(x, mask)


def loss_difference(
    prediction: Tensor,
    x: Tensor,
    words: Tensor,
    eps: Tensor,
    control: Tensor,
    numbers: Tensor,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each row's integrand over the density of log-SNR and its squared gradient, both (K, B)."""
    a, b, c, weight = numbers[2:].to(x.dtype)[..., None]
    eps = eps if eps.numel() else _signed(words, len(prediction), x.dtype)
    residual = inside(c * (a * eps + b * x - prediction), mask)
    difference = (weight[..., 0] * (residual.square().sum(-1) - control)).mean(0)
    return difference, (c * residual.detach()).mean(0).square().sum(-1)


def loss_gradient(grad: Tensor, prediction: Tensor, x: Tensor, words: Tensor, eps: Tensor, numbers: Tensor) -> Tensor:
    """Return the gradient of `loss_difference` with respect to the prediction, given that of its first result."""
    a, b, c, weight = numbers[2:].to(x.dtype)[..., None]
    eps = eps if eps.numel() else _signed(words, len(prediction), x.dtype)
    return -2 / len(prediction) * weight * c.square() * grad[..., None] * (a * eps + b * x - prediction)


def _signed(words: Tensor, signs: int, dtype: torch.dtype) -> Tensor:
    eps = noise.normal(words[..., 1:], dtype=dtype)
    return torch.stack([eps, -eps]) if signs == 2 else eps[None]


def _eps(eps: Tensor, x: Tensor, keys: Tensor, points: Tensor, sign: Tensor) -> Tensor:
    return eps if eps.numel() else noise.normal(noise.combine(keys, points), sign[:, None], x.dtype)


def _error(prediction: Tensor, x: Tensor, eps: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addcmul(a[..., None] * eps, b[..., None], x[:, None]) - prediction
