"""Warnings that point to the line of the user's code, however many of our own calls lie between."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_OURS = tuple(str(Path(module.__file__).parent) for module in (sys.modules["fastscore"], torch))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost call that is neither ours nor PyTorch's, whose decorators lie between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
