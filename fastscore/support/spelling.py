"""What a name that is not known may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

CUTOFF = (
    0.8  # of difflib's similarity: "epss" and "ddpm-linaer" are near misses, "flow-linear" is none of "ddpm-linear"
)
FILLERS = {"pred", "predict", "predicts", "prediction", "type"}  # say nothing of what is meant


def did_you_mean(word: object, known: Iterable[str], elsewhere: Mapping[str, str]) -> str:
    """Return "; did you mean ...?" where a word is near a known name, or is other libraries' word for one, else "".

    A wrong suggestion would be followed to numbers that are wrong: what is not a known word but for such as "pred" and
    "prediction" around it has to be a near miss of a known name as it stands.

    Arguments:
        elsewhere: what to say for the words of other libraries, in small letters with hyphens.
    """
    if not isinstance(word, str):
        return ""
    plain, names = word.strip().lower().replace("_", "-"), list(known)
    bare = "-".join(part for part in plain.split("-") if part not in FILLERS)
    for each in (plain, bare):
        if each in names or each in elsewhere:
            return f"; did you mean {elsewhere.get(each, repr(each))}?"
    near = difflib.get_close_matches(plain, names, 1, CUTOFF)
    return f"; did you mean {near[0]!r}?" if near else ""
