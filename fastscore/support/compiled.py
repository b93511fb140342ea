"""A function as torch.compile makes it, or as it is where that fails: the answers stay, and one warning says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .warn import warn


class Compiled:
    """A network, or another function of tensors, that is compiled at its first call.

    A compiler may be missing, or may not know an operation. What it raises then is told in one warning, and from there
    on the function runs as it is. What the function itself raises is raised as it would be without a compiler.

    Attributes:
        function: what is compiled; it is not changed, as `nn.Module.compile` would.
        reason: why it is not compiled; None while nothing stands in the way.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.reason = function, None
        self._fast = (
            function if isinstance(function, torch._dynamo.OptimizedModule) else torch.compile(_around(function))
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.reason is not None:
            return self.function(*args, **kwargs)
        try:
            return self._fast(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            found = self.function(*args, **kwargs)
            self.reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
            warn(
                f"the network runs as it is, since torch.compile, which compile=True asks for, raised {self.reason}; "
                "leave compile=True out, or see torch's advice in that error, by calling torch.compile(model) yourself"
            )
            return found

    def __reduce__(self) -> tuple:
        return Compiled, (self.function,)  # compiled code is no state: a copy compiles its own function


def _around(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls another: torch.compile leaves a mark in the attributes of a module."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call
