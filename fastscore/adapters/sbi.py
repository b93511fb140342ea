"""Posteriors of sbi's score and flow-matching estimators (NPSE, FMPE): log p(theta | x).

An estimator works on theta, or on z = (theta - shift) / scale where it was built with composed standardization; the
density returned here is always that of theta. It is the estimator's own: a posterior object of sbi also gives minus
infinity outside the prior, without renormalizing what is inside.

References:
    https://github.com/sbi-dev/sbi
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..densities.transformed import Transformed
from ..density import ScoreDensity
from ..process.schedules import VE, VP, Schedule
from ..reference.gaussians import Reference
from ..support.buffers import Constants
from ..support.host import as_tensor
from ..transforms import zscore
from .checks import adapter, expect, expect_attributes
from .clocks import OffsetFlow, SubVP
from .wrappers import bare

# The estimator is that of one observation, and the product is normalized by the evidence, which nobody knows.
SEVERAL = (
    "log p(theta | x_1 .. x_N) is, up to a constant, the sum over i of log_prob(theta) of the density for each x_i "
    "alone, minus (N - 1) prior.log_prob(theta)"
)


class SbiNet(Constants):
    """Call a vector field estimator as `model(theta_t, t, condition=x)`; x is shared unless a call gives its own."""

    def __init__(self, estimator: nn.Module, x: Tensor | None) -> None:
        super().__init__()
        self.estimator = estimator
        self.register_buffer("x", x, persistent=False)
        self.is_flow = hasattr(estimator, "noise_scale")

    def forward(self, theta_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        condition = self.x if condition is None else condition
        if condition is None:
            raise ValueError(
                "the estimator needs an observation, got none; give it beside the estimator or posterior, as in "
                "from_sbi(estimator, x) and from_model(posterior, x), or as condition= to the call"
            )
        shape = tuple(self.estimator.condition_shape)
        # Written so that a trace of it does not fix the number of rows: such a network may have a row program.
        rows = condition.shape[: condition.ndim - len(shape)]
        if condition.shape[len(rows) :] != shape or rows not in ((), (1,), theta_t.shape[:1]):
            raise ValueError(
                f"condition must be one observation of shape {shape}, or one a sample, got {tuple(condition.shape)}; "
                f"{SEVERAL}"
            )
        field = self.estimator.forward if self.is_flow else self.estimator.score
        # The estimator's buffers are of the network's dtype, and so must its time be.
        return field(theta_t, condition.to(theta_t.dtype), t.to(theta_t.dtype))


@adapter
def from_sbi(estimator: nn.Module, x: Tensor | None = None, **options: Any) -> Transformed:
    """Return the density log p(theta | x) of an sbi vector field estimator, in the parameters' own units.

    Arguments:
        estimator: VPScoreEstimator, SubVPScoreEstimator, VEScoreEstimator or FlowMatchingEstimator, what
            `NPSE(...).train()` and `FMPE(...).train()` return; or a posterior built from one.
        x: the observation, shape of one simulation or (1, *shape); by default the posterior's `default_x`, where
            `set_default_x` set one, as in sbi itself. Without either every call needs `condition=`, of shape
            (B, *shape): one observation a sample. Several observations of the same theta are no condition of the
            estimator; their posterior is known up to a constant, sum_i log p(theta | x_i) - (N - 1) log p(theta).
        options: of `ScoreDensity`. The reference is by default the Gaussian that sbi standardized with.

    Returns:
        `Transformed`: the density of parameters in their own units, before the estimator's standardization.

    Raises:
        TypeError: if it is none of these estimators.
        ValueError: if x, or a call's condition, does not have the shape of one simulation (a sample).
    """
    name = "x"
    if x is None and (x := getattr(estimator, "default_x", None)) is not None:
        name = "default_x of the posterior"
    estimator = getattr(estimator, "vector_field_estimator", estimator)
    estimator = bare(estimator) if isinstance(estimator, nn.Module) else estimator
    expect_attributes(
        estimator,
        ("score", "condition_shape", "input_shape", "mean_0", "std_0"),
        "estimator",
        "an sbi score or flow estimator",
        "give what NPSE(...).train() or FMPE(...).train() returns",
    )
    schedule, predicts = _process(estimator)
    if x is not None:
        shape = tuple(estimator.condition_shape)
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        expect(
            got in (shape, (1, *shape)),
            name,
            got,
            f"one observation of shape {shape}",
            _remedy(x, shape),
        )
        x = x.detach().reshape(1, *shape)
    options.setdefault("reference", _reference(estimator))
    density = ScoreDensity(SbiNet(estimator, x), schedule, predicts=predicts, **options)
    shift, scale = (_buffer(estimator, name, default) for name, default in (("_theta_shift", 0), ("_theta_scale", 1)))
    return Transformed(density, zscore(shift, scale))


def _remedy(x: object, shape: tuple[int, ...]) -> str:
    """Return what to do with what is no single observation."""
    if not isinstance(x, Tensor):
        return "torch.as_tensor(x) makes a tensor of it"
    if tuple(x.shape[1:]) != shape:
        return "the estimator was trained on simulations of that shape"
    return f"one a sample go to the call, from_sbi(estimator).estimate(theta, condition=x); {SEVERAL}"


def _process(estimator: nn.Module) -> tuple[Schedule, str]:
    """Return the schedule of the estimator's class, restricted to its times, and what it returns."""
    names = {base.__name__ for base in type(estimator).__mro__}
    if "FlowMatchingEstimator" in names:
        return OffsetFlow(estimator.noise_scale), "flow"
    if "VEScoreEstimator" in names:
        schedule = VE(estimator.sigma_min, estimator.sigma_max)
    elif "SubVPScoreEstimator" in names:
        schedule = SubVP(estimator.beta_min, estimator.beta_max)
    elif "VPScoreEstimator" in names:
        schedule = VP(estimator.beta_min, estimator.beta_max)
    else:
        raise TypeError(
            f"estimator must be a VP, SubVP or VE score estimator or a flow-matching estimator of sbi, "
            f"got {type(estimator).__name__}; build a ScoreDensity with your own Schedule"
        )
    schedule.time_range = (float(estimator.t_min), float(estimator.t_max))
    return schedule, "score"


def _reference(estimator: nn.Module) -> Reference:
    d = estimator.input_shape.numel()
    mean, std = (value.detach().expand(estimator.input_shape) for value in (estimator.mean_0, estimator.std_0))
    return Reference(torch.ones(1, device=mean.device), mean.reshape(1, d), std.reshape(1, d).to(torch.float64) ** 2)


def _buffer(estimator: nn.Module, name: str, default: float) -> Tensor:
    """Return one of the estimator's standardization buffers, shape of theta, float64; sbi before 0.26 has none."""
    value = as_tensor(getattr(estimator, name, default)).detach().to(torch.float64)
    return value.expand(1, *estimator.input_shape)[0]
