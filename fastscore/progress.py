"""Progress bars on stderr, under one rule for every call that shows one."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tqdm.auto import tqdm


def progress_bar(progress: bool | None, iterable: Iterable | None = None, **options) -> tqdm:
    """Return a bar of tqdm, to be used as a context.

    Arguments:
        progress: True shows it, False does not. None shows it where stderr is a terminal, and clears it at its end: a
            log file gets no bars, and a loop of short calls does not fill the screen. The environment variable
            TQDM_DISABLE, set to anything, hides every bar, as it does for tqdm's own.
        iterable, options: of `tqdm.tqdm`, such as total, unit and desc.
    """
    shown = False if os.environ.get("TQDM_DISABLE") else progress
    disable = None if shown is None else not shown  # None is tqdm's "where the stream is no terminal"
    return tqdm(iterable, disable=disable, leave=progress is not None, **options)
