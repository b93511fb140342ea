r"""What each timestep of a table weighs: Li and Yan's coefficients and DDPM's, for every kind of prediction.

With :math:`\bar\alpha_1 > \bar\alpha_2 > \dots`, :math:`\alpha_t = \bar\alpha_t/\bar\alpha_{t-1}` and
:math:`\mathrm{target} = a\epsilon + bx`, :math:`\epsilon - \hat\epsilon = c\,(\mathrm{target} - \mathrm{prediction})`,
-log p(x) is a constant plus :math:`\sum_t w_t E\|\mathrm{target} - \mathrm{prediction}\|^2` with

.. math::
    w_t^{density} = \frac{c_t^2}{2} \frac{1-\alpha_{t+1}}{1-\bar\alpha_t}, \qquad
    w_t^{ELBO} = \frac{c_t^2}{2} \frac{1-\alpha_t}{\alpha_t-\bar\alpha_t}

and :math:`\alpha_{T+1} = 0` (t = 1 closes the integral), :math:`w_1^{ELBO} = c_1^2 / 2\alpha_1` (the decoder's term).
Both are rules for the integral over log-SNR, taken at the cleaner and at the noisier end of every step; docs/weights.md
derives them and has what they differ by.

References:
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
    Denoising Diffusion Probabilistic Models (Ho et al., 2020), https://arxiv.org/abs/2006.11239
"""

from __future__ import annotations

from torch import Tensor

from ..estimator.methods import METHODS, table_of
from ..process.predictions import check_prediction, coefficients, must_say_what_it_predicts
from ..process.schedules import Schedule
from ..support.host import chosen, kind_of, numbers


@must_say_what_it_predicts
def density_weights(schedule: Schedule, t: Tensor, predicts: str, rule: str = "discrete") -> Tensor:
    r"""Return the weights with which the density formula sums a table's timesteps.

    .. math:: w_t = \tfrac12 c_t^2\, (1-\alpha_{t+1}) / (1-\bar\alpha_t)

    Arguments:
        schedule: a table of timesteps, such as `DDPM.linear(1000)`.
        t: timesteps, integers 0 .. T-1 (the paper's t, less one), any shape.
        predicts: what the network returns, a key of `fastscore.process.predictions.PREDICTIONS`.
        rule: "discrete", the paper's coefficients; or "density", the trapezoid rule in log-SNR that `density_loss` and
            `ScoreDensity.estimate` use, whose error is of second order.

    Returns:
        Nats per squared unit of the prediction's error, float64, shape of t.

    Raises:
        TypeError: if `predicts` is missing, or the schedule is no `Schedule`.
        ValueError: for a schedule without a table, a timestep outside of it, an unknown prediction or rule.
    """
    if not chosen(rule, ("discrete", "density")):
        raise ValueError(f"rule must be 'discrete' (Li and Yan's) or 'density' (trapezoid in log-SNR), got {rule!r}")
    return _weights(schedule, t, predicts, rule)


@must_say_what_it_predicts
def elbo_weights(schedule: Schedule, t: Tensor, predicts: str) -> Tensor:
    r"""Return the weights with which DDPM's evidence lower bound sums a table's timesteps, posterior variances.

    .. math:: w_t = \tfrac12 c_t^2\, (1-\alpha_t) / (\alpha_t-\bar\alpha_t), \qquad w_1 = \tfrac12 c_1^2 / \alpha_1

    Arguments:
        schedule, t, predicts: as in `density_weights`.

    Returns:
        Nats per squared unit of the prediction's error, float64, shape of t.

    Raises:
        TypeError, ValueError: as `density_weights`.
    """
    return _weights(schedule, t, predicts, "elbo")


def _weights(schedule: Schedule, t: Tensor, predicts: str, method: str) -> Tensor:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a fastscore Schedule such as DDPM.linear(1000), got {kind_of(schedule)}")
    if not schedule.discrete:
        raise ValueError(
            f"timestep weights need a table of timesteps such as DDPM.linear(1000), got {schedule!r}; "
            "density_loss weighs continuous schedules by itself"
        )
    t = numbers("t", t, f"timesteps of the table, integers 0 to {int(schedule.time_range[1])}")
    log_snr = schedule.log_snr(t)  # raises for a timestep that the table lacks
    if check_prediction(predicts) == "flow":
        schedule.derivatives(t)  # raises: a table has none
    every = METHODS[method].weights(table_of(schedule)[1]).flip(0)  # of timestep 0, 1, ..
    return 0.5 * coefficients(predicts, schedule, t).c.square() * every[t.long().cpu()].to(log_snr.device)
