"""The two ops around the network in a training step, as torch.library custom ops: schema, fake and gradient.

- `fastscore::loss_rows` makes the noised rows, with the reference's error and log q, which have no parameters.
- `fastscore::loss_difference` reduces the network's answers to one number a row; its gradient is one op as well.

Shapes: B samples, K draws per sample, S signs (2 with antithetic twins), d dimensions. Every draw of every sample has a
time of its own, unlike in `definitions.py`. `around` chooses who computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reference.gaussians import Reference
from ..support.modes import transformed
from . import torch as torch_backend
from .select import implementation, select


def around(
    x: Tensor, numbers: Tensor, reference: Reference, mask: Tensor | None, backend: str
) -> tuple[Callable, Callable]:
    """Return `loss_rows` and `loss_difference` without their last argument.

    They are the ops where a kernel covers all that is asked. In float64, without Triton, under a mask, for a mixture or
    full covariances, where x or a schedule wants a gradient, and for derivatives other than backward passes, they are
    the ops' definitions, under autograd.
    """
    name = select(x.device, x.dtype, backend)
    gradient = torch.is_grad_enabled() and (x.requires_grad or numbers.requires_grad)
    one = reference.components == 1 and reference.along_axes
    if name == "torch" or gradient or mask is not None or not one or transformed():
        return partial(torch_backend.loss_rows, mask=mask), partial(torch_backend.loss_difference, mask=mask)
    return partial(loss_rows, backend=name), partial(loss_difference, backend=name)


@torch.library.custom_op("fastscore::loss_rows", mutates_args=())
def loss_rows(
    x: Tensor, words: Tensor, numbers: Tensor, signs: int, reference: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_t, eps, the squared norm of eps - eps_q, and log q(x); no gradient.

    Arguments:
        x: data, float32 or float64, shape (B, d).
        words: int32, shape (K, B, d + 1); the first of each row is no noise.
        numbers: alpha, sigma, a, b, c (`fastscore.process.predictions`) and weight of each row, float64, (6, K, B).
        signs: 2 for rows with antithetic twins, else 1.
        reference: weight, mean, variance and basis of a `Reference`; one Gaussian along the axes.

    Returns:
        (S, K, B, d) in the dtype of x; the same, or empty where `loss_difference` makes it again; (S, K, B); float64
        (B,).
    """
    return implementation(backend).loss_rows(x, words, numbers, signs, reference)


@loss_rows.register_fake
def _(
    x: Tensor, words: Tensor, numbers: Tensor, signs: int, reference: list[Tensor], backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_t = x.new_empty(signs, *words.shape[:2], x.shape[1])
    eps = x.new_empty(0) if backend != "torch" else torch.empty_like(x_t)
    return x_t, eps, x.new_empty(x_t.shape[:3]), numbers.new_empty(len(x))


@torch.library.custom_op("fastscore::loss_difference", mutates_args=())
def loss_difference(
    prediction: Tensor, x: Tensor, words: Tensor, eps: Tensor, control: Tensor, numbers: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    r"""Return each row's integrand over the density of log-SNR, and its squared gradient, both (K, B).

    The integrand is the mean over the signs of :math:`\|\epsilon-\hat\epsilon\|^2 - \|\epsilon-\epsilon_q\|^2`, times
    the weight, and differentiable with respect to the prediction. The second result is the squared norm of the gradient
    of its half without the weight, :math:`c\,(\hat\epsilon - \epsilon)`, averaged over the signs.

    Arguments:
        prediction: the network's answers in the dtype of x, shape (S, K, B, d).
        x, words, numbers: as `loss_rows` got them.
        eps, control: what it returned.
    """
    return implementation(backend).loss_difference(prediction, x, words, eps, control, numbers)


@loss_difference.register_fake
def _(
    prediction: Tensor, x: Tensor, words: Tensor, eps: Tensor, control: Tensor, numbers: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(prediction.shape[1:3]), x.new_empty(prediction.shape[1:3])


@torch.library.custom_op("fastscore::loss_gradient", mutates_args=())
def loss_gradient(
    grad: Tensor, prediction: Tensor, x: Tensor, words: Tensor, eps: Tensor, numbers: Tensor, backend: str
) -> Tensor:
    """Return the gradient with respect to the prediction, given that of the integrand, (K, B)."""
    return implementation(backend).loss_gradient(grad, prediction, x, words, eps, numbers)


@loss_gradient.register_fake
def _(grad: Tensor, prediction: Tensor, x: Tensor, words: Tensor, eps: Tensor, numbers: Tensor, backend: str) -> Tensor:
    return torch.empty_like(prediction, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prediction, x, words, eps, _, numbers, ctx.backend = inputs
    ctx.save_for_backward(prediction, x, words, eps, numbers)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():  # the gradient shall have one in its turn: PyTorch's operations have it
        return torch_backend.loss_gradient(grad, *ctx.saved_tensors), *(None,) * 6
    return loss_gradient(grad, *ctx.saved_tensors, ctx.backend), *(None,) * 6


loss_difference.register_autograd(_backward, setup_context=_setup)
