"""Posteriors of bayesflow: diffusion and flow-matching networks on keras' torch backend, log p(theta | x).

A network works on what its library's own adapter and standardization make of the parameters; the density of an
approximator (an estimator, since bayesflow 2.1) is that of the parameters as its user gives them. bayesflow turns
autograd off when it is imported: gradients of `log_prob` need `torch.enable_grad()` around the call.

References:
    https://github.com/bayesflow-org/bayesflow
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform

from ..densities.transformed import Transformed
from ..density import ScoreDensity
from ..estimator.protocol import Density
from ..process.schedules import EDM, FlowMatching, LogSNR, Schedule
from ..support.buffers import Constants
from ..support.host import as_tensor, kind_of
from ..support.warn import warn
from ..transforms import zscore
from .bayesflow_parameters import PARAMETERS, Parameters
from .checks import adapter, expect, expect_attributes, expect_module

SEEN = torch.linspace(-12, 12, 13, dtype=torch.float64, device="cpu")  # log-SNRs at which a noise schedule is read
MASKS = ("inference_mask", "inference_attention_mask")
WANTED = "a built DiffusionModel or FlowMatching of bayesflow on keras' torch backend, or what was trained with one"
# The network is that of one data set, and the product is normalized by the evidence, which nobody knows.
SEVERAL = (
    "log p(theta | x_1 .. x_N) is, up to a constant, the sum of from_bayesflow(approximator, x_i).log_prob(theta) over "
    "i minus (N - 1) prior.log_prob(theta)"
)


class BayesflowNet(Constants):
    """Call a network of bayesflow, with a condition that is shared unless a call gives its own, for its score or flow.

    Scores are computed around the network in float64, from its answer in its own dtype.

    Attributes:
        names: of the parameters, one a column of the density's x; none for a network alone.
        shape: of a batch of conditions, None for a network without any.
    """

    def __init__(self, network: nn.Module, estimator: object | None, condition: Tensor | None) -> None:
        super().__init__()
        self.network, self.is_flow = network, "FlowMatching" in _names(network)
        self.exploding = not self.is_flow and _explodes(network.noise_schedule)
        self._estimator = (estimator,)  # no submodule: its summary network has said what it has to say
        self.register_buffer("condition", condition, persistent=False)
        self.names: list[str] = []
        self.shape = _shapes(network)[1]

    def resolve(self, data: Mapping[str, Any]) -> Tensor:
        """Return what the network is told of observations, shape (N, C): adapted, standardized and summarized.

        It is the `condition=` of a call on N samples, one observation a sample.

        Arguments:
            data: the arrays by name that `approximator.sample(conditions=...)` takes, of first size N.
        """
        (estimator,) = self._estimator
        if estimator is None:
            raise ValueError("a network alone knows no names; give from_bayesflow the approximator it was trained in")
        condition, adapted, _ = estimator._prepare_conditions(data)
        masks = [name for name in MASKS if adapted.get(name) is not None]
        expect(not masks, "data", f"{', '.join(masks)}", "without masks of parameters", "leave them out of the adapter")
        expect(
            condition is not None, "data", f"{', '.join(data)}", "what the adapter reads", "see approximator.adapter"
        )
        return condition.detach()

    def forward(self, z_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        condition = self._checked(self.condition if condition is None else condition, len(z_t))
        if condition is not None:
            condition = condition.to(z_t).expand(len(z_t), *condition.shape[1:])
            if getattr(self.network, "unconditional_mode", False):
                condition = torch.zeros_like(condition)
        if self.is_flow:
            return self.network.velocity(z_t, time=t.to(z_t), conditions=condition, training=False)
        log_snr = -2 * torch.log(t.double()) if self.exploding else t.double()
        log_snr = log_snr.reshape(-1, *[1] * (z_t.ndim - 1)).expand(*z_t.shape[:-1], 1)
        return self.network.score(z_t.double(), log_snr_t=log_snr, conditions=condition, training=False)

    def _checked(self, condition: Tensor | None, rows: int) -> Tensor | None:
        """Return the condition; raise ValueError for one that the network was not built for, or none where it was."""
        if self.shape is None or condition is None:
            expected = "no condition, without which the network was built" if self.shape is None else "an observation"
            if (self.shape is None) != (condition is None):
                got = "none" if condition is None else f"one of shape {tuple(condition.shape)}"
                raise ValueError(
                    f"condition must be {expected}, got {got}; give from_bayesflow the data as "
                    "approximator.sample(conditions=...) takes them, or condition= to the call"
                )
            return None
        shape = tuple(self.shape[1:])
        fits = condition.ndim == len(shape) + 1 and all(b in (None, a) for a, b in zip(condition.shape[1:], shape))
        if not fits or condition.shape[0] not in (1, rows):
            raise ValueError(
                f"condition must be one observation of shape {shape}, or one a sample, got {tuple(condition.shape)}; "
                f"density.model.resolve(data) makes it, and {SEVERAL}"
            )
        return condition


@adapter
def from_bayesflow(approximator: object, data: Mapping[str, Any] | Tensor | None = None, **options: Any) -> Density:
    """Return the density log p(theta | x) of a bayesflow diffusion or flow-matching model, in the parameters' units.

    Arguments:
        approximator: a `ContinuousApproximator` (`BasicEstimator` since bayesflow 2.1), a workflow that holds one, or
            a network alone: `DiffusionModel` or `FlowMatching`, whose density is that of its own variables. Parameters
            are the columns of the density's x, in the order in which the adapter joins them, which
            `density.model.names` lists.
        data: the observation, arrays by name of first size 1 as `approximator.sample(conditions=...)` takes them; for
            a network alone a tensor (1, C). Without it every call needs `condition=`, shape (B, C): one observation a
            sample, which `density.model.resolve(data)` makes of data of first size B.
        options: of `ScoreDensity`.

    Returns:
        `Density`: the `ScoreDensity` of a network's own variables, or, where there is an approximator around it, the
        `Transformed` one of its user's parameters, with the log-determinants of standardization and adapter.

    Raises:
        TypeError: if it is something else, such as a `ConsistencyModel` or a `CouplingFlow`, or keras' backend is not
            torch.
        ValueError: for networks that are not built, or not trained; for a flow trained by optimal transport or with
            another base or loss, of which the formula is wrong; for guidance; for a noise schedule neither
            variance-preserving nor -exploding; for several observations of one parameter; where the adapter's
            log-determinant is missing or wrong.
    """
    held = next((part for name in ("approximator", "estimator") if (part := getattr(approximator, name, None))), None)
    outer = approximator if held is None else held
    estimator = outer if hasattr(outer, "inference_network") else None
    network = outer if estimator is None else estimator.inference_network
    _check_network(network)
    if estimator is not None:
        expect_attributes(
            estimator,
            ("_prepare_conditions", "adapter", "standardizer"),
            "approximator",
            "a ContinuousApproximator of bayesflow 2.0.12 or later",
            "give its inference_network",
        )
    model = BayesflowNet(network, estimator, None)
    if data is not None:
        model.register_buffer("condition", _observation(model, data), persistent=False)
    schedule, predicts = (_path(network), "flow") if model.is_flow else (_process(network), "score")
    density = ScoreDensity(model, schedule, predicts=predicts, **options)
    if estimator is None:
        return density
    standard = _standardization(estimator)
    parameters = Parameters(estimator.adapter, int(_shapes(network)[0][-1]), standard)
    model.names = parameters.columns
    return Transformed(density, standard if parameters.is_identity else ComposeTransform([standard, parameters]))


def _observation(model: BayesflowNet, data: Mapping[str, Any] | Tensor) -> Tensor:
    """Return the condition of one observation."""
    condition = data if isinstance(data, Tensor) else model.resolve(data) if isinstance(data, Mapping) else None
    expected = "arrays by name, as approximator.sample(conditions=...) takes them"
    if condition is None:
        raise TypeError(f"data must be {expected}, got {kind_of(data)}; give a dict such as {{'x': observed}}")
    one = len(condition) == 1
    remedy = f"give several as condition=density.model.resolve(data), one a sample; {SEVERAL}"
    expect(one, "data", f"{len(condition)}", "one observation, arrays of first size 1", remedy)
    return condition.detach()


def _names(thing: object) -> set[str]:
    return {base.__name__ for base in type(thing).__mro__}


def _shapes(network: nn.Module) -> tuple[tuple, tuple | None]:
    """Return the shapes of variables and conditions that a network was built for."""
    built = network.get_build_config() or {}
    shapes = built.get("shapes_dict", built)
    conditions = shapes.get("conditions_shape")
    return tuple(shapes.get("xz_shape", shapes.get("input_shape"))), None if conditions is None else tuple(conditions)


def _check_network(network: object) -> None:
    """Raise unless it is a network with a density by the formula, built and on torch."""
    names = _names(network)
    kind = next((name for name in ("DiffusionModel", "FlowMatching") if name in names), None)
    remedy = "of other networks approximator.log_prob is the density, where they have one"
    if kind is None or isinstance(network, type):
        raise TypeError(f"approximator must be {WANTED}, got {kind_of(network)}; {remedy}")
    remedy = "set KERAS_BACKEND=torch before bayesflow is imported, and load the saved model again"
    expect_module(network, "network", "one on keras' torch backend", remedy)
    expect(bool(network.built), "network", f"a {kind} without weights", "a built one", "train it, or load its weights")
    if kind == "DiffusionModel":
        base = next(base for base in type(network).__mro__ if base.__name__ == kind)
        own = getattr(network.guidance_function, "__func__", None) is base.guidance_function
        remedy = "take the network's own guidance_function"
        expect(own, "guidance_function", "another one", "the library's, since guided scores have no density", remedy)
    mixed = max(getattr(network, "drop_target_prob", 0.0), getattr(_handler(network), "fixed_target_prob", 0.0))
    if mixed > 0:
        warn(
            f"the network was trained with a share of {mixed:g} of its parameters left without noise, and at low noise "
            "cannot tell which; its density may be off by more than stderr says; train one with a share of 0"
        )


def _handler(network: nn.Module) -> object | None:
    return getattr(network, "mask_handler", None)


def _path(network: nn.Module) -> Schedule:
    """Return the straight path of a flow: data lie at t = 1 before bayesflow 2.1, whose networks handle masks, at 0."""
    remedy = "take approximator.log_prob, the library's ODE, since the formula is wrong for coupled pairs"
    coupled = bool(network.use_optimal_transport)
    expect(not coupled, "use_optimal_transport", coupled, "False, noise drawn independently of the data", remedy)
    remedy = "take approximator.log_prob, the library's ODE"
    base, loss = network.base_distribution, network.loss_fn
    standard = "DiagonalNormal" in _names(base) and all(
        bool((as_tensor(value).detach() == wanted).all()) for value, wanted in ((base.mean, 0.0), (base.std, 1.0))
    )
    expect(standard, "base_distribution", type(base).__name__, "the standard normal one", remedy)
    name = getattr(loss, "__name__", type(loss).__name__)
    known = name in ("mean_squared_error", "MeanSquaredError")
    expect(known, "loss_fn", name, "the mean squared error, whose least is a mean", remedy)
    return FlowMatching(data_at=1 if _handler(network) is None else 0)


def _explodes(noise: object) -> bool:
    """Return whether a noise schedule is variance-exploding; raise ValueError if it is not preserving either."""
    alpha, sigma = (value.detach().cpu() for value in noise.get_alpha_sigma(SEEN))
    if torch.allclose(alpha**2 + sigma**2, torch.ones_like(SEEN)):
        explodes = False
    else:
        explodes = torch.allclose(alpha, torch.ones_like(SEEN))
        expected = "variance-preserving or variance-exploding"
        remedy = "build a ScoreDensity with a Schedule of your own and predicts='score'"
        expect(explodes, "noise_schedule", f"{type(noise).__name__}, which is neither", expected, remedy)
    right = torch.allclose(2 * torch.log(alpha / sigma), SEEN)
    remedy = "see bayesflow's NoiseSchedule for the convention"
    expect(right, "log-SNR of noise_schedule", "another", "2 log(alpha / sigma)", remedy)
    return explodes


def _process(network: nn.Module) -> Schedule:
    """Return the noise of a diffusion model over its times of sampling: its clock is the log-SNR, or sigma."""
    noise = network.noise_schedule
    log_snr = getattr(noise, "log_snr", None) or noise.get_log_snr
    times = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    highest, lowest = log_snr(times, training=False).detach().cpu().tolist()
    data_std = float(getattr(noise, "sigma_data", 1.0))
    if _explodes(noise):
        low, high = (math.exp(-0.5 * end) for end in (highest, lowest))
        return EDM(low, high, sigma_data=data_std)
    schedule = LogSNR(lowest, highest)
    schedule.data_std = data_std
    return schedule


def _standardization(estimator: object) -> Transform:
    """Return the map from a network's variables to the adapter's, of the moments that training has left."""
    layer = (estimator.standardizer.standardize_layers or {}).get(PARAMETERS)
    if layer is None:
        return zscore(0.0, 1.0)
    expect(
        bool(layer.built) and float(layer.count[0]) > 0,
        "approximator",
        "one whose standardization has seen no data",
        "a trained one",
        "train it, or load its weights",
    )
    return zscore(layer.moving_mean[0].value.detach().cpu(), layer.moving_std(0).detach().cpu())
