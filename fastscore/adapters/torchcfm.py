"""Velocities of torchcfm: the path is its flow matcher's, and networks are called in one of three ways.

References:
    Improving and Generalizing Flow-Based Generative Models with Minibatch Optimal Transport (Tong et al., 2024),
    https://arxiv.org/abs/2302.00482
    https://github.com/atong01/conditional-flow-matching
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..density import ScoreDensity
from ..process.conditional_flow import ConditionalFlow
from ..process.schedules import FlowMatching, Schedule
from .checks import adapter, expect, expect_attributes, expect_module
from .clocks import TargetFlow, Trigonometric
from .wrappers import bare

PARTS = "sigma", "compute_mu_t", "compute_sigma_t", "compute_conditional_flow"  # of a matcher
CALLS = ("t, x", "x, t", "cat")
TIMES = {"t", "time", "times", "timestep", "timesteps"}
COUPLED = ("ExactOptimalTransportConditionalFlowMatcher", "SchrodingerBridgeConditionalFlowMatcher")


class Path(NamedTuple):
    """A matcher's path: factors of noise and data in the mean at t, their rates, and the noise by (t, sigma)."""

    mean: Callable[[Tensor], tuple[Tensor, Tensor]]
    rate: Callable[[Tensor], tuple[Tensor, Tensor]]
    noise: Callable[[Tensor, float], Tensor]


def _constant(t: Tensor, sigma: float) -> Tensor:
    return torch.full_like(t, sigma)


def _straight(t: Tensor) -> tuple[Tensor, Tensor]:
    return 1 - t, t


def _turn(t: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)


PATHS = {
    "ConditionalFlowMatcher": Path(_straight, lambda t: (-torch.ones_like(t), torch.ones_like(t)), _constant),
    "TargetConditionalFlowMatcher": Path(
        lambda t: (torch.zeros_like(t), t),
        lambda t: (torch.zeros_like(t), torch.ones_like(t)),
        lambda t, sigma: 1 - (1 - sigma) * t,
    ),
    "VariancePreservingConditionalFlowMatcher": Path(
        _turn, lambda t: (-math.pi / 2 * _turn(t)[1], math.pi / 2 * _turn(t)[0]), _constant
    ),
}


class CalledAs(nn.Module):
    """Call a network as `model(t, x)`, `model(x, t)`, or with x and t in one tensor ("cat")."""

    def __init__(self, model: nn.Module, call: str) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        if self.call == "cat":
            return self.model(torch.cat([x_t, t[:, None].to(x_t.dtype)], 1), **cond)
        return self.model(x_t, t, **cond) if self.call == "x, t" else self.model(t, x_t, **cond)


@adapter
def from_torchcfm(
    model: nn.Module, matcher: object | None = None, call: str | None = None, **options: Any
) -> ScoreDensity:
    """Return the density of a velocity that was trained with a flow matcher of torchcfm, from standard normal noise.

    Arguments:
        model: the velocity; a class label is the keyword argument `y` of `UNetModel`.
        matcher: of training. `ConditionalFlowMatcher(sigma)`, `TargetConditionalFlowMatcher(sigma)` and
            `VariancePreservingConditionalFlowMatcher(sigma)` each have their path, with the noise sigma in it.
        call: how the network is called: "t, x", "x, t", or "cat" for one tensor of x and t, as in
            `MLP(time_varying=True)`. By default as the names of its arguments say; a `torch_wrapper` is looked through.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the network's own data.

    Raises:
        TypeError: if model is not a module, or matcher no flow matcher.
        ValueError: for a matcher that couples noise and data (optimal transport, Schrödinger bridges), of which the
            formula is wrong; for one whose paths are none of these three; for a network of which nothing says how it is
            called; unless 0 <= sigma < 1.
    """
    expect_module(model, "model", "a torch module", "wrap the function in a Module")
    wanted = "a flow matcher of torchcfm such as ConditionalFlowMatcher(sigma=0.0)"
    expect_attributes(matcher, PARTS, "matcher", wanted, "give the one of training")
    if type(bare(model)).__name__ == "torch_wrapper":  # which torchdyn's solver wants: one time for all rows
        model, call = bare(model).model, call or "cat"
    call = _way_of_calling(model) if call is None else call
    known = f"one of {', '.join(map(repr, CALLS))}"
    remedy = "say how the network gets x and the time t"
    expect(call in CALLS, "call", f"{call!r} for {type(bare(model)).__name__}", known, remedy)
    return ScoreDensity(CalledAs(model, call), _path(matcher), predicts="flow", **options)


def _way_of_calling(model: nn.Module) -> str | None:
    """Return how the names of a network's arguments say that it is called, None where they do not."""
    own = bare(model)
    if getattr(own, "time_varying", False):
        return "cat"
    names = list(inspect.signature(own.forward).parameters)[:2]
    at = [name in TIMES for name in names]
    return {(True, False): "t, x", (False, True): "x, t"}.get(tuple(at))


def _path(matcher: object) -> Schedule:
    """Return the path of a matcher."""
    names = [base.__name__ for base in type(matcher).__mro__]
    coupled = next((name for name in COUPLED if name in names), None)
    expect(
        coupled is None,
        "matcher",
        coupled,
        "one that draws noise independently of the data",
        "take probability_flow_log_prob of a ScoreDensity with FlowMatching(), since the formula is wrong for "
        "coupled pairs",
    )
    sigma = float(matcher.sigma)
    expect(0 <= sigma < 1, "sigma", sigma, "between 0 and 1", "give the matcher of training")
    kind = next((kind for kind, path in PATHS.items() if _follows(matcher, path)), None)
    expect(
        kind is not None,
        "matcher",
        f"{type(matcher).__name__} with another path",
        f"one whose mean, noise and velocity are those of {', '.join(PATHS)}",
        "build a ScoreDensity with a Schedule of that path",
    )
    if kind == "VariancePreservingConditionalFlowMatcher":
        return Trigonometric(sigma)
    if sigma == 0:
        return FlowMatching(data_at=1)
    return TargetFlow(sigma) if kind == "TargetConditionalFlowMatcher" else ConditionalFlow(sigma)


def _follows(matcher: Any, path: Path) -> bool:
    """Return whether a matcher has the mean, the noise and, at the mean, the velocity of a path at some times."""
    x_0, x_1 = torch.eye(2, device="cpu").repeat(3, 1, 1).unbind(1)
    t = torch.tensor([0.2, 0.5, 0.9], device="cpu")
    (a, b), (a_rate, b_rate) = path.mean(t), path.rate(t)
    mean = a[:, None] * x_0 + b[:, None] * x_1
    noise = torch.as_tensor(matcher.compute_sigma_t(t), device="cpu").flatten()
    given = matcher.compute_mu_t(x_0, x_1, t), noise, matcher.compute_conditional_flow(x_0, x_1, t, mean)
    expected = mean, path.noise(t, float(matcher.sigma)), a_rate[:, None] * x_0 + b_rate[:, None] * x_1
    return all(torch.allclose(found, wanted.to(found), atol=1e-4) for found, wanted in zip(given, expected))
