"""Velocity, data and noise models of flow_matching: x_t = alpha_t x_1 + sigma_t x_0, data at t = 1.

The library's licence is CC-BY-NC: nothing here imports it, and the package does not depend on it.

References:
    Flow Matching Guide and Code (Lipman et al., 2024), https://arxiv.org/abs/2412.06264
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..density import ScoreDensity
from ..process.alpha_sigma import AlphaSigma
from ..process.schedules import LOG_SNR_CEIL, LOG_SNR_FLOOR, Cut, FlowMatching
from ..support.host import as_tensor
from .checks import adapter, expect, expect_attributes, expect_module

PREDICTIONS = ("flow", "x0", "eps")
ENDLESS = 64.0  # of log-SNR: rounding leaves that of a cosine at 75 where it is infinite, and no data change beyond


class SchedulerClock(AlphaSigma):
    """The process of a flow_matching scheduler: its call gives alpha and sigma, its `snr_inverse` the time.

    It is known at times from 0 to 1, and a path that has an end there, as the variance-preserving one has, keeps it.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        ends = torch.tensor([[LOG_SNR_CEIL, LOG_SNR_FLOOR], [1.0, 0.0]], dtype=torch.float64, device="cpu")
        (clean, noisy), (last, first) = self.time(ends[0]).tolist(), self.log_snr(ends[1]).tolist()
        # A path of which noise or data are left at the end of time is not known beyond.
        self.time_range = (1.0 if last < ENDLESS else Cut(clean), 0.0 if first > -ENDLESS else Cut(noisy))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        at = self.scheduler(as_tensor(t).to(torch.float64))
        return at.alpha_t, at.sigma_t

    def time(self, log_snr: Tensor) -> Tensor:
        return self.scheduler.snr_inverse(torch.exp(0.5 * as_tensor(log_snr).to(torch.float64)))

    def derivatives(self, t: Tensor) -> tuple[Tensor, Tensor]:
        at = self.scheduler(as_tensor(t).to(torch.float64))
        return at.d_alpha_t, at.d_sigma_t

    def __repr__(self) -> str:
        return f"SchedulerClock({type(self.scheduler).__name__})"


def velocity_of(model: object) -> object:
    """Return the velocity that an `ODESolver` holds; another object as it is.

    Raises:
        ValueError: for a solver of another kind, of paths on a manifold or of discrete states.
    """
    names = [base.__name__ for base in type(model).__mro__]
    if "ODESolver" in names:
        return model.velocity_model
    if "Solver" in names and type(model).__module__.startswith("flow_matching"):
        raise ValueError(
            f"model must be a velocity in flat space, or an ODESolver of one, got {type(model).__name__}, whose paths "
            "have no density by this formula; take the solver's own likelihood, if it has one"
        )
    return model


@adapter
def from_flow_matching(
    model: nn.Module, scheduler: object | None = None, predicts: str = "flow", **options: Any
) -> ScoreDensity:
    """Return the density of a flow_matching model, called as `model(x, t, **extras)`.

    Only for models trained on noise that was drawn independently of the data. One trained on coupled pairs (optimal
    transport, reflow) has no density by the formula; take `probability_flow_log_prob` of what this returns.

    Arguments:
        model: a `ModelWrapper` or any module; a velocity by default. Of an `ODESolver` it is the one that this holds.
        scheduler: of its affine path, such as `CosineScheduler()`; by default the straight path (`CondOTScheduler`,
            `CondOTProbPath`).
        predicts: "flow" (velocity), "x0" (the library's x_1 prediction) or "eps" (its x_0 prediction).
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the network's own data.

    Raises:
        TypeError: if model is not a module, or scheduler not a scheduler.
        ValueError: for another prediction, and for solvers on manifolds or of discrete states.
    """
    model = velocity_of(model)
    expect_module(
        model, "model", "a torch module such as a flow_matching ModelWrapper", "wrap the function in a Module"
    )
    remedy = 'use "flow" for a velocity'
    expect(predicts in PREDICTIONS, "predicts", repr(predicts), f"one of {', '.join(PREDICTIONS)}", remedy)
    if scheduler is None:
        return ScoreDensity(model, FlowMatching(data_at=1), predicts=predicts, **options)
    expect_attributes(
        scheduler,
        ("__call__", "snr_inverse"),
        "scheduler",
        "a flow_matching scheduler such as CosineScheduler()",
        "give path.scheduler rather than the path",
    )
    return ScoreDensity(model, SchedulerClock(scheduler), predicts=predicts, **options)
