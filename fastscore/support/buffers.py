"""Buffers of our own: fitted state, and constants of wrappers, which go where the data are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Constants(nn.Module):
    """A wrapper around a user's network, with buffers of its own that go where the data are, whenever that is."""

    def follow(self, device: torch.device) -> None:
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(device)


class FittedBuffers(nn.Module):
    """A module whose buffers are fitted numbers.

    `.to(device)` moves them, `.to(dtype)` and `.half()` leave their precision alone, and `load_state_dict` accepts
    stored buffers of any shape, because fitting decides how many numbers there are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._on_host: dict[str, tuple[Tensor, int | None, Tensor]] = {}

    def on(self, device: torch.device) -> FittedBuffers:
        """Return the same numbers on a device: this module if they are there, else a copy.

        A module may be shared, by two densities or with whoever made it, and so stays where it is.
        """
        if all(buffer.device == device for buffer in self._buffers.values()):
            return self
        return copy.deepcopy(self).to(device)

    def host(self, name: str) -> Tensor:
        """Return a buffer on the CPU; from another device it is copied once, until it is written or replaced."""
        buffer = self._buffers[name]
        if buffer.device.type == "cpu":
            return buffer
        version = None if buffer.is_inference() else buffer._version  # such a tensor counts no writes
        kept = self._on_host.get(name)
        if version is None or kept is None or kept[0] is not buffer or kept[1] != version:
            kept = self._on_host[name] = buffer, version, buffer.cpu()
        return kept[2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FittedBuffers:
        precise = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            self._buffers[name] = precise[name].to(buffer.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            stored = state_dict.get(prefix + name)
            if stored is not None:
                self._buffers[name] = torch.empty(stored.shape, dtype=buffer.dtype, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
