r"""What a network predicts: one row of data (a, b, c) for each parametrization.

With x_t = alpha x + sigma eps, every usual target is linear in the noise and the data, and the formula's residual
is a multiple of the prediction error:

.. math:: \mathrm{target} = a\,\epsilon + b\,x, \qquad
    \epsilon - \hat\epsilon = c\,(\mathrm{target} - \mathrm{prediction})

This form needs no x_t, so it cancels least. The multiple c of x0-like predictions grows as exp(log_snr / 2).
`eps_from` is the same relation solved for :math:`\hat\epsilon = c_F F + c_X x_t`, which samplers and the ODE need.

References:
    Variational Diffusion Models (Kingma et al., 2021), https://arxiv.org/abs/2107.00630
    Understanding Diffusion Objectives (Kingma and Gao, 2023), https://arxiv.org/abs/2303.00848
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor

from ..support.generic import Arguments, Result
from ..support.spelling import did_you_mean
from .schedules import Schedule


class Coefficients(NamedTuple):
    """Per-node (a, b, c), each float64 of the nodes' shape."""

    a: Tensor
    b: Tensor
    c: Tensor


def _eps(alpha: Tensor, sigma: Tensor, d_alpha: Tensor | None, d_sigma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(sigma), torch.zeros_like(sigma), torch.ones_like(sigma)


def _x0(alpha: Tensor, sigma: Tensor, d_alpha: Tensor | None, d_sigma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(sigma), torch.ones_like(sigma), -alpha / sigma


def _v(alpha: Tensor, sigma: Tensor, d_alpha: Tensor | None, d_sigma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return alpha, -sigma, alpha / (alpha**2 + sigma**2)


def _score(
    alpha: Tensor, sigma: Tensor, d_alpha: Tensor | None, d_sigma: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return -1 / sigma, torch.zeros_like(sigma), -sigma


def _flow(alpha: Tensor, sigma: Tensor, d_alpha: Tensor, d_sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return d_sigma, d_alpha, alpha / (alpha * d_sigma - d_alpha * sigma)


class Prediction(NamedTuple):
    """A parametrization: what the network returns, in words, and its (a, b, c) of alpha, sigma and their slopes."""

    meaning: str
    row: Callable[..., tuple[Tensor, Tensor, Tensor]]


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction("the noise", _eps),
    "x0": Prediction("the clean data", _x0),
    "denoiser": Prediction("the clean data, as EDM calls it", _x0),
    "v": Prediction("alpha eps - sigma x", _v),
    "score": Prediction("the gradient of log p_t at x_t", _score),
    "flow": Prediction("the velocity dx_t/dt", _flow),
}


# How other libraries call them.
ELSEWHERE = {
    "epsilon": "'eps'",
    "noise": "'eps'",
    "sample": "'x0'",
    "data": "'x0'",
    "x": "'x0'",
    "x-start": "'x0'",
    "xstart": "'x0'",
    "velocity": "'flow' (the velocity dx_t/dt) or 'v' (alpha eps - sigma x)",
}


def what_it_must_say(argument: str = "predicts") -> str:
    """Return the sentence for a call that does not say what its network returns."""
    known = ", ".join(f"{name!r} ({prediction.meaning})" for name, prediction in PREDICTIONS.items())
    return (
        f"{argument} must say what the network returns, one of {known}; it has no default, as nothing in a network "
        "tells, and the wrong one gives wrong numbers"
    )


def must_say_what_it_predicts(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let calls of a function that lack its argument `predicts` raise TypeError with the sentence on it."""
    place = list(signature(function).parameters).index("predicts")

    @wraps(function)
    def called(*args: Arguments.args, **named: Arguments.kwargs) -> Result:
        if len(args) <= place and "predicts" not in named:
            raise TypeError(what_it_must_say())
        return function(*args, **named)

    return called


def check_prediction(predicts: str) -> str:
    """Return the name if it is known; raise ValueError listing the valid names if not."""
    if not isinstance(predicts, str) or predicts not in PREDICTIONS:
        meant = did_you_mean(predicts, PREDICTIONS, ELSEWHERE)
        raise ValueError(f"predicts must be one of {', '.join(sorted(PREDICTIONS))}; got {predicts!r}{meant}")
    return predicts


def coefficients(predicts: str, schedule: Schedule, t: Tensor) -> Coefficients:
    """Return (a, b, c) at the schedule's times t.

    Arguments:
        predicts: a key of `PREDICTIONS`.
        schedule: the forward process.
        t: times in the schedule's own coordinate, shape (S,).

    Raises:
        ValueError: for an unknown name, or predicts="flow" on a discrete table.
    """
    return scales_and_coefficients(predicts, schedule, t)[1]


def scales_and_coefficients(predicts: str, schedule: Schedule, t: Tensor) -> tuple[tuple[Tensor, Tensor], Coefficients]:
    """Return (alpha, sigma) and (a, b, c) at the schedule's times, asked of it once; as `coefficients`."""
    check_prediction(predicts)
    alpha, sigma = schedule.alpha_sigma(t)
    d_alpha, d_sigma = schedule.derivatives(t) if predicts == "flow" else (None, None)
    return (alpha, sigma), Coefficients(*PREDICTIONS[predicts].row(alpha, sigma, d_alpha, d_sigma))


def eps_from(predicts: str, schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return (c_F, c_X) at times t with eps_hat = c_F F + c_X x_t, float64, shape of t.

    Solving target(eps, x) = F together with x_t = alpha x + sigma eps for eps gives c_F = c and c_X = -c b / alpha.
    """
    (alpha, _), (_, b, c) = scales_and_coefficients(predicts, schedule, t)
    return c, -c * b / alpha
