r"""The density formula as a training objective.

.. math:: -\log p(x) = -\log q(x)
    + \tfrac12 \int E\big[\, \|\epsilon - \hat\epsilon(x_\lambda)\|^2
        - \|\epsilon - \epsilon_q(x_\lambda)\|^2 \,\big]\, d\lambda

One evaluation a sample estimates the integral without bias when log-SNR is drawn with density p and weighted by 1/p.
The reference q lowers the variance of the loss alone, since it has no parameters. What lowers that of the gradient:
log-SNRs stratified over the batch; antithetic noise, because at the clean end the gradient is almost odd in eps; and
nodes that follow the network (`AdaptiveNodes`).

References:
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
    Variational Diffusion Models (Kingma et al., 2021), https://arxiv.org/abs/2107.00630
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..density import ScoreDensity
from ..estimator.nodes import NodeDensity
from ..estimator.protocol import Density, check_density
from ..estimator.samples import Samples, deferred
from ..ops import noise
from ..process.conditions import takes_conditions
from ..process.masks import inside
from ..process.network import predict
from ..process.predictions import coefficients
from .nodes import AdaptiveNodes

REDUCTIONS = ("mean", "none")
MISSED = 0.1  # units of log-SNR at either end, which nodes may leave out


@takes_conditions
def density_loss(
    density: Density,
    x: Tensor,
    *,
    seed: int,
    mask: Tensor | None = None,
    draws: int = 1,
    antithetic: bool = False,
    nodes: AdaptiveNodes | None = None,
    reduction: str = "mean",
    cond: dict | None = None,
    **named,
) -> Tensor:
    """Return an unbiased estimate of -log p(x) in nats: the mean over the batch, or one a sample.

    Log-SNRs are stratified over batch and draws. Outside the schedule's range the integrand counts as the reference's.

    Arguments:
        density: network, schedule, nodes and reference to train with; `Transformed` where x is not what it sees.
        x: data, shape (B, *shape).
        seed: key of the noise; give every step, and every process, another one: the step's number for instance.
        mask: which entries count, as in `ScoreDensity.estimate`; the loss is -log p of these given the others.
        draws: noise levels a sample.
        antithetic: evaluate eps and -eps at every draw: two evaluations, of which the mean has less than half the
            variance, most of all where the data are clean.
        nodes: where in log-SNR to draw instead of `density.nodes`; they learn from this call.
        reduction: "mean", a scalar; or "none", shape (B,), each unbiased by itself.
        cond, named: keyword arguments of the network, as in `ScoreDensity.estimate`.

    Raises:
        TypeError: if the density is none.
        ValueError: as `ScoreDensity.estimate` does for bad data; for an unknown reduction, or less than one draw; if
            the loss of a sample is NaN or inf (named by sample; on a GPU with `nodes`, which wait for it anyway, or
            FASTSCORE_CHECK=now in the environment: else such a loss is NaN, and nothing waits).
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    z, log_det = check_density(density).to_network(x, mask)
    mask, cond = density.network_arguments(x, mask, cond)
    core = density.core
    if nodes is not None:
        _check_range(nodes.density, core)
    samples = core.check(z, None, cond, mask=mask)
    rows = _draw(samples, nodes.density if nodes is not None else core.nodes.density, seed, draws)
    signs = (1, -1) if antithetic else (1,)
    difference, pull = _evaluate(core, samples, rows, signs)
    integral = difference.reshape(draws, len(samples)).mean(0)
    loss = 0.5 * integral + (log_det - core.reference.log_prob(samples.x, samples.mask)).to(integral)
    if nodes is not None or not deferred(samples.device):
        _check_finite(loss, samples)
    if nodes is not None:  # which learn nothing from what is refused
        nodes.observe(rows.log_snr, pull)
    return loss.mean() if reduction == "mean" else loss


def _check_range(nodes: NodeDensity, density: ScoreDensity) -> None:
    """Raise ValueError where nodes leave out a part of the schedule: there the loss would have no gradient."""
    lo, hi = density.schedule.log_snr_range
    first, last = float(nodes.edges[0]), float(nodes.edges[-1])
    if first > lo + MISSED or last < hi - MISSED:
        raise ValueError(
            f"nodes cover log-SNR {first:.3g} to {last:.3g}, the density's schedule {lo:.3g} to {hi:.3g}; make them "
            "with fastscore.AdaptiveNodes(density.schedule)"
        )


def _check_finite(loss: Tensor, samples: Samples) -> None:
    """Raise ValueError for a loss that is no number; this waits for the device."""
    loss = loss.detach()
    bad = (~torch.isfinite(loss)).nonzero()
    if not len(bad):
        return
    first, largest = int(bad[0]), float(samples.x.abs().max())
    remedy = "check its weights, and use a wider dtype than half"
    if largest > torch.finfo(samples.x.dtype).max ** 0.25:
        remedy = f"x has values up to {largest:.3g}, too large for squares in {samples.x.dtype}: scale the data"
    raise ValueError(
        f"the loss is {float(loss[first])} for sample {int(samples.index[first])}, the first of {len(bad)} among "
        f"{len(loss)}: the network returned NaN or inf, or numbers whose squares overflow; {remedy}"
    )


class _Rows(NamedTuple):
    """R draws, those of one number for all samples after the other: log-SNR and 1/p on the CPU, (R,), noise (R, d)."""

    log_snr: Tensor
    weight: Tensor
    eps: Tensor


def _draw(samples: Samples, nodes: NodeDensity, seed: int, draws: int) -> _Rows:
    """Draw log-SNRs from the nodes' density, stratified over all rows, and the noise of each row."""
    count, d = draws * len(samples), samples.x.shape[1]
    index = samples.index.to(samples.device)
    w = torch.cat([noise.words(seed, index, draw, noise.STREAM_LOSS, d + 1) for draw in range(draws)])
    # The first word of each again, where the samples' indices lie anyway: reading it would wait for the device.
    first = torch.cat([noise.words(seed, samples.index, draw, noise.STREAM_LOSS, 1) for draw in range(draws)])[:, 0]
    u = (torch.arange(count, dtype=torch.float64, device="cpu") + noise.uniform(first, torch.float64)) / count
    # Permuted, so that the order of the data does not decide about their log-SNRs.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu")
    log_snr = nodes.quantile(u[order])
    return _Rows(log_snr, 1 / nodes.density_at(log_snr), noise.normal(w[:, 1:], dtype=samples.x.dtype))


def _evaluate(core: ScoreDensity, samples: Samples, rows: _Rows, signs: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    r"""Return each row's integrand over p, and its squared gradient with respect to the prediction, both (R,).

    The integrand is the mean over the signs of :math:`\|\epsilon-\hat\epsilon\|^2 - \|\epsilon-\epsilon_q\|^2`; the
    gradient is that of its half, :math:`c\,(\hat\epsilon - \epsilon)`, averaged over the signs.
    """
    schedule, like = core.schedule, samples.x
    copies = len(signs) * len(rows.log_snr) // len(samples)
    x = like.repeat(copies, 1)
    mask = None if samples.mask is None else samples.mask.repeat(copies, 1)
    eps = inside(torch.cat([sign * rows.eps for sign in signs]), mask)
    time = schedule.time(rows.log_snr).repeat(len(signs))
    alpha, sigma = schedule.alpha_sigma(time)
    weight = rows.weight.repeat(len(signs))
    # One copy to the device for everything that is a number.
    exact = torch.stack([alpha, sigma, *coefficients(core.predicts, schedule, time), weight]).to(like.device)
    scale, noise_scale, a, b, c, weight = exact.to(like)[..., None]
    x_t = scale * x + noise_scale * eps
    x_t = x_t if mask is None else torch.where(mask, x_t, x)
    # As one sample with R rows, since every row has its own time here; conditions go along with the rows.
    (own,) = samples.conds
    prediction = predict(core.model, x_t[None], time.to(x.device), own.tiled(copies), samples.shape, core.time_dtype)[0]
    residual = inside(c * (a * eps + b * x - prediction), mask)
    seen = None if mask is None else mask[None]
    control = eps - core.reference.eps(x_t[None], exact[0], exact[1], seen)[0]
    difference = (weight[:, 0] * (residual.square() - control.square()).sum(1)).reshape(len(signs), -1).mean(0)
    pull = (c * residual.detach()).unflatten(0, (len(signs), -1)).mean(0).square().sum(1)
    return difference, pull
