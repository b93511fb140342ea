"""Schedules from the words of a command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from ..process.ddpm import DDPM
from ..process.schedules import EDM, VE, VP, Cosine, FlowMatching, LiYan, LogSNR, Schedule
from ..support.host import as_tensor
from ..support.spelling import did_you_mean
from .arrays import ARRAY, load_array
from .words import number

SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "ddpm-linear": DDPM.linear,
    "ddpm-scaled-linear": DDPM.scaled_linear,
    "ddpm-cosine": DDPM.cosine,
    "vp": VP,
    "cosine": Cosine,
    "ve": VE,
    "edm": EDM,
    "flow": FlowMatching,
    "li-yan": LiYan,
    "log-snr": LogSNR,
}

# How other libraries call them.
ELSEWHERE = {
    "ddpm": "'ddpm-linear' or 'ddpm-cosine'",
    "linear": "'ddpm-linear'",
    "scaled-linear": "'ddpm-scaled-linear', that of Stable Diffusion",
    "squaredcos-cap-v2": "'ddpm-cosine'",
    "vpsde": "'vp'",
    "vesde": "'ve'",
    "flow-matching": "'flow'",
    "rectified-flow": "'flow'",
    "logsnr": "'log-snr'",
}


def schedule_usage() -> str:
    """Return every name that `parse_schedule` knows with its arguments and their defaults, comma-separated."""
    return ", ".join(_usage(name) for name in SCHEDULES)


def parse_schedule(text: str) -> Schedule:
    """Return the schedule of "name", "name:number,number" or a .npy, .npz, .pt or .safetensors file of alphas_cumprod.

    Raises:
        ValueError: for an unknown name (the message lists the valid ones), or arguments that it does not take.
    """
    if ARRAY.fullmatch(text):
        return DDPM(as_tensor(load_array(text)))
    name, _, given = text.partition(":")
    if name not in SCHEDULES:
        raise ValueError(
            f"schedule must be one of {schedule_usage()}, or a .npy or .pt file with alphas_cumprod; got {text!r}"
            + did_you_mean(name, SCHEDULES, ELSEWHERE)
        )
    wrong = f"schedule {name!r} takes {_usage(name)}, numbers separated by commas; got {text!r}"
    try:
        numbers = [number(word) for word in given.split(",")] if given else []
    except ValueError:
        raise ValueError(wrong) from None
    try:
        return SCHEDULES[name](*numbers)
    except (TypeError, ValueError) as error:  # too many, a fraction where a count belongs, or what makes no schedule
        raise ValueError(wrong if isinstance(error, TypeError) else f"{wrong}: {error}") from None


def _usage(name: str) -> str:
    parameters = inspect.signature(SCHEDULES[name]).parameters.values()
    arguments = ",".join(p.name if p.default is None else f"{p.name}={p.default}" for p in parameters)
    return f"{name}[:{arguments}]" if arguments else name
