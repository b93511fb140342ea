"""Mistakes planted in the CUDA kernels: the emulator's comparison with the definition has to catch every one."""

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from emulator import build as builder
from emulator.comparison import AMPERE, HOPPER, Case, compare, compare_steps, host_sources, load

pytestmark = pytest.mark.slow
NARROW, PADDED, STREAMED = Case(64, 13, 2, 63, 5), Case(50, 13, 2, 63, 5), Case(256, 64, 3, 63, 5)
WIDE = Case(512, 13, 2, 63, 5)
# Programs of steps: one tile and several, of which a cluster takes parts.
STEPS, PADDED_STEPS, TILES = (Case(*c, maps=2) for c in ((64, 13, 2, 63, 24), (50, 13, 2, 63, 5), (64, 13, 1, 300, 5)))


class Mistake(NamedTuple):
    file: str
    right: str
    wrong: str
    case: Case = NARROW
    family: str = "sm90_density_mlp"


MISTAKES = {
    "wrong swizzle": Mistake("sm80_density_mlp.cu", "(row % 8)", "(row % 4)", family="sm80_density_mlp"),
    "missing wait": Mistake("sm90_density_mlp.cu", "ptx::wgmma_wait<0>();", ""),
    "unmasked padding": Mistake("common/row_machine.cuh", "return !Padded ||", "return true ||", PADDED),
    "wrong fragment map": Mistake("common/fragment.cuh", "(i >> 1) * 4 + row * 2", "(i >> 1) * 2 + row * 4"),
    "off-by-one draw": Mistake("common/noise.cuh", "points + row * D", "points + row / 2 * D"),
    "stale weights": Mistake(
        "common/ring.cuh", "if (!resident) ptx::mbarrier_wait(", "if (false) ptx::mbarrier_wait(", STREAMED
    ),
    "operand read too early": Mistake(
        "sm90_density_mlp_wide.cu", "ptx::fence_proxy_async();", "", WIDE, "sm90_density_mlp_wide"
    ),
    "a barrier's phase missed": Mistake(
        "sm90_density_mlp_wide.cu", "__syncwarp();  // a lane", "// a lane", WIDE, "sm90_density_mlp_wide"
    ),
    "last sample left out": Mistake("common/row_machine.cuh", "sample + 8 < p.batch", "sample + 9 < p.batch"),
}


WIDE_STEPS = Case(512, 13, 1, 63, 3, maps=2)
OFTEN = Case(512, 13, 1, 63, 15, maps=2)  # so that one warpgroup is ahead of the other when it matters
HALVES = Case(256, 13, 1, 63, 3, maps=2)
RING = Case(128, 13, 4, 130, 3, maps=2)  # a ring, and two tiles of samples for a cluster of two blocks


def steps(file: str, right: str, wrong: str, case: Case = STEPS) -> Mistake:
    """Return a mistake in what only the kernels of steps run."""
    return Mistake(f"common/steps/{file}", right, wrong, case, f"sm90_steps_{max(64, case.hidden)}")


PAIR = Case(1024, 13, 1, 63, 3, maps=2)  # two blocks
PAIRS = Case(1024, 13, 1, 100, 3, maps=2)  # two tiles of samples: four blocks
FULL = "barriers.table_full(at.stage), at.phase)"
EMPTY = "ptx::mbarrier_wait(barriers.table_empty(at.stage), at.phase ^ 1);"
MISTAKES |= {
    "steps: product read in flight": steps("products.cuh", "ptx::wgmma_wait<0>();", ""),
    "steps: no fence before a product": steps("products.cuh", "ptx::wgmma_fence();", ""),
    "steps: record not waited for": steps("block.cuh", f"ptx::mbarrier_wait({FULL};", ""),
    "steps: record overwritten": steps("block.cuh", EMPTY, ""),
    "steps: wrong parity": steps("block.cuh", FULL, FULL.replace("phase", "phase ^ 1")),
    "steps: samples of the tile before": steps("block.cuh", "if (turned)", "if (at.stage + at.phase == 0)", TILES),
    "steps: unmasked padding": steps("operands.cuh", "!Padded ||", "true ||", PADDED_STEPS),
    "ring: stage overwritten": steps("block.cuh", "if (!resident) ptx", "if (false) ptx", RING),
    "ring: stage released early": steps("products.cuh", "        ptx::wgmma_wait<1>();\n", "", RING),
    "ring: parity that does not turn": steps("products.cuh", "phase ^= !stay();", "phase ^= 0;", RING),
    "ring: last product's tiles apart": steps(
        "products.cuh", "(Here::kBytes >> 4), k);\n      }", "0, k);\n      }", RING
    ),
    "cluster: release to itself alone": steps("products.cuh", "(empty, lane)", "(empty, ptx::cluster_rank())", RING),
    "cluster: share for itself alone": steps("block.cuh", "((1u << blocks) - 1)", "(1u << ptx::cluster_rank())", RING),
    "wide: a barrier before A is overwritten": steps(
        "one_block.cuh", "vacate() const { ptx::named_barrier_sync(1, 256); }", "vacate() const {}", OFTEN
    ),
    "wide: no proxy fence": steps("one_block.cuh", "ptx::fence_proxy_async();", "", WIDE_STEPS),
    "wide: wrong swizzle of the operand": steps("wide.cuh", "lane / 16 ^ row % 8", "lane / 16 ^ row % 4", WIDE_STEPS),
    "wide: parity of a constant ring": steps("rings.cuh", "phase ^ (at / kStages % 2)", "phase", WIDE_STEPS),
    "pair: own half overwritten while it is copied": steps(
        "block_pair.cuh", "ptx::mbarrier_wait(meetings.copied(), turn ^ 1);", "", PAIR
    ),
    "pair: a barrier before A is overwritten": steps(
        "block_pair.cuh", "turn ^ 1);\n    ptx::named_barrier_sync(1, 256);", "turn ^ 1);", PAIR
    ),
    "pair: half overwritten that is multiplied by": steps(
        "block_pair.cuh", "ptx::mbarrier_wait(meetings.vacant(), turn ^ 1);", "", PAIR
    ),
    "pair: half not waited for": steps("block_pair.cuh", "ptx::mbarrier_wait(meetings.arrived(), turn);", "", PAIR),
    "pair: own half twice": steps("block_pair.cuh", "at + kHalfBytes, at, ", "at + kHalfBytes, operand, ", PAIR),
    "pair: no proxy fence": steps("block_pair.cuh", "ptx::fence_proxy_async();", "", PAIR),
    "pair: sums of one block": steps("block_pair.cuh", " + (there.x + also.x)", "", PAIR),
    "pair: sums not waited for": steps(
        "block_pair.cuh", "ptx::mbarrier_wait(meetings.sums(buffer), phases >> buffer & 1);", "", PAIR
    ),
    "pair: result in the means' buffer": steps("block_pair.cuh", "kSquares, kResult", "kSquares, kResult = 0", PAIR),
    "pair: release to one sharer": steps("pair_rings.cuh", "lane < Seat::sharers()", "lane < 1", PAIRS),
    "pair: wrong swizzle of weights": steps("pair_rings.cuh", "wgmma_descriptor_32", "wgmma_descriptor_64", PAIR),
    "halves: half in flight is read": steps("halves.cuh", "/ kBlocks; ++q) f(q)", "/ kBlocks; ++q) f(q + 8)", HALVES),
    "halves: one half twice": steps("halves.cuh", "multiply_tile<128, 64, K>", "multiply_tile<128, 0, K>", HALVES),
}


UNOPTIMIZED = [*builder.FLAGS, "-O0"]  # compiled once, run once


@pytest.fixture(scope="module")
def host() -> list[Path]:
    """What runs on the host, compiled once: it sees no header of a kernel, and no mistake."""
    sources = host_sources(builder.CSRC)
    assert not any(".cuh" in source.read_text() for source in sources)
    return builder.objects(sources)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    """A header that has the emulator's, in the compiler's own form where it makes one: a third of a kernel's lines."""
    header = tmp_path_factory.mktemp("prefix") / "prefix.h"
    header.write_text("#include <cuda_runtime.h>\n")
    builder.run([builder.compiler(), *UNOPTIMIZED, *builder.INCLUDES, "-x", "c++-header", str(header)])
    return header


# Left to `make test-long`: of their kind, another one is planted in the same family of kernels.
LEFT_OUT = {
    "missing wait": "steps: record not waited for",
    "wrong fragment map": "wrong swizzle",
    "steps: no fence before a product": "operand read too early",
    "steps: samples of the tile before": "off-by-one draw",
    "last sample left out": "off-by-one draw",
    "steps: product read in flight": "halves: half in flight is read",
    "steps: wrong parity": "wide: parity of a constant ring",
    "steps: unmasked padding": "unmasked padding",
    "ring: stage overwritten": "ring: stage released early",
    "ring: parity that does not turn": "wide: parity of a constant ring",
    "ring: last product's tiles apart": "wide: wrong swizzle of the operand",
    "cluster: share for itself alone": "cluster: release to itself alone",
    "wide: no proxy fence": "operand read too early",
    "halves: one half twice": "halves: half in flight is read",
    "pair: a barrier before A is overwritten": "wide: a barrier before A is overwritten",
    "pair: own half overwritten while it is copied": "pair: half not waited for",
    "pair: half overwritten that is multiplied by": "pair: half not waited for",
    "pair: own half twice": "pair: half not waited for",
    "pair: no proxy fence": "operand read too early",
    "pair: sums of one block": "pair: half not waited for",
    "pair: sums not waited for": "pair: half not waited for",
    "pair: result in the means' buffer": "pair: half not waited for",
    "pair: release to one sharer": "cluster: release to itself alone",
    "pair: wrong swizzle of weights": "wide: wrong swizzle of the operand",
}
assert set(LEFT_OUT.values()) <= MISTAKES.keys() - LEFT_OUT.keys()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LEFT_OUT else []) for name in MISTAKES]
)
def test_a_planted_mistake_is_caught(name: str, host: list[Path], prefix: Path, tmp_path: Path, monkeypatch):
    mistake = MISTAKES[name]
    folder = tmp_path / "csrc"
    shutil.copytree(builder.CSRC, folder)
    text = (folder / mistake.file).read_text()
    assert mistake.right in text
    (folder / mistake.file).write_text(text.replace(mistake.right, mistake.wrong))
    kernel = folder / f"{mistake.family}.cu"
    if mistake.family.endswith(f"_{mistake.case.hidden}"):  # not padded: half of the code is not compiled
        kernel.write_text(kernel.read_text().replace("_fwd_kernel<true>", "_fwd_kernel<false>"))
    monkeypatch.setattr(builder, "CSRC", folder)
    monkeypatch.setattr(builder, "INCLUDES", [*builder.INCLUDES[:2], "-I", str(folder)])
    monkeypatch.setattr(builder, "FLAGS", [*UNOPTIMIZED, "-include", str(prefix)])
    monkeypatch.setattr(builder, "cache_folder", lambda: tmp_path / "cache")
    library = load(folder, mistake.family, host=host)
    try:
        device = AMPERE if "sm80" in mistake.family else HOPPER
        run = compare_steps if "steps" in mistake.family else compare
        schedules = builder.ADVERSARIAL, builder.RANDOM, builder.IN_ORDER  # the first finds most, and ends at once
        found = (run(library, device, mistake.case, schedule).complaint() for schedule in schedules)
        complaint = next(filter(None, found), None)
    except AssertionError as error:  # the emulator saw a rule of the hardware broken
        complaint = str(error)
    assert complaint
    assert "linked" not in complaint
