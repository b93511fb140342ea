"""Networks and schedulers of MONAI: tables of timesteps (DDPM, DDIM, PNDM), and rectified flows.

A network is called as `model(x, timesteps, context=..., class_labels=...)`. A rectified flow noises with
x_t = (1 - s) x + s eps at the timestep t = s T, and its network returns x - eps.

References:
    https://github.com/Project-MONAI/MONAI
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..density import ScoreDensity
from ..process.schedules import FlowMatching
from .checks import adapter, expect_attributes, expect_key, expect_module
from .clocks import table
from .diffusers import PREDICTIONS


class RectifiedFlow(nn.Module):
    """Call a network with t = s T, and return eps - x."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def forward(self, x_t: Tensor, s: Tensor, **cond: Any) -> Tensor:
        return -self.model(x_t, self.steps * s, **cond)


@adapter
def from_monai(model: nn.Module, scheduler: object | None = None, **options: Any) -> ScoreDensity:
    """Return the density of a MONAI diffusion model; `context`, `class_labels` and `seg` are keyword arguments.

    A condition that MONAI's inferers join to the channels (mode="concat") goes through a module of your own around the
    network. The density is that of the model's own input: latents for a latent diffusion model.

    Arguments:
        model: called as `model(x_t, timesteps, **cond)`, such as `DiffusionModelUNet`.
        scheduler: of training; one with `alphas_cumprod` (`DDPMScheduler`, `DDIMScheduler`, `PNDMScheduler`), or a
            `RFlowScheduler`. One with discrete timesteps is evaluated between them, from t = 1 on.
        options: of `ScoreDensity`.

    Returns:
        `ScoreDensity` of the model's own input.

    Raises:
        TypeError: if either is something else.
        ValueError: for an unknown prediction type.
    """
    expect_module(model, "model", "a MONAI network such as DiffusionModelUNet", "give the one that was trained")
    wanted, remedy = "a MONAI scheduler such as DDPMScheduler", "give the one of training"
    expect_attributes(scheduler, ("num_train_timesteps", "prediction_type"), "scheduler", wanted, remedy)
    if "RFlowScheduler" in {base.__name__ for base in type(scheduler).__mro__}:
        steps, schedule = int(scheduler.num_train_timesteps), FlowMatching(data_at=0)
        if scheduler.use_discrete_timesteps:  # t = 0 has no noise, and below t = 1 the network has seen nothing else
            schedule.time_range = (1 / steps, schedule.time_range[1])
        return ScoreDensity(RectifiedFlow(model, steps), schedule, predicts="flow", **options)
    expect_attributes(scheduler, ("alphas_cumprod",), "scheduler", wanted, remedy)
    kind = str(scheduler.prediction_type)
    predicts = expect_key(PREDICTIONS, kind, "prediction_type", "give the scheduler of training")
    return ScoreDensity(model, table(scheduler.alphas_cumprod), predicts=predicts, **options)
