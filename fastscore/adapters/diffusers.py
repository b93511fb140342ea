"""Networks and schedulers of Hugging Face diffusers.

A scheduler with a table `alphas_cumprod` is a `DDPM` of that table: the network is called with the training timesteps
0 .. T-1, whatever `set_timesteps` chose for sampling. A flow-matching scheduler's path is x_t = (1 - s) x + s eps with
velocity eps - x, and its network gets the time s T.

References:
    https://github.com/huggingface/diffusers
"""

from __future__ import annotations

from torch import Tensor, nn

from ..density import ScoreDensity
from ..schedules import FlowMatching, Schedule
from .checks import expect, expect_attributes, expect_key, expect_module
from .clocks import table

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


class DiffusersNet(nn.Module):
    """Call a diffusers model with its time by keyword, since its place differs, times `time_factor`."""

    def __init__(self, model: nn.Module, time_factor: float = 1):
        super().__init__()
        self.model, self.time_factor = model, time_factor

    def forward(self, x_t: Tensor, t: Tensor, **cond) -> Tensor:
        return self.model(x_t, timestep=t if self.time_factor == 1 else t * self.time_factor, **cond).sample


def from_diffusers(model: nn.Module, scheduler: object, **options) -> ScoreDensity:
    """Return the density of a diffusers model (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel, ...).

    Class labels, `encoder_hidden_states` and other conditions are keyword arguments of `log_prob` and `estimate`. A
    learned variance (twice the channels) is cut off. The density is that of the model's own input: latents for a
    latent diffusion model, with its scaling factor in.

    Arguments:
        model: called as `model(x_t, timestep=t, **cond)`, returns an object with `.sample`.
        scheduler: the one of training, with `alphas_cumprod` (DDPM, DDIM, Euler, DPM-Solver, ...; `prediction_type`
            epsilon, sample or v_prediction), or a FlowMatch...Scheduler.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the model's own input.

    Raises:
        TypeError: if either is something else.
        ValueError: for a prediction type or a scheduler that is neither kind.
    """
    expect_module(model, "model", "a diffusers model such as UNet2DModel", "give pipeline.unet or pipeline.transformer")
    wanted = "a diffusers scheduler with a config"
    expect_attributes(scheduler, ("config",), "scheduler", wanted, "give pipeline.scheduler")
    if type(scheduler).__name__.startswith("FlowMatch"):
        net = DiffusersNet(model, int(scheduler.config.num_train_timesteps))
        return ScoreDensity(net, _flow(scheduler), predicts="flow", **options)
    expect_attributes(
        scheduler,
        ("alphas_cumprod",),
        "scheduler",
        "one with alphas_cumprod (DDPM, DDIM, Euler, ...) or a FlowMatch...Scheduler",
        "build DDPMScheduler.from_config(scheduler.config), or a ScoreDensity with your own schedule",
    )
    config = scheduler.config
    continuous = config.get("timestep_type") == "continuous" or bool(config.get("use_flow_sigmas"))
    expect(
        not continuous,
        "scheduler",
        f"{type(scheduler).__name__} with continuous times",
        "one whose network is called with whole timesteps",
        "build a ScoreDensity with EDM() or FlowMatching(0) and a module that converts the time",
    )
    predicts = expect_key(PREDICTIONS, config.get("prediction_type", "epsilon"), "prediction_type", "see the config")
    return ScoreDensity(DiffusersNet(model), table(scheduler.alphas_cumprod), predicts=predicts, **options)


def _flow(scheduler: object) -> Schedule:
    """Return straight paths from the scheduler's least noise on: below it the network was not trained."""
    schedule = FlowMatching(data_at=0)
    clean, noisy = schedule.time_range
    schedule.time_range = (max(clean, float(scheduler.sigma_min)), noisy)
    return schedule
