"""What a command line reads and says: numbers, and errors in one line."""

from __future__ import annotations

import re
import traceback


def number(word: str) -> int | float:
    """Return a whole number where the word is one, else a fraction; raise ValueError for what is none."""
    return int(word) if re.fullmatch(r"\s*[+-]?\d+\s*", word) else float(word)


def first_line(error: Exception) -> str:
    """Return an error's kind and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def raised_as(error: BaseException) -> str:
    """Return an error's kind, the first line of its message, and the line of code that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1:]
    if isinstance(error, SyntaxError):
        return f"{first_line(error)} ({error.filename}, line {error.lineno})"
    return first_line(error) + "".join(f" ({frame.filename}, line {frame.lineno})" for frame in place)
