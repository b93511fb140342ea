"""What a GPU measured of the backends, and which of them `backend="auto"` therefore takes for a network.

The choice reads this table and `fastscore info` prints it; benchmarks/results/h200_*.json hold the whole run. Networks
between its rows go by the nearest one. Of other architectures nothing is known, and Triton's kernels run there.

The times are those of the kernels of that day, which have been rewritten since: compiled ones interpreted instructions
where most run as steps now (`cuda.how` says so of a network). What they order, they order until a GPU times them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CAPABILITY = (9, 0)
SOURCE = "NVIDIA H200, 2026-11-28, Triton 3.6, kernels of that day"


@dataclass(frozen=True)
class Row:
    """Milliseconds of each backend that ran a network; `work` is "forward" or "gradient".

    Forward: one evaluation of 4,096 samples at 256 rows each, d = 64, weights in bfloat16, the kernel alone. Gradient:
    `log_prob(x, nfe=64).mean().backward()` of 1,024 samples, d = 64, weights in float32, the whole call.
    """

    work: str
    kind: str  # "adaLN": norms, and scales of hidden layers; else "plain"
    width: int  # of hidden layers
    milliseconds: tuple[tuple[str, float], ...]

    @property
    def order(self) -> tuple[str, ...]:
        """Backends, the fastest first; Triton's kernels cover most and come last where they did not run."""
        ran = tuple(name for name, _ in sorted(self.milliseconds, key=lambda pair: pair[1]))
        return ran if "triton" in ran else (*ran, "triton")

    def __str__(self) -> str:
        times = dict(self.milliseconds)
        return ", ".join(f"{name} {times[name]:g} ms" if name in times else f"{name} not timed" for name in self.order)


ROWS = (
    Row("forward", "adaLN", 64, (("cuda", 0.825), ("triton", 1.054))),
    Row("forward", "adaLN", 128, (("cuda", 1.784), ("triton", 2.66))),
    Row("forward", "adaLN", 256, (("cuda", 3.00),)),
    Row("forward", "adaLN", 512, (("cuda", 24.35),)),
    Row("forward", "plain", 128, (("cuda", 0.865), ("triton", 0.756))),
    Row("forward", "plain", 256, (("cuda", 1.475), ("triton", 2.64))),
    Row("gradient", "adaLN", 64, (("torch", 17.3), ("triton", 23.8))),
)


def nearest(work: str, kind: str, width: int) -> Row:
    """Return the row of this work whose network is most alike: of the same kind if there is one, then by width."""
    rows = [row for row in ROWS if row.work == work]
    rows = [row for row in rows if row.kind == kind] or rows
    padded = 1 << max(0, width - 1).bit_length()  # as the kernels do
    return min(rows, key=lambda row: abs(math.log2(row.width / padded)))
