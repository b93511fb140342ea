"""Progress bars on stderr, under one rule for every call that shows one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

from tqdm.auto import tqdm

from .host import flag


def progress_bar(progress: bool | None, iterable: Iterable | None = None, **options: Any) -> tqdm:
    """Return a bar of tqdm, to be used as a context.

    Arguments:
        progress: True shows it, False does not. None shows it where stderr is a terminal, and clears it at its end: a
            log file gets no bars, and a loop of short calls does not fill the screen. The environment variable
            TQDM_DISABLE, set to anything, hides every bar, as it does for tqdm's own, and so does a stderr that is
            closed.
        iterable, options: of `tqdm.tqdm`, such as total, unit and desc.
    """
    progress = None if progress is None else flag("progress", progress)
    hidden = bool(os.environ.get("TQDM_DISABLE")) or sys.stderr is None or getattr(sys.stderr, "closed", False)
    shown = not hidden and (_is_terminal(sys.stderr) if progress is None else progress)
    if not shown and iterable is None:
        return _hidden()
    return tqdm(iterable, disable=not shown, leave=progress is not None, **options)


@cache
def _hidden() -> tqdm:
    """Return the bar of every call that shows none: to make one takes 40 microseconds."""
    return tqdm(disable=True)


def _is_terminal(stream: object) -> bool:
    """Return whether a stream is a terminal; what stands in for one, such as a logger's, may not know."""
    return hasattr(stream, "isatty") and stream.isatty()
