"""Autocast is there for the network: what is computed around it keeps the dtypes that it was given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps

import torch

from .generic import Arguments, Result


def own_dtypes(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function without a network's call compute in its arguments' dtypes, also under `torch.autocast`.

    Autocast would have products of float32 matrices in bfloat16: references, and fits to residuals, with two digits.
    """

    @wraps(call)
    def kept(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        changed = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not changed:
            return call(*args, **kwargs)
        with ExitStack() as stack:
            for device in changed:
                stack.enter_context(torch.autocast(device, enabled=False))
            return call(*args, **kwargs)

    return kept
