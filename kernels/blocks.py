"""Find equal layers in a network's code, so that a loop runs them instead of a copy each.

Two stretches of code are equal if they differ only in where their weights and vector operands lie, and all of these lie
a constant step further. The step is the loop's stride.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

LEVELS = ("r", "b", "br")


@lru_cache(maxsize=256)  # a launch asks anew, and twelve layers take it 40 ms
def blocks(body: tuple, weights: tuple) -> tuple:
    """Return body as blocks (times, code, weight step, table steps per level), times = 1 for straight code."""
    found = _longest_repetition(body, weights)
    if found is None:
        return ((1, body, 0, (0, 0, 0)),) if body else ()
    start, length, times = found
    code = body[start : start + length]
    steps = _steps(code, body[start + length : start + 2 * length], weights)
    before = blocks(body[:start], weights)
    return (*before, (times, code, *steps), *blocks(body[start + times * length :], weights))


def _longest_repetition(body: tuple, weights: tuple) -> tuple[int, int, int] | None:
    """Return (start, length, times) of the repetition that covers most instructions."""
    best = None
    for length in range(1, len(body) // 2 + 1):
        for start in range(len(body) - 2 * length + 1):
            first, times = body[start : start + length], 1
            if not any(op[0] == "linear" for op in first):
                continue
            second = body[start + length : start + 2 * length]
            steps = _steps(first, second, weights)
            while steps is not None and _steps(first, body[start + times * length :][:length], weights) == tuple(
                s * times if isinstance(s, int) else tuple(t * times for t in s) for s in steps
            ):
                times += 1
            if times > 1 and (best is None or times * length > best[1] * best[2]):
                best = start, length, times
    return best


def _steps(first: tuple, second: tuple, weights: tuple) -> tuple[int, tuple[int, int, int]] | None:
    """Return the constant distance between two stretches of code, or None if they are not equal."""
    if len(first) != len(second):
        return None
    weight_steps, table_steps = set(), {level: set() for level in LEVELS}
    for one, other in zip(first, second, strict=True):
        if one[0] != other[0] or len(one) != len(other):
            return None
        if one[0] == "linear":
            a, b = weights[one[1]], weights[other[1]]
            if a[1:] != b[1:] or a[1] != a[2]:
                return None
            weight_steps.add(b[0] - a[0])
            continue
        for p, q in zip(one[1:], other[1:], strict=True):
            if isinstance(p, tuple) and len(p) == 3 and isinstance(q, tuple) and len(q) == 3:
                if (p[0], p[2]) != (q[0], q[2]):
                    return None
                table_steps[p[0]].add(q[1] - p[1])
            elif p != q:
                return None
    if max(map(len, (weight_steps, *table_steps.values()))) > 1:
        return None
    return next(iter(weight_steps), 0), tuple(next(iter(table_steps[level]), 0) for level in LEVELS)


def operands_in(code: tuple) -> Iterator[tuple]:
    """Yield every reference (level, offset, width) in code."""
    for part in code:
        if isinstance(part, tuple):
            if len(part) == 3 and part[0] in LEVELS:
                yield part
            else:
                yield from operands_in(part)
