"""The network inside of what calls it as it is: torch's own wrappers, averages of weights, and ema_pytorch.

What an adapter reads off a network is looked for there. A wrapper that has not the attribute would else be taken for a
network that does not state it.
"""

from __future__ import annotations

from torch import nn

# By package and class: the attribute that holds the network, which the wrapper calls with the arguments it gets.
WRAPPERS = {
    ("torch", "AveragedModel"): "module",
    ("torch", "DataParallel"): "module",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "FullyShardedDataParallel"): "module",
    ("torch", "OptimizedModule"): "_orig_mod",
    ("ema_pytorch", "EMA"): "ema_model",
}


def bare(model: nn.Module) -> nn.Module:
    """Return the network inside of all wrappers that are known; another module is its own."""
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    for base in type(model).__mro__:
        name = WRAPPERS.get((base.__module__.partition(".")[0], base.__name__))
        held = None if name is None else getattr(model, name, None)
        if isinstance(held, nn.Module):
            return held
    return None
