"""In which dtype a network takes x_t, where that of its first parameter may not be it.

A network whose parameters have half precision is called in half precision, unless it takes the dtype of the sums:
layers that hold bfloat16 or float8 and compute in float32 (diffusers' layerwise casting), networks that begin with
`x.float()`, and those whose first parameter alone has half precision. Rounding x_t for these would cost digits for
nothing, or be refused by their layers. Calls of two rows tell; layers of half precision refuse them at once.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

WIDE, NARROW = 4, 1  # bytes of a number: no call is asked about the one, and nothing is computed in the other
HALF = torch.bfloat16, torch.float16

# By network: the dtypes of its parameters and of the sums, under autocast or not, and what it took.
_TAKEN: weakref.WeakKeyDictionary[nn.Module, dict[tuple, torch.dtype]] = weakref.WeakKeyDictionary()


def first_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype of the network's first floating parameter, or the default if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), default)


def model_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the dtype that the network takes x_t in: that of its first floating parameter, or what `settle` found.

    Arguments:
        default: the dtype of the sums, for a network without parameters.
    """
    own = first_dtype(model, default)
    if own.itemsize >= WIDE or default.itemsize < WIDE or model not in _TAKEN:
        return own
    return _TAKEN[model].get(_key(model, default), own)


def is_open(model: nn.Module, default: torch.dtype) -> bool:
    """Return whether the network has to be asked what it takes."""
    return first_dtype(model, default).itemsize < WIDE and _key(model, default) not in _TAKEN.get(model, {})


def settle(model: nn.Module, x: Tensor, time: Tensor, given: dict[str, object]) -> None:
    """Ask the network, and remember the first dtype that it took; of a call that is wrong in all of them, nothing.

    Arguments:
        x, time, given: as the network is called with them, x in the dtype of the sums.
    """
    for dtype in _candidates(model, x.dtype):
        at = time.to(dtype) if time.dtype == x.dtype else time
        for some in (given, _raised(given, dtype))[: 2 if any(map(_is_half, given.values())) else 1]:
            try:
                model(x.to(dtype), at, **some)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever the network raises: the call itself tells it
                continue
            _TAKEN.setdefault(model, {})[_key(model, x.dtype)] = dtype
            return


def _candidates(model: nn.Module, default: torch.dtype) -> list[torch.dtype]:
    """Return the dtype of the sums, float32, and those of the parameters, or that those of one byte may stand for."""
    own = [p.dtype for p in model.parameters() if p.is_floating_point()]
    found = dict.fromkeys([default, torch.float32, *own, *(HALF if own[0].itemsize <= NARROW else ())])
    return [dtype for dtype in found if dtype.itemsize > NARROW]


def _raised(given: dict[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Return conditions with those of half precision in a dtype, as a run over a data set makes them later on."""
    return {name: value.to(dtype) if _is_half(value) else value for name, value in given.items()}


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF


def _key(model: nn.Module, default: torch.dtype) -> tuple:
    own = frozenset(p.dtype for p in model.parameters())
    return own, default, *map(torch.is_autocast_enabled, ("cpu", "cuda"))
