"""Fitted state: buffers that keep float64 and take whatever size a stored state has."""

from __future__ import annotations

import torch
from torch import nn


class FittedBuffers(nn.Module):
    """A module whose buffers are fitted numbers.

    `.to(device)` moves them, `.to(dtype)` and `.half()` leave their precision alone, and `load_state_dict` accepts
    stored buffers of any shape, because fitting decides how many numbers there are.
    """

    def _apply(self, fn, recurse=True):
        precise = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            self._buffers[name] = precise[name].to(buffer.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, buffer in self._buffers.items():
            stored = state_dict.get(prefix + name)
            if stored is not None:
                self._buffers[name] = torch.empty(stored.shape, dtype=buffer.dtype, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
