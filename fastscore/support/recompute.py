"""Activations that are computed again in the backward pass, for all networks that allow it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .warn import warn

_KEPT: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # networks that no checkpoint goes with


def recomputed(model: nn.Module, function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Return function(*arguments), of which a backward pass keeps the arguments alone and computes the rest again.

    A network that calls torch.func.grad, vjp or jacrev inside goes with no checkpoint, as these allow no hooks on saved
    tensors: its activations are kept, with a warning.
    """
    if model not in _KEPT:
        forbidden = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
        try:
            return checkpoint(function, *arguments, use_reentrant=False)
        except (ValueError, RuntimeError) as error:
            if "saved tensor hooks" not in str(error):
                raise
        if forbidden is None:  # torch.func forbade them before it found that there were some, and left it so
            torch._C._autograd._saved_tensors_hooks_enable()
        _KEPT.add(model)
        warn(
            "the network calls torch.func inside, which allows no checkpoint: what all its rows store is kept for the "
            "backward pass, beyond memory=; take torch.autograd.grad there, or estimate, which needs no derivative"
        )
    return function(*arguments)
