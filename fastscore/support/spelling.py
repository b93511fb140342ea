"""What a name that is not known may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

CUTOFF = 0.7  # of difflib's similarity: "epss" and "ddpm-linaer" are near misses, "quadratic" is none


def did_you_mean(word: object, known: Iterable[str], elsewhere: Mapping[str, str]) -> str:
    """Return "; did you mean ...?" where a word is near a known name, or other libraries' word for one, else "".

    Arguments:
        elsewhere: what to say for the words of other libraries, in small letters with hyphens.
    """
    if not isinstance(word, str):
        return ""
    plain, names = word.strip().lower().replace("_", "-"), list(known)
    near = difflib.get_close_matches(plain, [*names, *elsewhere], 1, CUTOFF)
    if not near:
        return ""
    return f"; did you mean {elsewhere.get(near[0], repr(near[0]))}?"
