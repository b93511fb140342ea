"""Numbers on the host: schedules, nodes and weights are a few float64 numbers, which Python reads before any device."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor


def as_tensor(value: object) -> Tensor:
    """Return a tensor as it is, wherever it is; numbers and arrays as a tensor on the CPU."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of the CPU, with numbers of eight bytes, on a device: in one copy, or with their graphs."""
    if device.type == "cpu" or any(tensor.requires_grad for tensor in tensors):
        return [tensor.to(device) for tensor in tensors]
    block = torch.cat([tensor.reshape(-1).view(torch.int64) for tensor in tensors]).to(device)
    parts = block.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors)]


def whole(name: str, value: object) -> int:
    """Return an integer of any kind (Python's, numpy's, a tensor of one element) as Python's.

    Raises:
        ValueError: for anything else, a float with an integer's value included.
    """
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def layout_of(tensor: Tensor) -> str | None:
    """Return what a tensor is that is not dense ("sparse_coo", "nested", ...), None for an ordinary one."""
    if tensor.is_nested:
        return "nested"
    return None if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.").strip("_")


def positive(name: str, value: object, unit: str) -> float:
    """Return a positive number as a float; raise ValueError for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = 0.0
    if isinstance(value, str) or not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive ({unit}), got {value!r}")
    return number
