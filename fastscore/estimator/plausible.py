r"""Whether a network's answers at both ends of the range are of what it is said to predict.

At either end the share of the noise that the network misses, and that of the reference,

.. math:: m = E\,\|\epsilon - \hat\epsilon(x_t)\|^2 / d, \qquad m_q = E\,\|\epsilon - \epsilon_q(x_t)\|^2 / d

are nearly the same whatever the data are: 0 at the noisy end, where x_t is noise but for a trace of the data, and 1 at
the clean one, where next to nothing tells the noise from the data. A network with m far above m_q returns something
else than `predicts` says, is called with another time than in training (reversed, or in other units), or is not
trained there: a flow's own loss hardly weighs the clean end. The log-density is too low by half of the difference for
each dimension and unit of log-SNR.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..process.predictions import coefficients
from ..reference.gaussians import Reference
from ..support.untouched import uncompiled
from ..support.warn import warn
from .asking import ask
from .network import Network
from .samples import Samples

WORSE = 0.25  # by which m may be above m_q; of trained networks it is by 0.02 at the noisy end, and below at the other
FAR = 5.0  # standard deviations of the reference
NUMBERS, LEAST_ROWS = 64, 4  # that a mean square is taken of, rows of a sample at least


def warn_if_implausible(network: Network, samples: Samples, reference: Reference, rows_at_once: int) -> None:
    """Warn where the network misses far more of the noise than the reference, whichever of two samples is asked."""
    with uncompiled():
        missed = missed_shares(network, samples, reference, rows_at_once)
    for end, shares in zip(("noisiest", "least noisy"), missed.tolist()):
        own, other = min(shares, key=lambda share: share[0] - share[1])  # of an outlier both may be anything
        if own - other > WORSE * max(1.0, other):  # which is large where x lies far from the reference
            warn(
                f"at the {end} time the noise that the network predicts is off by {own:.3g} of the noise's mean "
                f"square, where a Gaussian's is by {other:.3g}: does it predict {network.predicts!r} (predicts=), does "
                "it get the time of its training (schedule=), and was it trained there? log_prob is far too low; "
                "density_loss trains all times, and probability_flow_log_prob asks less of the least noisy one"
            )
            return


@torch.no_grad()
def missed_shares(network: Network, samples: Samples, reference: Reference, rows_at_once: int = 1 << 30) -> Tensor:
    """Return m and m_q of the first and the last sample at the noisy and at the clean end, float64, (2, samples, 2).

    They are zero of a sample far outside of the reference, of which right networks may miss any share.
    """
    two = samples.select(torch.tensor(sorted({0, len(samples) - 1}), device=samples.device))
    rows = max(LEAST_ROWS, math.ceil(NUMBERS / two.x.shape[1]))
    ends = torch.tensor(network.log_snr_range, dtype=torch.float64, device="cpu").repeat_interleave(rows)
    time, generator = network.schedule.time(ends), torch.Generator().manual_seed(0)
    noise = torch.randn(len(two), 2 * rows, two.x.shape[1], generator=generator, dtype=torch.float64, device="cpu")
    eps, x, mask = noise.to(two.x), two.x[:, None], None if two.mask is None else two.mask[:, None]
    alpha, sigma = (v.to(eps) for v in network.schedule.alpha_sigma(time))
    x_t = alpha[:, None] * x + sigma[:, None] * eps
    x_t = x_t if mask is None else torch.where(mask, x_t, x)
    answer = ask(network, two, x_t, time.to(x.device), rows_at_once)
    a, b, c = (v.to(eps)[:, None] for v in coefficients(network.predicts, network.schedule, time))
    of_reference = eps - reference.eps(x_t, alpha, sigma, mask)
    missed = torch.stack([c * (a * eps + b * x - answer), of_reference]).double().square()
    if mask is not None:
        missed = torch.where(mask, missed, 0) / two.mask.double().mean(1)[:, None, None]
    near = two.x.double().square().mean(1) < (FAR * reference.scales()[1]) ** 2
    return (missed.unflatten(2, (2, rows)).mean((3, 4)) * near[:, None]).permute(2, 1, 0)
