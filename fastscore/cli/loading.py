"""Turn the words of a command line into a density."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import torch

from ..density import ScoreDensity
from ..estimator.protocol import Density
from ..process.predictions import what_it_must_say
from .exported import load_exported
from .factories import call_factory
from .schedules import parse_schedule, schedule_usage


def load_density(
    spec: str, schedule: str | None, predicts: str | None, device: torch.device
) -> tuple[Density, dict[str, str]]:
    """Return the density of MODEL on a device, and what identifies the model beside its weights.

    Arguments:
        spec: a .pt2 file of `torch.export.save`, or "package.module:factory".
        schedule, predicts: as in `parse_schedule` and `ScoreDensity`; None where the factory returns a density.

    Raises:
        ValueError: if the model cannot be loaded, or if schedule and predicts are missing or not wanted.
    """
    if spec.endswith(".pt2"):
        model, time = load_exported(spec, device)
        identity = hashlib.sha256(Path(spec).read_bytes()).hexdigest()
    elif ":" in spec:
        model, time, identity = call_factory(spec), None, spec
    else:
        raise ValueError(f"the model must be a .pt2 file of torch.export or package.module:factory, got {spec!r}")
    with suppress(NotImplementedError):  # an exported module has no modes
        model.eval()
    if isinstance(model, Density):
        if schedule is not None or predicts is not None:
            raise ValueError(
                f"{spec} returns a ready {type(model).__name__}, which brings its own; drop --schedule and --predicts"
            )
        return model.to(device), {"model": identity}
    if schedule is None or predicts is None:
        missing = "--schedule is" if predicts else "--predicts is" if schedule else "both are"
        needed = ". ".join(
            [what_it_must_say("--predicts")] * (predicts is None)
            + [f"Schedules: {schedule_usage()}"] * (schedule is None)
        )
        raise ValueError(
            f"{spec} is a network; say with --schedule and --predicts how it was trained ({missing} missing): {needed}"
            ". Where another library's objects say both, the factory may return fastscore.from_model(...) of them"
        )
    process = parse_schedule(schedule)
    if time is not None and not time.is_floating_point and not process.discrete:
        raise ValueError(f"{spec} takes {time} timesteps, but schedule {schedule!r} gives fractions; use a ddpm table")
    return ScoreDensity(model, process, predicts, time_dtype=time).to(device), {"model": identity}
