"""A network with the averaged weights that an object of training holds beside it."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from .checks import expect, expect_attributes
from .wrappers import bare


def averaged(model: nn.Module, average: object) -> nn.Module:
    """Return a copy of a network whose parameters are the averages of an `EMAModel`, those of this moment.

    The copy has its own parameters and buffers; nothing of the model or of the averages is written to.

    Arguments:
        model: whose parameters were averaged, all or those that are trained; wrappers are left out.
        average: with `shadow_params`, the averages in the order of the parameters.

    Raises:
        TypeError: if there are no averages.
        ValueError: if they are not those of the model's parameters.
    """
    wanted, remedy = "an EMAModel of diffusers", "give what was made of this model's parameters()"
    expect_attributes(average, ("shadow_params",), "ema", wanted, remedy)
    model, shadows = bare(model), list(average.shadow_params)
    every = list(model.parameters())
    trained = [each for each in every if each.requires_grad]
    own = every if len(every) == len(shadows) else trained
    shapes, others = ([tuple(each.shape) for each in some] for some in (own, shadows))
    expect(
        shapes == others,
        "ema",
        f"averages of {len(shadows)} parameters{_first(others, shapes)}",
        f"those of {type(model).__name__} with {len(every)} parameters, {len(trained)} of them trained",
        remedy,
    )
    # What a deep copy finds in its memo is taken for the copy: the averages, in the places of the parameters.
    return copy.deepcopy(model, {id(each): _parameter(each, shadow) for each, shadow in zip(own, shadows)})


def _parameter(own: nn.Parameter, shadow: Tensor) -> nn.Parameter:
    value = shadow.detach().to(own.device, own.dtype, copy=True)
    return nn.Parameter(value, requires_grad=own.requires_grad)


def _first(others: list[tuple], shapes: list[tuple]) -> str:
    """Return in words the first of as many shapes that differs."""
    pairs = zip(others, shapes) if len(others) == len(shapes) else ()
    return next((f", of which {other} stands for {shape}" for other, shape in pairs if other != shape), "")
