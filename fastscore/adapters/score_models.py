"""ScoreModel of score_models: `score(t, x, *args)` under its VE or VP process.

References:
    https://github.com/AlexandreAdam/score_models
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..density import ScoreDensity
from ..process.schedules import VE, VP
from .checks import adapter, expect, expect_attributes, expect_module
from .wrappers import bare


class TimeFirst(nn.Module):
    """Call `score(t, x, condition)`; conditions go by position there, so there is one name for them here."""

    def __init__(self, score_model: nn.Module) -> None:
        super().__init__()
        self.score_model = score_model

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        conditions = () if condition is None else (condition,)
        return self.score_model.score(t.to(x_t.dtype), x_t, *conditions)


@adapter
def from_score_models(score_model: nn.Module, **options: Any) -> ScoreDensity:
    """Return the density of a score_models `ScoreModel`; a condition is the keyword argument `condition`.

    Arguments:
        score_model: with `sde` a VESDE or VPSDE whose time ends at T = 1.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the network's own data.

    Raises:
        TypeError: if it is not a ScoreModel, or its sde none of the two.
        ValueError: if T is not 1.
    """
    expect_module(score_model, "score_model", "a ScoreModel of score_models", "wrap the network in ScoreModel")
    wanted, remedy = "a ScoreModel of score_models", "wrap the network in ScoreModel"
    score_model = bare(score_model)  # what wrappers call is forward alone, and not its score
    expect_attributes(score_model, ("score", "sde"), "score_model", wanted, remedy)
    sde = score_model.sde
    name = type(sde).__name__
    expect(name in ("VESDE", "VPSDE"), "sde", name, "VESDE or VPSDE", "build a ScoreDensity with your own Schedule")
    expect(sde.T == 1, "T", sde.T, "1", "build a ScoreDensity with your own Schedule")
    schedule = VE(sde.sigma_min, sde.sigma_max) if name == "VESDE" else VP(sde.beta_min, sde.beta_max)
    schedule.time_range = (float(sde.epsilon), 1.0)
    return ScoreDensity(TimeFirst(score_model), schedule, predicts="score", **options)
