"""The ops around, and instead of, a forward pass, as torch.library custom ops: schema, fake and gradient, once each.

- `fastscore::perturb` makes the noised rows, `fastscore::residual` reduces the network's answers to one number a row.
- `fastscore::density_mlp` does both and everything between, for a network that is a row program.
- `fastscore::control` evaluates a reference's residual by itself.

They work under autograd, torch.compile and torch.export. `backend` names the module of `fastscore.ops` that
computes; `fastscore/ops/torch.py` is what each kernel is tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import torch as torch_backend
from .gradient import gradients
from .select import implementation
from .task import Evaluation


@torch.library.custom_op("fastscore::perturb", mutates_args=())
def perturb(
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    sign: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    keep_eps: bool = True,
    dtype: torch.dtype | None = None,
    backend: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Return (x_t, eps) with x_t = alpha x + sigma eps and the noise eps of `fastscore.ops.noise`.

    Arguments:
        x: data, float32 or float64, shape (B, d).
        keys: each sample's words (Q, M), int32, shape (B, 2, d).
        points: each row's words P, int32, shape (R, d).
        sign: of each row, -1 for an antithetic twin; as alpha and sigma in the dtype of x, shape (R,).
        keep_eps: whether eps is wanted; `residual` makes it again where it is not there.
        dtype: of x_t, rounded once from the dtype of x; that of x if None.

    Returns:
        Two tensors of shape (B, R, d), eps in x's dtype; it carries no gradient, and is empty unless kept.
    """
    return implementation(backend).perturb(x, keys, points, sign, alpha, sigma, keep_eps, dtype or x.dtype)


@perturb.register_fake
def _(
    x: Tensor, keys: Tensor, points: Tensor, sign: Tensor, alpha: Tensor, sigma: Tensor, keep_eps: bool = True,
    dtype: torch.dtype | None = None, backend: str = "torch",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (x.shape[0], points.shape[0], x.shape[1])
    return x.new_empty(shape, dtype=dtype or x.dtype), x.new_empty(shape if keep_eps else (0,))


def _perturb_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[4])
    ctx.mark_non_differentiable(output[1])


def _perturb_backward(ctx: Any, grad_x_t: Tensor, grad_eps: Tensor) -> tuple[Tensor | None, ...]:
    (alpha,) = ctx.saved_tensors
    return torch.einsum("brd,r->bd", grad_x_t.to(alpha.dtype), alpha), *(None,) * 8


perturb.register_autograd(_perturb_backward, setup_context=_perturb_setup)


@torch.library.custom_op("fastscore::residual", mutates_args=())
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
    backend: str = "torch",
) -> Tensor:
    """Return the squared norm of eps - eps_hat = c (a eps + b x - prediction) of every row.

    Arguments:
        prediction: the network's answers in the dtype of the sums, shape (B, R, d).
        x: data, shape (B, d).
        eps: the noise, shape (B, R, d); empty where it is to be made again from the next three.
        keys, points, sign: as `perturb` got them.
        a, b, c: coefficients of each row (`fastscore.process.predictions`), shape (R,).

    Returns:
        Shape (B, R), differentiable with respect to prediction and x.
    """
    return implementation(backend).residual(prediction, x, eps, keys, points, sign, a, b, c)


@residual.register_fake
def _(
    prediction: Tensor, x: Tensor, eps: Tensor, keys: Tensor, points: Tensor, sign: Tensor,
    a: Tensor, b: Tensor, c: Tensor, backend: str = "torch",
) -> Tensor:  # fmt: skip
    return prediction.new_empty(prediction.shape[:2])


def _residual_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _residual_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    backend = "torch" if torch.is_grad_enabled() else ctx.backend  # no kernel has the gradient of a gradient
    grad_prediction, grad_x = implementation(backend).residual_backward(grad, *ctx.saved_tensors)
    return grad_prediction, grad_x, *(None,) * 8


residual.register_autograd(_residual_backward, setup_context=_residual_setup)


def by(backend: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """Return `perturb` and `residual` by a backend.

    Where nothing is differentiated PyTorch's are the definitions themselves: an operator of our own around them takes
    as long as they do on a few rows.
    """
    if backend == "torch" and not torch.is_grad_enabled():
        return torch_backend.perturb, torch_backend.residual
    return partial(perturb, backend=backend), partial(residual, backend=backend)


@torch.library.custom_op("fastscore::control", mutates_args=())
def control(
    x: Tensor, keys: Tensor, points: Tensor, sign: Tensor, alpha: Tensor, sigma: Tensor, reference: list[Tensor],
    backend: str = "torch",
) -> Tensor:  # fmt: skip
    """Return the squared norm of eps - eps_q of every row, shape (B, R); no gradient.

    Arguments:
        x, keys, points, sign: as in `perturb`.
        alpha, sigma: of each row, float64, shape (R,).
        reference: weight, mean, variance and basis of a `Reference`.
    """
    return implementation(backend).control(x, keys, points, sign, alpha, sigma, reference)


@control.register_fake
def _(
    x: Tensor, keys: Tensor, points: Tensor, sign: Tensor, alpha: Tensor, sigma: Tensor, reference: list[Tensor],
    backend: str = "torch",
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], points.shape[0])


@torch.library.custom_op("fastscore::density_mlp", mutates_args=())
def density_mlp(
    x: Tensor,
    keys: Tensor,
    points: Tensor,
    rows: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    code: str,
    weights: list[Tensor],
    tables: list[Tensor],
    reference: list[Tensor],
    backend: str,  # no default: the autograd of lists loses arguments that equal theirs
) -> Tensor:
    r"""Return :math:`\|\epsilon - \hat\epsilon\|^2 - \|\epsilon - \epsilon_q\|^2` of every row of a row program.

    Arguments:
        x, keys, points: as in `perturb`.
        rows: sign, alpha, sigma, a, b, c of each row in the dtype of x, shape (R, 6).
        alpha, sigma: the same in float64, for the reference.
        code: the program's instructions, as `instructions.encode` writes them.
        weights, tables: what they index (`fastscore.program`).
        reference: weight, mean, variance and basis of the control variate, or nothing for none.

    Returns:
        Shape (B, R) in the dtype of x, differentiable with respect to x, weights and tables: the backward pass
        evaluates the rows again, in one kernel or in plain PyTorch (`fastscore.ops.gradient`).
    """
    given = Evaluation(x, keys, points, rows, alpha, sigma, code, weights, tables, reference)
    return implementation(backend).density_mlp(given)


@density_mlp.register_fake
def _(x: Tensor, keys: Tensor, points: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape[0], points.shape[0])


def _density_mlp_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, keys, points, rows, alpha, sigma, ctx.code, weights, tables, reference, ctx.backend = inputs
    ctx.counts = len(weights), len(tables)
    ctx.save_for_backward(x, keys, points, rows, alpha, sigma, *weights, *tables, *reference)


def _density_mlp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | Sequence[Tensor | None] | None, ...]:
    x, keys, points, rows, alpha, sigma, *rest = ctx.saved_tensors
    n, m = ctx.counts[0], sum(ctx.counts)
    given = Evaluation(x, keys, points, rows, alpha, sigma, ctx.code, rest[:n], rest[n:m], rest[m:])
    found = gradients(grad, given, ctx.backend)
    return found[0], *(None,) * 6, *found[1:], [None] * len(given.reference), None


density_mlp.register_autograd(_density_mlp_backward, setup_context=_density_mlp_setup)
