r"""The diffusion loss of a continuous token: a small head models p(x | z) of one token; z comes from a larger network.

The usual loss of such heads is :math:`E_t \|\epsilon - \hat\epsilon(x_t; z)\|^2` without weights. With those of the
density formula it is -log p(x | z), so that tokens have a likelihood as they have with a softmax:

.. math:: -\log p(x | z) = \tfrac d2 \log(2\pi e)
    + \tfrac12 \int \big( E\|\epsilon - \hat\epsilon(x_\lambda; z)\|^2 - d\,\mathrm{sigmoid}(\lambda) \big)\, d\lambda

References:
    Autoregressive Image Generation without Vector Quantization (Li et al., 2024), https://arxiv.org/abs/2406.11838
    A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..density import ScoreDensity
from ..estimator.estimate import Estimate
from ..process.conditions import per_sample
from ..process.ddpm import DDPM
from ..process.masks import bool_mask
from ..process.predictions import must_say_what_it_predicts
from ..process.schedules import Schedule
from ..support.host import floating, kind_of
from .losses import check_draws, density_loss
from .nodes import AdaptiveNodes


class DiffusionLoss(nn.Module):
    """-log p(x | z) of tokens under a head that is called as `head(x_t, t, c=z)`: to train with, and to evaluate.

    All tokens go through the head together: the loss is one call, whatever the number of draws. Evaluations run as row
    programs where that pays (`fastscore.explain(head, (d,), c=z)`), else as calls of as many rows as the memory takes.

    Arguments:
        head: the network, with x_t of shape (rows, d), t (rows,) and z (rows, k) under the keyword `condition`. Outputs
            beyond d, such as MAR's variances, are cut off and not trained.
        schedule: the forward process; by default MAR's, the cosine table of 1,000 steps.
        predicts: what the head returns, as in `ScoreDensity`; MAR's return "eps".
        draws: noise levels a token and step; MAR takes 4.
        condition: the head's keyword for z.
        options: of `ScoreDensity`, such as `program`, `backend`, `nfe` and `time_dtype`.

    Attributes:
        density: the `ScoreDensity` of a token; `fit` it before long evaluations: `loss.density.fit(tokens, c=z)`.
        nodes: where in log-SNR to train, which follows the head as it learns.

    Example:
        >>> loss = DiffusionLoss(head, predicts="eps")
        >>> loss(tokens, z, seed=step, mask=masked).backward()
        >>> loss.log_prob(tokens, z)
    """

    @must_say_what_it_predicts
    def __init__(
        self,
        head: nn.Module,
        schedule: Schedule | None = None,
        *,
        predicts: str,
        draws: int = 4,
        condition: str = "c",
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(condition, str):
            raise TypeError(f"condition must be the head's keyword for z, a text such as 'c', got {condition!r}")
        self.density = ScoreDensity(head, DDPM.cosine(1000) if schedule is None else schedule, predicts, **options)
        self.nodes = AdaptiveNodes(self.density.schedule)
        self.draws, self.condition = check_draws(draws), condition

    def forward(
        self, x: Tensor, z: Tensor, *, seed: int, mask: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        """Return an unbiased estimate of -log p(x | z) in nats, differentiable in the head's weights and in z.

        Arguments:
            x: tokens, floating point, shape (*tokens, d).
            z: their conditions, shape (*tokens, k).
            seed: key of the noise; give every step, and every process, another one.
            mask: which tokens count, bool, shape (*tokens,); all by default.
            reduction: "mean" over the tokens that count, or "none": one number each, in their order.

        Raises:
            ValueError: for shapes that do not fit or a mask without a token; and as `density_loss`.
        """
        x, z, _ = self._rows(x, z, mask)
        # Half as many pairs as draws: the same evaluations, less variance.
        pairs = self.draws % 2 == 0
        return density_loss(
            self.density,
            x,
            seed=seed,
            draws=self.draws // 2 if pairs else self.draws,
            antithetic=pairs,
            nodes=self.nodes,
            reduction=reduction,
            cond={self.condition: per_sample(z)},
        )

    def log_prob(self, x: Tensor, z: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Return log p(x | z) of every token in nats, shape (*tokens,), differentiable in x, z and the weights.

        Arguments:
            x, z, mask: as in `forward`; tokens that do not count have 0, so that sums over tokens are a sequence's.
            options: as in `ScoreDensity.log_prob`.
        """
        rows, conditions, mask = self._rows(x, z, mask)
        found = self.density.log_prob(rows, **self._with(conditions, _placed(options, mask)))
        if mask is None:
            return found.reshape(x.shape[:-1])
        return found.new_zeros(x.shape[:-1]).masked_scatter(mask, found)

    def estimate(self, x: Tensor, z: Tensor, *, mask: Tensor | None = None, **options: Any) -> Estimate:
        """Return the `Estimate` of the tokens that count, in their order, with standard errors.

        Tokens have noise of their own: the variance of a sequence's log-density is the sum of its tokens' `variance`.

        Arguments:
            x, z, mask: as in `forward`.
            options: as in `ScoreDensity.estimate`.
        """
        rows, conditions, mask = self._rows(x, z, mask)
        return self.density.estimate(rows, **self._with(conditions, _placed(options, mask)))

    def _with(self, z: Tensor, options: dict) -> dict:
        """Return the options of a density with z among the conditions."""
        return options | {"cond": {**(options.get("cond") or {}), self.condition: per_sample(z)}}

    def _rows(self, x: Tensor, z: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the tokens that count and their conditions, (N, d) and (N, k), and the mask as bool."""
        x, z = floating("x", x, "(*tokens, d)"), _conditions(z)
        if x.ndim < 2 or z.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"DiffusionLoss needs tokens x (*tokens, d) and conditions z (*tokens, k), got {tuple(x.shape)} and "
                f"{tuple(z.shape)}; repeat a condition that several tokens share with .expand()"
            )
        if mask is None:
            return x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1]), None
        mask = bool_mask(mask, x)
        if mask.shape != x.shape[:-1] or not bool(mask.any()):
            raise ValueError(
                f"mask must be True for at least one token and of shape {tuple(x.shape[:-1])}, got "
                f"{int(mask.sum())} True in {tuple(mask.shape)}"
            )
        return x[mask], z[mask], mask


def _conditions(z: object) -> Tensor:
    """Return the conditions of tokens as they are, of any dtype, since labels are integers."""
    if not isinstance(z, Tensor):
        raise ValueError(
            f"z must be a tensor of conditions (*tokens, k), got {kind_of(z)}; torch.as_tensor makes one of an array"
        )
    return z


def _placed(options: dict[str, Any], mask: Tensor | None) -> dict[str, Any]:
    """Return the options of a density with the places of the tokens that count: they decide about a token's noise."""
    return options if mask is None else {"sample_index": mask.flatten().nonzero()[:, 0], **options}
