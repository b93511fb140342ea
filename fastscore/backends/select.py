"""Choose the backend of the ops; one predicate serves the choice, the error message and `fastscore info`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """A backend and `why_not(device, dtype)`: the reason why it cannot run there, or None if it can."""

    name: str
    why_not: Callable[[torch.device, torch.dtype], str | None]


def _torch_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in (torch.float32, torch.float64):
        return f"sums need float32 or float64, got {dtype}"
    return None


def _triton_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, got {device.type}"
    return "this version has no Triton kernels yet"


def _cuda_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return f"needs tensors on a CUDA device, got {device.type}"
    return "this version has no CUDA kernels yet"


# In order of preference.
BACKENDS = (
    Backend("cuda", _cuda_why_not),
    Backend("triton", _triton_why_not),
    Backend("torch", _torch_why_not),
)


def select(device: torch.device, dtype: torch.dtype, name: str = "auto") -> str:
    """Return the name of the first backend that can run, or of the one asked for.

    Raises:
        ValueError: for an unknown name, or with each backend's reason where the choice cannot run.
    """
    known = {backend.name: backend for backend in BACKENDS}
    if name != "auto" and name not in known:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(known)}; got {name!r}")
    asked = BACKENDS if name == "auto" else (known[name],)
    reasons = {backend.name: backend.why_not(device, dtype) for backend in asked}
    for backend, reason in reasons.items():
        if reason is None:
            return backend
    listed = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
    raise ValueError(
        f"no backend can run on {device} in {dtype}: {listed}. Use backend='auto' with float32 or float64 data"
    )
