"""Networks that write into what they are called with: `labels -= 1`, `context *= scale`, `x.clamp_(-1, 1)`.

In a sampler's loop nobody looks at a batch again. Here a condition is the caller's own, and every later call would find
what the one before has left. What belongs to samples is repeated along the rows, in memory of its own; what all samples
share is passed as it is, unless a first call, with a copy, shows that the network writes into it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .conditions import Conditions

# By network: of the paths of shared tensors whether it writes into them; and those that write into x_t.
_SHARED: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()
_X_T: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def call_network(
    model: nn.Module, call: Callable[..., object], x_t: Tensor, time: Tensor, cond: Conditions, rows: int
) -> object:
    """Return what a network answers for `rows` consecutive rows of every sample, and leave the conditions alone.

    Arguments:
        call: what is called and answers as the network does: itself, or as compiled.

    Raises:
        ValueError: if the network writes into a condition that it had left alone before.
    """
    tensors = {path: value for path, value in cond.shared.items() if isinstance(value, Tensor)}
    if not tensors:
        return _call(model, call, x_t, time, cond.repeated(rows))
    known = _SHARED.setdefault(model, {})
    passed = {path: value.clone() if known.get(path, True) else value for path, value in tensors.items()}
    before = {path: _version(value) for path, value in passed.items()}
    answer = _call(model, call, x_t, time, replace(cond, shared=cond.shared | passed).repeated(rows))
    for path, value in passed.items():
        written = _version(value) != before[path] or (value.is_inference() and not torch.equal(value, tensors[path]))
        if written and value is tensors[path]:
            known[path] = True
            raise ValueError(
                f"the network has written into the condition {path!r}, which it left alone in an earlier call, so that "
                "later rows would see another one; let its forward write into a copy, such as y = y.clone()"
            )
        known.setdefault(path, written)
    return answer


def _call(model: nn.Module, call: Callable[..., object], x_t: Tensor, time: Tensor, given: dict) -> object:
    if model in _X_T and x_t.requires_grad:
        return call(x_t.clone(), time, **given)
    try:
        return call(x_t, time, **given)
    except RuntimeError as error:
        # Autograd's own words, of a leaf itself or a view of it: without a graph nobody minds.
        if "leaf Variable" not in str(error) or not x_t.requires_grad:
            raise
        answer = call(x_t.clone(), time, **given)
        _X_T.add(model)
        return answer


def _version(value: Tensor) -> int:
    """Return how often a tensor was written into; tensors of inference mode do not count."""
    return 0 if value.is_inference() else value._version
