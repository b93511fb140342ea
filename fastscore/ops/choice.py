"""Which backend evaluates a row program, and why: one choice for the evaluation and for `fastscore.explain`."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from . import measured
from .select import implementation
from .task import Task


class Choice(NamedTuple):
    """A backend, whether one kernel of it does all of the work, and the reason."""

    backend: str
    fused: bool
    reason: str


def alone(names: tuple[str, ...]) -> Choice | None:
    """Return the choice where PyTorch is the only backend, as on a CPU; no work has to be described for it."""
    if names != ("torch",):
        return None
    return Choice(
        "torch", False, "one PyTorch operation after another; kernels need a GPU, float32 and another backend"
    )


def choose(names: tuple[str, ...], task: Task, gradient: bool = False) -> Choice:
    """Return who evaluates a row program.

    Arguments:
        names: backends that can run, in order, as `select.runnable` returns them. Where torch is among others the
            choice is free, and what a GPU measured (`measured.py`) orders them.
        gradient: whether the gradient of the program's weights is wanted.
    """
    if (only := alone(names)) is not None:
        return only
    free = "torch" in names
    order, because = _measured(names, task, gradient) if free else (names, "asked for")
    reasons = []
    for name in order:
        reason = None if name == "torch" else _why_not(name, task, free)
        if reason is None:
            return Choice(name, name != "torch", "; ".join([because, *reasons]))
        reasons.append(f"{name}: {reason}")
    return Choice(names[0], False, "; ".join(reasons))


def _why_not(name: str, task: Task, free: bool) -> str | None:
    own = implementation(name)
    return own.why_not_fused(task) or (own.why_not_unasked(task) if free else None)


def _measured(names: tuple[str, ...], task: Task, gradient: bool) -> tuple[tuple[str, ...], str]:
    capability = _capability(task.device)
    if capability != measured.CAPABILITY:
        nothing = f"nothing is measured for compute capability {'.'.join(map(str, capability))}, and "
        if gradient:  # who asks for a kernel gets it
            return ("torch",), nothing + "no kernel is known to be faster than PyTorch at the gradient of the weights"
        return ("triton",), nothing + "Triton's kernels cover most"
    row = measured.nearest("gradient" if gradient else "forward", task.kind, task.width)
    order = tuple(name for name in row.order if name in names)
    return order, f"measured at {row.kind}, width {row.width}: {row} ({measured.SOURCE})"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
