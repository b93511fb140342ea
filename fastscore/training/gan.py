r"""Score-matching regularization of a generator: -log p of its samples under a trained score network.

.. math:: \min_G\; L_{GAN}(G) + \gamma\, E_{z}\big[-\log p(G(z))\big]

with the density formula for log p. The second term is :math:`KL(p_G \| p)` plus the entropy of p_G: it drives samples
out of regions without data, where a discriminator is flat, and knows nothing of modes that the generator leaves out.
Alone, or with a large weight, it contracts the generator onto the highest density. With the best discriminator L_GAN is
2 JS(p_G, p_data) and the minimum is where

.. math:: \log\frac{p_G}{p_G + p_{data}} - \gamma \log p = \mathrm{const}, \qquad
    p_G = p_{data}\, \frac{C p^\gamma}{1 - C p^\gamma}

so a small weight changes a perfect generator in proportion to it.

References:
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765, section 4.2
    SMaRt: Improving GANs with Score Matching Regularity (Xia et al., 2023), https://arxiv.org/abs/2311.18208
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..estimator.protocol import Density, check_density
from ..process.conditions import takes_conditions
from ..support.modes import refuse_vmap
from ..support.untouched import frozen, undisturbed
from .losses import density_loss


@takes_conditions
def score_regularization(
    density: Density,
    x: Tensor,
    *,
    seed: int,
    mask: Tensor | None = None,
    draws: int = 1,
    antithetic: bool = True,
    reduction: str = "mean",
    cond: dict[str, Any] | None = None,
    **named: Any,
) -> Tensor:
    """Return an unbiased estimate of -log p(x) in nats whose gradient reaches x alone: a generator's loss term.

    Its gradient is an unbiased estimate of that of -log p(x); the score network's parameters get none.

    Arguments:
        density: of a trained score network in eval mode; `Transformed` where samples are not what it sees.
        x: generated samples, shape (B, *shape), with their graph.
        seed: key of the noise; give every step another one.
        mask, draws, antithetic, reduction, cond, named: as in `density_loss`.

    Raises:
        TypeError, ValueError: as `density_loss`.
    """
    refuse_vmap("score_regularization")
    options = {"mask": mask, "draws": draws, "antithetic": antithetic, "reduction": reduction}
    model = check_density(density).model
    with frozen(model), undisturbed(model):
        return density_loss(density, x, seed=seed, cond=cond, **options)
