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
    tensors: its activations are kept, with a warning. So they are where somebody has forbidden such hooks before.
    """
    forbidden = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if forbidden is None and model not in _KEPT:
        try:
            return checkpoint(function, *arguments, use_reentrant=False)
        except (ValueError, RuntimeError) as error:
            if "saved tensor hooks" not in str(error):
                raise
        torch._C._autograd._saved_tensors_hooks_enable()  # torch.func forbids them before it finds that there are some
        _KEPT.add(model)
        warn(
            "the network calls torch.func inside, which allows no checkpoint: what all its rows store is kept for the "
            "backward pass, beyond memory=; take torch.autograd.grad there, or estimate, which needs no derivative"
        )
    return function(*arguments)
