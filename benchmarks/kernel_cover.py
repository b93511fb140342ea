"""Which fused kernel takes a network, by the predicates that choose it: the table of docs/kernels.md.

    python benchmarks/kernel_cover.py            prints it
    python benchmarks/kernel_cover.py --write    puts it into the page, which a test holds to it

No GPU is asked: devices are given by compute capability and shared memory of a block, and the compiled kernels' plans
come from `fastscore._C`, or from the same sources compiled for the emulator.
"""

from __future__ import annotations

import argparse
import re
import string
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import aot
import random_networks
import torch
from fastscore.kernels import launch
from markdown import markdown
from random_networks import Code

from fastscore.ops import cuda, select
from fastscore.ops import triton as through_triton
from fastscore.ops.task import Task

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- kernels' cover: made by `benchmarks/kernel_cover.py` -->", "<!-- end of kernels' cover -->"
COLUMNS = (
    ("Triton, 9.0", "triton", 90), ("Triton, 8.0", "triton", 80), ("Triton, 8.6", "triton", 86),
    ("compiled, 9.0", "cuda", 90), ("compiled, 8.0", "cuda", 80),
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
CPU = torch.device("cpu")
GOT = re.compile(r", (?:got|the network has) [\d,]+$")


@dataclass(frozen=True)
class Case:
    """A network and its reference, as the page names them; by default what the kernels were measured with."""

    axis: str
    value: str
    family: Callable[..., None] = random_networks.adaln
    width: int = 64
    d: int = 64
    weights: str = "bf16"
    reference: str = "diagonal"

    def task(self, depth: int = 3) -> Task:
        into = Code(random_networks.random.Random(0), ((1, random_networks.ROWS),))
        self.family(into, self.d, self.width, depth, "silu")
        components = {"none": 0, "mixture": 10, "full mixture": 10}.get(self.reference, 1)
        shapes, levels = (tuple(w.shape) for w in into.weights), ("r",) * len(into.tables)
        dtype, full = DTYPES[self.weights], "full" in self.reference
        return Task(tuple(into.code), tuple(shapes), levels, self.d, components, full, dtype, CPU)


def of_widths(*widths: int) -> Callable[..., None]:
    """Return a family of networks whose layers have these widths, without norms and sums."""

    def family(into: Code, d: int, width: int, depth: int, act: str) -> None:
        into.linear(d, widths[0])
        for in_, out in zip(widths, (*widths[1:], d)):
            into("act", act)
            into.linear(in_, out)

    return family


def cases() -> Iterator[Case]:
    for d in (64, 128, 129, 512, 1024):
        yield Case("d", f"{d:,}", d=d)
    for width in (64, 128, 256, 512, 1024):
        for weights in DTYPES:
            yield Case("width, weights", f"{width:,}, {weights}", width=width, weights=weights)
    for d in (64, 200):
        for reference in ("none", "full", "mixture", "full mixture"):
            yield Case("reference", f"{reference}, d = {d}", d=d, reference=reference)
    for width in (64, 128, 256, 512):
        yield Case("two saved tiles", f"width {width}", random_networks.two_tiles, width)
    for widths in ((64, 128, 64), (96, 200), (200, 512)):
        yield Case("unequal widths", "-".join(map(str, widths)), of_widths(*widths))


@contextmanager
def device(capability: int, compiled: Any) -> Iterator[None]:
    """Let a CPU pass for a GPU, with what stands for `fastscore._C`; nothing is launched."""
    shared = aot.SHARED[capability]
    caches = through_triton._way, cuda.why_not_fused, cuda.steps_of
    for cache in caches:
        cache.cache_clear()
    with (
        mock.patch.object(launch.Device, "of", classmethod(lambda cls, _: cls(capability, shared))),
        mock.patch.object(through_triton, "interpreting", return_value=False),
        mock.patch.object(cuda, "native", return_value=compiled),
        mock.patch.object(cuda, "_device", return_value=(capability, shared)),
    ):
        yield
    for cache in caches:
        cache.cache_clear()


def answer(task: Task, backend: str) -> tuple[str, str | None]:
    """Return how a backend takes a network, and why not if it does not."""
    own = cuda if backend == "cuda" else through_triton
    if (reason := own.why_not_fused(task)) is not None:
        return "no", reason
    if backend == "cuda":
        how = "by instructions" if isinstance(cuda.steps_of(task), str) else "as steps"
        apart = task.components > 1 or task.full
    else:
        wide, apart = through_triton._way(task, through_triton.precision(task.dtype))
        how = "in panels" if wide else "yes"
    if not apart:
        return how, None
    by = "torch" if own.why_not_control(task.components, task.full, task.d, task.device) else "a kernel"
    return f"{how}, reference by {by}", None


def table(compiled: Any) -> str:
    """Return the table, and below it the reasons that its letters stand for.

    Arguments:
        compiled: `fastscore._C`, or what stands in for it: `plan` and `steps_plan`.
    """
    rows: list[dict[str, str]] = [{"axis": case.axis, "of it": case.value} for case in cases()]
    letters: dict[str, str] = {}
    for title, backend, capability in COLUMNS:
        with device(capability, compiled):
            for row, case in zip(rows, cases()):
                how, reason = answer(case.task(), backend)
                if reason is not None:
                    letter = letters.setdefault(GOT.sub("", reason), string.ascii_lowercase[len(letters)])
                    how = f"no ({letter})"
                row[title] = how
    return "\n".join([markdown(rows), "", *(f"- ({letter}) {reason}" for reason, letter in letters.items())])


def parts(text: str) -> tuple[str, str, str]:
    """Return a page's text up to the table, the table, and what follows it."""
    before, rest = text.split(f"{BEGIN}\n")
    found, after = rest.split(END)
    return f"{before}{BEGIN}\n\n", found.strip("\n"), f"\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    found, text = table(compiled_kernels()), PAGE.read_text()
    if parser.parse_args().write:
        before, _, after = parts(text)
        PAGE.write_text(before + found + after)
    else:
        print(found)


def compiled_kernels() -> Any:
    """Return `fastscore._C`, or the plans of its sources in the emulator."""
    if not isinstance(found := select.native(), str):
        return found
    sys.path.insert(0, str(ROOT / "tests"))
    from emulator import build
    from emulator.comparison import HOPPER, Module, load

    return Module(load(build.CSRC, "sm90_density_mlp"), HOPPER)


if __name__ == "__main__":
    main()
