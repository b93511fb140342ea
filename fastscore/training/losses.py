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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..estimator.network_density import NetworkDensity, compiled_of
from ..estimator.nodes import NodeDensity
from ..estimator.protocol import Density, check_density
from ..estimator.samples import Samples, deferred
from ..ops import noise
from ..ops.loss import around
from ..process.conditions import takes_conditions
from ..process.network import predict
from ..process.predictions import scales_and_coefficients
from ..support.host import chosen, flag, kind_of, seed_of, together, whole
from ..support.modes import for_autograd, refuse_vmap
from .nodes import AdaptiveNodes

REDUCTIONS = ("mean", "none")
MOST_ROWS, MOST_NUMBERS = 1 << 24, 1 << 33  # evaluations of one call, and the numbers of x_t in all of them


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
    cond: dict[str, Any] | None = None,
    **named: Any,
) -> Tensor:
    """Return an unbiased estimate of -log p(x) in nats: the mean over the batch, or one a sample.

    Log-SNRs are stratified over batch and draws. Outside the density's range of log-SNR, which is the schedule's as far
    as the data change there, the integrand counts as the reference's.

    Arguments:
        density: network, schedule, nodes and reference to train with; `Transformed` where x is not what it sees.
        x: data, shape (B, *shape).
        seed: key of the noise; give every step, and every process, another one: the step's number for instance.
        mask: which entries count, as in `ScoreDensity.estimate`; the loss is -log p of these given the others.
        draws: noise levels per sample; all evaluations of a call lie in memory at once, at most 16,777,216 of them and
            8.6 billion numbers.
        antithetic: evaluate eps and -eps at every draw: two evaluations, of which the mean has less than half the
            variance, most of all where the data are clean.
        nodes: where in log-SNR to draw instead of `density.nodes`; they go over to the density's range if they have
            another, and learn from this call.
        reduction: "mean", a scalar; or "none", shape (B,), each unbiased by itself.
        cond, named: keyword arguments of the network, as in `ScoreDensity.estimate`.

    Raises:
        TypeError: if the density is none, or the nodes are not `AdaptiveNodes`.
        ValueError: as `ScoreDensity.estimate` does for bad data; for an unknown reduction, less than one draw or more
            than a call holds, or an `antithetic` that is not True or False; if
            the loss of a sample is NaN or inf (named by sample; on a GPU with `nodes`, which wait for it anyway, or
            FASTSCORE_CHECK=now in the environment: else such a loss is NaN, and nothing waits); under torch.func.vmap.
    """
    refuse_vmap("density_loss")
    if not chosen(reduction, REDUCTIONS):
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    draws, antithetic, seed = check_draws(draws), flag("antithetic", antithetic), seed_of(seed)
    if nodes is not None and not isinstance(nodes, AdaptiveNodes):
        raise TypeError(f"nodes must be AdaptiveNodes(density.schedule), got {kind_of(nodes)}; or leave them out")
    x, mask, cond = for_autograd((x, mask, cond))
    z, log_det = check_density(density).to_network(x, mask)
    mask, cond = density.network_arguments(x, mask, cond)
    core = density.core
    samples = core.check(z, None, cond, mask=mask)
    _refuse_too_many(draws * (1 + antithetic), samples)
    # After the check, which lets the density's nodes follow its schedule's ends.
    if nodes is not None:
        nodes.cover(*core.log_snr_range)
    spread = core.nodes.density if nodes is None else nodes.density  # read once, since a device has to be waited for
    log_snr, difference, pull, log_q = _evaluate(core, samples, spread, seed, draws, 1 + antithetic)
    loss = torch.add((log_det - log_q).to(difference), difference.mean(0), alpha=0.5)
    if nodes is not None or not deferred(samples.device):
        _check_finite(loss, samples)
    if nodes is not None:  # which learn nothing from what is refused
        nodes.observe(log_snr, pull.flatten())
    return loss.mean() if reduction == "mean" else loss


def check_draws(draws: object) -> int:
    """Return noise levels per sample as an integer; raise ValueError for what is none, or below 1."""
    if (draws := whole("draws", draws)) < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    return draws


def _refuse_too_many(each: int, samples: Samples) -> None:
    """Raise ValueError for more evaluations than one call holds: all are in one graph, whatever their number."""
    count, d = samples.x.shape
    most = max(1, min(MOST_ROWS, MOST_NUMBERS // d) // count)
    if each > most:
        raise ValueError(
            f"draws must be such that one call has at most {most} evaluations for each of {count} samples of {d} "
            f"numbers, which lie in memory at once, got {each}; give fewer draws, and the mean of calls of other seeds"
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


def _draw(samples: Samples, nodes: NodeDensity, seed: int, draws: int) -> Tensor:
    """Return log-SNRs from the nodes' density, stratified over all rows, float64, shape (draws * B,), on the CPU."""
    count = draws * len(samples)
    # The first word of each row again, where the samples' indices lie anyway: reading it would wait for the device.
    first = torch.cat([noise.words(seed, samples.index, draw, noise.STREAM_LOSS, 1) for draw in range(draws)])[:, 0]
    u = (torch.arange(count, dtype=torch.float64, device="cpu") + noise.uniform(first, torch.float64)) / count
    # Permuted, so that the order of the data does not decide about their log-SNRs.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed)), device="cpu")
    return nodes.quantile(u[order])


class _Evaluated(NamedTuple):
    """Log-SNRs, those of one draw for all samples after the other; what `ops.loss` makes of them; and log q(x)."""

    log_snr: Tensor
    difference: Tensor
    pull: Tensor
    log_q: Tensor


def _evaluate(
    core: NetworkDensity, samples: Samples, nodes: NodeDensity, seed: int, draws: int, signs: int
) -> _Evaluated:
    """Draw a log-SNR and noise for every row, and evaluate the network there: once for each sign of the noise."""
    x, schedule = samples.x, core.schedule
    log_snr = _draw(samples, nodes, seed, draws)
    time = schedule.time(log_snr)
    scales, of_prediction = scales_and_coefficients(core.predicts, schedule, time)
    own = *scales, *of_prediction, 1 / nodes.density_at(log_snr)
    numbers = torch.stack(own).reshape(len(own), draws, -1)
    time = time.to(torch.float64 if time.is_floating_point() else torch.int64).repeat(signs)
    numbers, time, index = together([numbers, time, samples.index], x.device)
    words = torch.stack([noise.words(seed, index, draw, noise.STREAM_LOSS, x.shape[1] + 1) for draw in range(draws)])
    before, after = around(x, numbers, core.reference, samples.mask, core.backend)
    x_t, eps, control, log_q = before(x, words, numbers, signs, core.reference.tensors())
    # As one sample with a row for each, since every row has its own time here; conditions go along with the rows.
    (cond,) = samples.conds
    rows, cond = x_t.reshape(1, -1, x.shape[1]), cond.tiled(signs * draws)
    prediction = predict(core.model, rows, time, cond, samples.shape, core.time_dtype, compiled_of(core)).reshape(
        x_t.shape
    )
    return _Evaluated(log_snr, *after(prediction, x, words, eps, control, numbers), log_q)
