"""Numbers on the host: schedules, nodes and weights are a few float64 numbers, which Python reads before any device."""

from __future__ import annotations

import math
import operator
from collections.abc import Container, Sequence

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

_TO_DENSE = {"quantized": "dequantize", "MaskedTensor": "get_data", "DTensor": "full_tensor"}


def as_tensor(value: object) -> Tensor:
    """Return a tensor as it is, wherever it is; numbers and arrays as a tensor on the CPU."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def as_float64(value: object) -> Tensor:
    """Return a tensor in float64 where it is, numbers and arrays on the CPU: Python's are not float32 on the way."""
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of the CPU, with numbers of eight bytes, on a device: in one copy, or with their graphs."""
    if device.type == "cpu" or any(tensor.requires_grad for tensor in tensors):
        return [tensor.to(device) for tensor in tensors]
    block = torch.cat([tensor.reshape(-1).view(torch.int64) for tensor in tensors]).to(device)
    parts = block.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors)]


def whole(name: str, value: object) -> int:
    """Return an integer of any kind (Python's, numpy's, a tensor without dimensions) as Python's.

    Raises:
        ValueError: for anything else, a float with an integer's value and a truth value included.
    """
    try:
        if not isinstance(value, bool) and not (isinstance(value, Tensor) and value.dtype == torch.bool):
            return operator.index(value)
    except (TypeError, RuntimeError):
        pass
    raise ValueError(f"{name} must be an integer, got {value!r}")


def seed_of(value: object) -> int:
    """Return a seed, an integer of any kind, as Python's; raise ValueError for what is none, or has over 64 bits."""
    seed = whole("seed", value)
    if not -(1 << 63) <= seed < 1 << 64:
        raise ValueError(f"seed must be an integer of 64 bits, got one of {seed.bit_length()} bits; give less")
    return seed


def flag(name: str, value: object) -> bool:
    """Return a truth value of any kind (Python's, numpy's, a tensor without dimensions) as Python's.

    Raises:
        ValueError: for anything else: a number counts, a text is always true, and neither was meant.
    """
    if isinstance(value, bool | np.bool_) or (
        isinstance(value, Tensor) and value.dtype == torch.bool and not value.ndim
    ):
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {value!r}")


def chosen(value: object, names: Container[object]) -> bool:
    """Return whether a value is one of some names or truth values; an array is none, and cannot say so itself."""
    return isinstance(value, str | int) and value in names


def kind_of(value: object) -> str:
    """Return what a value is, for a message: its class, or that it is a class of which an object was meant."""
    return f"the class {value.__name__} and no object of it" if isinstance(value, type) else type(value).__name__


def layout_of(tensor: Tensor) -> str | None:
    """Return what a tensor is that is not dense ("sparse_coo", "nested", "MaskedTensor", ...), None for a dense one.

    A class with operations of its own is not dense where a copy is of it too: no kernel sees its numbers.
    """
    if tensor.is_nested or tensor.is_quantized:
        return "nested" if tensor.is_nested else "quantized"
    kind = type(tensor)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        if is_fake(tensor):  # a trace would keep the copy
            return "FakeTensor"
        if type(tensor.detach().clone()) is kind:
            return kind.__name__
    return None if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.").strip("_")


def refuse_not_dense(name: str, value: object) -> None:
    """Raise ValueError for a tensor that is not dense, or has no values."""
    if isinstance(value, Tensor) and (kind := "meta" if value.is_meta else layout_of(value)) is not None:
        raise ValueError(f"{name} must be a dense tensor, got a {kind} one; {dense_form(kind)}")
    if isinstance(value, np.ma.MaskedArray):  # whose fill values would be read as data
        raise ValueError(f"{name} must be a plain array, got a masked one; give .filled(0), and ~{name}.mask as mask=")


def dense_form(layout: str) -> str:
    """Return how to get a dense tensor instead of one in a layout, for a message."""
    if layout in ("meta", "FakeTensor"):
        return "give one with values"
    return f".{_TO_DENSE.get(layout, 'to_dense')}() makes a dense one"


def finite(name: str, value: object) -> float:
    """Return a finite number as a float; raise ValueError for anything else."""
    number = _number(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def share(name: str, value: object, example: float, remedy: str = "") -> float:
    """Return a number between 0 and 1 as a float; raise ValueError for anything else, 0 and 1 included."""
    number = _number(value)
    if not 0 < number < 1:
        raise ValueError(f"{name} must lie between 0 and 1, such as {example:g}, got {value!r}{remedy}")
    return number


def positive(name: str, value: object, unit: str) -> float:
    """Return a positive number as a float; raise ValueError for anything else."""
    number = _number(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive ({unit}), got {value!r}")
    return number


def numbers(name: str, value: object, expected: str) -> Tensor:
    """Return numbers of any kind as a float64 tensor where they are; raise ValueError for what has none.

    Arguments:
        expected: what they are, for the message, such as "a table of timesteps, shape (T,)".
    """
    try:
        if value is not None and not isinstance(value, str | bytes):
            found = as_float64(value)
            if not (isinstance(value, Tensor) and value.is_complex()):
                return found
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise ValueError(f"{name} must be {expected}, got {_in_short(value)}")


def floating(name: str, value: object, shape: str) -> Tensor:
    """Return a dense floating-point tensor as it is; raise ValueError for anything else.

    Arguments:
        shape: what is expected of its shape, for the message, such as "(N, *shape)".
    """
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a floating-point tensor {shape}, got {kind_of(value)}; torch.as_tensor makes one of "
            "an array"
        )
    refuse_not_dense(name, value)
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor {shape}, got {value.dtype}; convert it with .float()")
    return value


def _number(value: object) -> float:
    """Return a number as a float; NaN for what is none, such as a text, a truth value or several numbers."""
    if isinstance(value, bool | np.bool_ | str | bytes) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _in_short(value: object) -> str:
    """Return what a value is, for a message: itself where that is short, else its class."""
    told = repr(value)
    return told if len(told) <= 40 else kind_of(value)


def all_finite(x: Tensor) -> bool:
    """Return whether no number is NaN or inf; this waits for the device."""
    # Their sum tells it in one pass, unless numbers are so large that it is not finite though they are.
    return math.isfinite(float(x.detach().sum())) or bool(torch.isfinite(x).all())
