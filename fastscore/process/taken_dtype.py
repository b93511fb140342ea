"""In which dtype a network takes x_t, where that of its first parameter may not be it.

A network whose parameters have half precision is called in half precision, unless it takes the dtype of the sums:
layers that hold bfloat16 or float8 and compute in float32 (diffusers' layerwise casting), networks that begin with
`x.float()`, and those whose first parameter alone has half precision. Rounding x_t for these would cost digits for
nothing, or be refused by their layers. One call of one sample tells; layers of half precision refuse it at once.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

WIDE = 4  # bytes of a number that no call is asked about

# By network: the dtypes of its first parameter and of the sums, under autocast or not, and what it took.
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
    return _TAKEN[model].get(_key(own, default), own)


def is_open(model: nn.Module, x: Tensor) -> bool:
    """Return whether the network has to be asked, once, what it takes."""
    own = first_dtype(model, x.dtype)
    return own.itemsize < WIDE <= x.dtype.itemsize and _key(own, x.dtype) not in _TAKEN.get(model, {})


def settle(model: nn.Module, x: Tensor, time: Tensor, given: dict[str, object]) -> None:
    """Ask the network with data as they are, and remember what it took.

    Arguments:
        x, time, given: as the network is called with them, x in the dtype of the sums.
    """
    own = first_dtype(model, x.dtype)
    try:
        model(x, time, **given)
        taken = x.dtype
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever the network raises: it is asked again as before, and then its reason is told
        taken = own
    _TAKEN.setdefault(model, {})[_key(own, x.dtype)] = taken


def _key(own: torch.dtype, default: torch.dtype) -> tuple:
    return own, default, *map(torch.is_autocast_enabled, ("cpu", "cuda"))
