"""The two ops around a network's forward pass, as torch.library custom ops: schema, fake and gradient, once each.

`fastscore::perturb` makes the noised rows, `fastscore::residual` reduces the network's answers to one number a row.
They work under autograd, torch.compile and torch.export. Kernels slot in behind them; `backends/torch.py` is what
each kernel is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import torch as torch_backend


@torch.library.custom_op("fastscore::perturb", mutates_args=())
def perturb(
    x: Tensor, keys: Tensor, points: Tensor, sign: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (x_t, eps) with x_t = alpha x + sigma eps and the noise eps of `fastscore.noise`.

    Arguments:
        x: data, float32 or float64, shape (B, d).
        keys: each sample's words (Q, M), int32, shape (B, 2, d).
        points: each row's words P, int32, shape (R, d).
        sign: of each row, -1 for an antithetic twin; as alpha and sigma in the dtype of x, shape (R,).

    Returns:
        Two tensors of x's dtype, shape (B, R, d); eps carries no gradient.
    """
    return torch_backend.perturb(x, keys, points, sign, alpha, sigma)


@perturb.register_fake
def _(x, keys, points, sign, alpha, sigma):
    shape = (x.shape[0], points.shape[0], x.shape[1])
    return x.new_empty(shape), x.new_empty(shape)


def _perturb_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[4])
    ctx.mark_non_differentiable(output[1])


def _perturb_backward(ctx, grad_x_t, grad_eps):
    (alpha,) = ctx.saved_tensors
    return torch.einsum("brd,r->bd", grad_x_t, alpha), None, None, None, None, None


perturb.register_autograd(_perturb_backward, setup_context=_perturb_setup)


@torch.library.custom_op("fastscore::residual", mutates_args=())
def residual(prediction: Tensor, x: Tensor, eps: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return the squared norm of eps - eps_hat = c (a eps + b x - prediction) of every row.

    Arguments:
        prediction: the network's answers in the dtype of the sums, shape (B, R, d).
        x: data, shape (B, d).
        eps: the noise, shape (B, R, d).
        a, b, c: coefficients of each row (`fastscore.predictions`), shape (R,).

    Returns:
        Shape (B, R), differentiable with respect to prediction and x.
    """
    return torch_backend.residual(prediction, x, eps, a, b, c)


@residual.register_fake
def _(prediction, x, eps, a, b, c):
    return prediction.new_empty(prediction.shape[:2])


def _residual_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _residual_backward(ctx, grad):
    grad_prediction, grad_x = torch_backend.residual_backward(grad, *ctx.saved_tensors)
    return grad_prediction, grad_x, None, None, None, None


residual.register_autograd(_residual_backward, setup_context=_residual_setup)
