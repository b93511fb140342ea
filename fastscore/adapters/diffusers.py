"""Networks and schedulers of Hugging Face diffusers.

A scheduler with a table `alphas_cumprod` is a `DDPM` of that table: the network is called with the training timesteps
0 .. T-1, whatever `set_timesteps` chose for sampling. A flow-matching scheduler's path is x_t = (1 - s) x + s eps with
velocity eps - x; what a network gets as time, and with which sign it answers, is its own pipeline's convention
(`diffusers_conventions`). An EDM scheduler preconditions: the network gets x + sigma eps over its standard deviation,
and log(sigma) / 4.

References:
    https://github.com/huggingface/diffusers
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..density import ScoreDensity
from ..process.schedules import FlowMatching, Schedule
from ..support.host import kind_of
from .averaged import averaged
from .checks import adapter, expect, expect_attributes, expect_key, expect_module
from .clocks import Preconditioned, table
from .diffusers_conventions import FLOW, REFUSED, TABLE, TIMES, Convention, known_class
from .wrappers import bare

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


class DiffusersNet(nn.Module):
    """Call a diffusers model with its time by keyword, since its place differs, as offset + slope t.

    Arguments:
        model: returns an object with the field `output`. One that is not of diffusers may return a tensor or a tuple
            that begins with it, and takes its time as the second argument where none has the name.
        time: (offset, slope); (0, 1) passes t as it is, integers too.
        sign: factor of what comes back.
        argument: the model's name for its time.
        output: the field that holds the prediction.
    """

    def __init__(
        self,
        model: nn.Module,
        time: tuple[float, float] = (0.0, 1.0),
        sign: int = 1,
        argument: str = "timestep",
        output: str = "sample",
    ) -> None:
        super().__init__()
        self.model, self.time, self.sign, self.argument, self.output = model, time, sign, argument, output
        self.by_name = _takes_by_name(bare(model), argument)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        offset, slope = self.time
        if self.time != (0.0, 1.0):
            t = offset + slope * t
        found = self.model(x_t, **{self.argument: t}, **cond) if self.by_name else self.model(x_t, t, **cond)
        found = found[0] if isinstance(found, tuple) else found
        prediction = found if isinstance(found, Tensor) else getattr(found, self.output)
        return prediction if self.sign == 1 else -prediction


def _takes_by_name(model: nn.Module, argument: str) -> bool:
    """Return whether a network's time goes by this name: it has it, or has no second argument and takes any name."""
    parameters = inspect.signature(model.forward).parameters.values()
    if argument in (p.name for p in parameters):
        return True
    in_order = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(in_order) < 2 and any(p.kind is p.VAR_KEYWORD for p in parameters)


class NoiseLabel(nn.Module):
    """Call a network at the angle t of `Preconditioned` with log(sigma) / 4, sigma = sigma_data tan t."""

    def __init__(self, model: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.model(x_t, 0.25 * (self.sigma_data * t.tan()).log(), **cond)


@adapter
def from_diffusers(
    model: nn.Module,
    scheduler: object | None = None,
    time: str | None = None,
    sign: int | None = None,
    ema: object | None = None,
    **options: Any,
) -> ScoreDensity:
    """Return the density of a diffusers model (UNet2DModel, SD3Transformer2DModel, FluxTransformer2DModel, ...).

    Class labels, `encoder_hidden_states` and other conditions are keyword arguments of `log_prob` and `estimate`. A
    learned variance (twice the channels) is cut off. The density is that of the model's own input: latents for a
    latent diffusion model, with its scaling factor in; `fastscore.LatentBound` goes on to images. Flows trained on
    coupled pairs (reflow, optimal transport; most distilled ones) have no density by the formula.

    Arguments:
        model: called as `model(x_t, timestep=t, **cond)`, returns an object with `.sample`.
        scheduler: the one of training, with `alphas_cumprod` (DDPM, DDIM, Euler, DPM-Solver, ...; `prediction_type`
            epsilon, sample or v_prediction), a FlowMatch...Scheduler, one with `use_flow_sigmas`, or one that
            preconditions (EDMEuler, EDMDPMSolverMultistep, EulerDiscrete with continuous times and v_prediction).
        time: what the network gets of the scheduler's timestep t: "t", "t / 1000", "t / T" (T is
            `num_train_timesteps`) or "1 - t / T". By default as in the pipeline of the model's class. A network of
            another origin gets a table's timestep as it is; with a flow scheduler it must be said: they differ.
        sign: -1 where a flow network returns data - noise; by default as in the pipeline, 1 for another network.
        ema: an `EMAModel` of the model's parameters, whose averages are the weights of the density: those that it has
            now, in a copy of the model. The model and the averages stay as they are.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the model's own input.

    Raises:
        TypeError: if either is something else, or time no text.
        ValueError: for a model class that cannot be called with x_t and t alone; for a flow network whose convention is
            neither known nor said; for a scheduler that is neither kind or not the one that the class is called with;
            for an unknown prediction type, time or sign.
    """
    remedy = "give pipeline.unet (or pipeline.transformer) and pipeline.scheduler"
    expect_module(model, "model", "a diffusers model such as UNet2DModel", remedy)
    wanted = "a diffusers scheduler with a config"
    expect_attributes(scheduler, ("config",), "scheduler", wanted, "give pipeline.scheduler")
    if time is not None:
        if not isinstance(time, str):
            raise TypeError(
                f"time must be one of {', '.join(map(repr, TIMES))}, got {kind_of(time)}; an EMAModel goes as "
                "ema=, and a pipeline brings its own scheduler"
            )
        expect_key(TIMES, time, "time", "it is what the network gets of the scheduler's timestep t")
    expect(sign in (None, 1, -1), "sign", sign, "1 or -1", "-1 is for networks that return data - noise")
    if ema is not None:
        model = averaged(model, ema)
    if type(scheduler).__name__.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas"):
        return _flow_density(model, scheduler, time, sign, options)
    if type(scheduler).__name__.startswith("EDM") or scheduler.config.get("timestep_type") == "continuous":
        return _preconditioned_density(model, scheduler, time, sign, options)
    expect_attributes(
        scheduler,
        ("alphas_cumprod",),
        "scheduler",
        "one with alphas_cumprod (DDPM, DDIM, Euler, ...) or a FlowMatch...Scheduler",
        _of_training(scheduler),
    )
    predicts = expect_key(
        PREDICTIONS, scheduler.config.get("prediction_type", "epsilon"), "prediction_type", "see the config"
    )
    own = _convention(model, scheduler, time, sign, flow=False)
    net = DiffusersNet(model, _affine(own, scheduler, model), own.sign, own.argument, own.output)
    return ScoreDensity(net, table(scheduler.alphas_cumprod), predicts=predicts, **options)


def _of_training(scheduler: Any) -> str:
    """Return what to do about a scheduler that samples only; without betas in its config, none says what it was."""
    own = "a ScoreDensity of the network with the schedule of its training, such as VE(...) or DDPM.linear(1000)"
    betas = "beta_schedule" in scheduler.config or scheduler.config.get("trained_betas") is not None
    return f"build DDPMScheduler.from_config(scheduler.config), or {own}" if betas else f"build {own}"


def _flow_density(
    model: nn.Module, scheduler: object, time: str | None, sign: int | None, options: dict
) -> ScoreDensity:
    """Return the density of a network on the scheduler's straight path."""
    own = _convention(model, scheduler, time, sign, flow=True)
    offset, slope = _affine(own, scheduler, model)
    steps, inverted = int(scheduler.config.num_train_timesteps), bool(scheduler.config.get("invert_sigmas"))
    # The scheduler's t is s T, or (1 - s) T where it counts from the noise; then its velocity is that of 1 - s.
    in_s = (offset + slope * steps, -slope * steps) if inverted else (offset, slope * steps)
    net = DiffusersNet(model, in_s, -own.sign if inverted else own.sign, own.argument, own.output)
    return ScoreDensity(net, _straight(scheduler), predicts="flow", **options)


def _preconditioned_density(
    model: nn.Module, scheduler: object, time: str | None, sign: int | None, options: dict
) -> ScoreDensity:
    """Return the density of a network that gets EDM's noise scaled, and log(sigma) / 4 as its time."""
    config, given = scheduler.config, type(scheduler).__name__
    edm, kind = given.startswith("EDM"), config.prediction_type
    expect(
        time is None and sign is None,
        "time and sign",
        f"{time!r} and {sign!r}",
        f"left out with {given}, which says both",
        "give the scheduler of training, or build a ScoreDensity with EDM() and a module that converts the time",
    )
    expect(
        kind == "v_prediction" or (edm and kind == "epsilon"),
        "prediction_type",
        f"{kind!r} of {given}",
        "'epsilon' or 'v_prediction' of an EDM scheduler, 'v_prediction' of another one with continuous times",
        "build a ScoreDensity with EDM() and a module that converts the time",
    )
    low, high = config.sigma_min, config.sigma_max
    expect(
        low is not None and high is not None,
        "the noise range",
        f"{low} to {high} in the config of {given}",
        "sigma_min and sigma_max of training",
        "give them to the scheduler",
    )
    own = _convention(model, scheduler, time, sign, flow=False)
    schedule = Preconditioned(float(low), float(high), float(config.sigma_data) if edm else 1.0)
    net = DiffusersNet(model, sign=-1 if kind == "epsilon" else 1, argument=own.argument, output=own.output)
    return ScoreDensity(NoiseLabel(net, schedule.sigma_data), schedule, predicts="flow", **options)


def _convention(model: nn.Module, scheduler: object, time: str | None, sign: int | None, flow: bool) -> Convention:
    """Return how a network is called: as was said, as its class's pipeline does, or with a table's own timesteps.

    Raises:
        ValueError: where nothing tells, or where the class is known for another scheduler.
    """
    kind, given = known_class(model), type(scheduler).__name__
    expect(
        kind not in REFUSED,
        "model",
        f"{kind} ({REFUSED.get(kind)})",
        "a network of x_t and t",
        "build a ScoreDensity with a Schedule and a module of your own that calls it",
    )
    own = (FLOW | TABLE).get(kind, Convention(""))
    if time is not None:
        return own._replace(time=time, sign=own.sign if sign is None else sign, factor=None)
    known = kind in FLOW if flow else kind is None or kind in FLOW | TABLE
    expect(
        known,
        "time",
        f"none for {kind or type(bare(model)).__name__} with {given}",
        f"one of {', '.join(map(repr, TIMES))}",
        "pass what the network got in training of the scheduler's timestep t, and sign=-1 if it returned data - noise",
    )
    remedy = f"give the scheduler of {own.pipeline}, or pass time= and sign= as in training"
    if flow:
        steps, inverted = int(scheduler.config.num_train_timesteps), bool(scheduler.config.get("invert_sigmas"))
        got = f"{given} with num_train_timesteps={steps} and invert_sigmas={inverted}"
        wanted = f"one with num_train_timesteps={own.steps or steps} and invert_sigmas={own.inverted} for {kind}"
        expect((own.steps or steps, own.inverted) == (steps, inverted), "scheduler", got, wanted, remedy)
    else:
        plain = own[1:5] == Convention("")[1:5] and own.factor is None
        expect(plain, "scheduler", given, f"a flow-matching one for {kind}", remedy)
    return own if sign is None else own._replace(sign=sign)


def _affine(own: Convention, scheduler: object, model: nn.Module) -> tuple[float, float]:
    """Return (offset, slope) of the network's time in the scheduler's timestep t."""
    factor = 1.0 if own.factor is None else float(getattr(bare(model).config, own.factor))
    offset, slope = TIMES[own.time](int(scheduler.config.num_train_timesteps))
    return factor * offset, factor * slope


def _straight(scheduler: object) -> Schedule:
    """Return straight paths from the scheduler's least noise on: below it the network was not trained."""
    config, schedule = scheduler.config, FlowMatching(data_at=0)
    if config.get("use_flow_sigmas"):
        expected = "flow_prediction"
        expect(
            config.prediction_type == expected, "prediction_type", config.prediction_type, expected, "see the config"
        )
        shift, first = float(config.get("flow_shift", 1.0)), 1 / int(config.num_train_timesteps)
        least = shift * first / (1 + (shift - 1) * first)
    else:
        # With times from 0 to 1 the library's own table has one entry, pure noise.
        least = float(scheduler.sigma_min) if int(config.num_train_timesteps) > 1 else 0.0
    clean, noisy = schedule.time_range
    schedule.time_range = (max(clean, least), noisy)
    return schedule
