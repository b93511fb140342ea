"""What an adaLN network of width 1,024 would take on an H200: torch.compile in a CUDA graph, and two fused kernels.

    python benchmarks/wide_prediction.py

An estimate, and no measurement: nothing of width 1,024 has run on a GPU. Of torch.compile the times of four widths are
known (results/h200_kernels.json): beside its products, at the rate that the card's own reached
(results/h200_ceilings.json), what is left grows with the width as activations do that go to memory and back, and a
straight line through it, fitted to three widths, predicts the fourth. Fused kernels are bound by the largest of what
they cannot avoid:

- the matrix units, whose instruction m64nNk16 takes N / 2 cycles;
- the fill: the bytes of weights that a multiprocessor fetches for its samples. cuBLAS streams 36 bytes a cycle at the
  rate that it reached (its tile of 128 x 256 takes 48 at the peak of 4,096 operations a cycle);
- of Triton's kernel in panels what it writes and reads again beside weights, at the same rate: the least, since its
  programs share no copies, as cuBLAS's and the compiled kernels' blocks do.

At width 512 what was measured is that much more than such bounds, MARGIN, by the model of benchmarks/issue_model.py,
whose parts they are: its one factor, and the 16 % by which it was too low there.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np
from issue_model import CALIBRATION
from markdown import markdown
from record import RESULTS

PROCESSORS, CLOCK = 132, 1.755e9
SAMPLES, DRAWS, D, LAYERS = 4096, 256, 64, 3
ROWS = SAMPLES * DRAWS
OPERATIONS, FILL = 4096, 36.0  # a cycle and multiprocessor, the latter bytes
MARGIN = CALIBRATION / 0.84
BF16 = 2


class Kernel(NamedTuple):
    """How a kernel divides the work: multiprocessors that share `samples`, and the operations a cycle of each."""

    name: str
    samples: int
    shared_by: int
    operations: float
    kept: int  # bytes an activation of a residual block that passes through memory, there and back


KERNELS = (
    Kernel("compiled, a layer over a cluster of two, 64 samples", 64, 2, OPERATIONS, 0),
    Kernel("Triton's in panels, 32 samples (mma.sync: half of wgmma's rate)", 32, 1, OPERATIONS / 2, 16),
)


def weights(width: int) -> int:
    """Numbers in the weights of an adaLN network of three blocks."""
    return 2 * D * width + 2 * LAYERS * width * width


def compiled(widths: list[int], milliseconds: list[float], rate: float, width: int) -> float:
    """Return the milliseconds of torch.compile in a graph, from those of other widths; `rate` in TFLOP/s."""
    beside = [t - _products(w, rate) for w, t in zip(widths, milliseconds)]
    slope, start = np.polyfit(widths, beside, 1)
    return float(start + slope * width + _products(width, rate))


def _products(width: int, rate: float) -> float:
    return 2 * ROWS * weights(width) / rate / 1e9


def fused(kernel: Kernel, width: int) -> tuple[float, float]:
    """Return the milliseconds of the matrix units, and of what is fetched."""
    turns = ROWS / kernel.samples * kernel.shared_by / PROCESSORS  # of a multiprocessor
    products = 2 * kernel.samples * weights(width) / kernel.shared_by / kernel.operations
    fetched = BF16 * weights(width) / kernel.shared_by + LAYERS * kernel.kept * kernel.samples * width
    return 1e3 * turns * products / CLOCK, 1e3 * turns * fetched / FILL / CLOCK


def span(kernel: Kernel, width: int) -> tuple[float, float]:
    """Return the milliseconds between which a kernel is predicted."""
    bound = max(fused(kernel, width))
    return bound, MARGIN * bound


def measured() -> tuple[dict[int, float], float]:
    """Return what torch.compile in a graph took of adaLN networks by their width, and the card's rate of products."""
    rows = json.loads((RESULTS / "h200_kernels.json").read_text())["rows"]
    rate = json.loads((RESULTS / "h200_ceilings.json").read_text())["rows"][0]["bf16 product of 8192^3, TFLOP/s"]
    adaln = [row for row in rows if row["network"].startswith("adaLN")]
    return {int(row["network"].split()[1].removeprefix("H=")): row["compile + graph, ms"] for row in adaln}, rate


def main() -> None:
    found, rate = measured()
    *known, last = found
    fitted = compiled(known, [found[w] for w in known], rate, last)
    print(f"torch.compile at {last}, from {known}: {fitted:.3g} ms, measured {found[last]}")
    for width in (512, 1024):
        peer = compiled(list(found), list(found.values()), rate, width)
        rows: list[dict[str, object]] = [{"kernel": "torch.compile + graph", "predicted, ms": f"{peer:.3g}"}]
        for kernel in KERNELS[1 if width == 512 else 0 :]:
            products, fetched = fused(kernel, width)
            low, high = span(kernel, width)
            row = {"kernel": kernel.name, "predicted, ms": f"{low:.3g} to {high:.3g}"}
            row |= {"matrix units, ms": products, "fetched, ms": fetched}
            rows.append(row | {"over compile": f"{peer / high:.2g} to {peer / low:.2g}"})
        print(f"\nwidth {width}, {ROWS:,} rows\n{markdown(rows)}")


if __name__ == "__main__":
    main()
