"""A model of when the warps of a multiprocessor issue a kernel's instructions, to predict a row's cycles without a GPU.

One scheduler with its consumer warps is followed, instruction by instruction, all of them the same trace of a row
(`sass_machine.one_row`): in order, with the stalls and scoreboards that the compiler wrote. Pipes take an instruction
every so many cycles; the tensor cores and the path to shared memory are shared by the four schedulers. What is left out
(register banks, caches, clusters) is carried by one factor, CALIBRATION, fitted to five kernels that an H200 was timed
on (results/h200_kernels.json). With 0.08 ms for what prepared their arguments, an estimate, predictions for those were
16 % too low at width 512 and 8 % too low to 6 % too high elsewhere. So this ranks changes, and is no measurement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from sass_listing import Instruction

CALIBRATION = 1.12
BRANCH = 8  # cycles until a warp issues behind a branch
TENSOR_START = 30  # cycles into, and out of, a group of matrix instructions
BARRIER = 20
PATIENCE = 1000  # cycles after which a warp that is ready goes before the one that issued last
QUEUE = 64  # cycles of work that wait before the path to shared memory

PIPES = {
    "fma": "FADD FMUL FFMA IMAD HADD2 HMUL2 HFMA2 HMNMX2 HSETP2",
    "alu": "FMNMX FSEL FSETP LOP3 SHF IADD3 ISETP MOV SEL PRMT LEA VIMNMX VIADDMNMX VIADD I2FP F2FP PLOP3 CS2R P2R R2P "
    "SGXT BMSK FCHK IABS VOTE FSET IMNMX",
    "mufu": "MUFU I2F F2I",
    "lsu": "LDS LD STS ST STSM LDSM LDG STG LDL STL LDC SHFL SYNCS",
    "branch": "BRA BRX BRXU CALL RET BSYNC WARPSYNC EXIT",
}
PIPE = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
# Cycles that an instruction occupies its pipe, and until its result is there, as a scoreboard tells.
OCCUPIES = {"fma": 1, "alu": 2, "mufu": 8, "uniform": 2, "branch": 1, "other": 1}
LATENCY = {"MUFU": 20, "I2F": 20, "F2I": 20, "LDS": 30, "LDSM": 30, "LDL": 30, "STL": 30, "LD": 30, "STS": 12, "ST": 12}
LATENCY |= {"STSM": 30, "LDG": 270, "STG": 15, "LDC": 40, "SHFL": 24, "SYNCS": 25, "S2R": 30, "S2UR": 30}


class Issue(NamedTuple):
    """What the model needs to know of an instruction."""

    pipe: str
    occupies: int
    latency: int
    stall: int
    sets: int
    reads: int
    waits: int
    columns: int = 0  # of a matrix instruction, N; of a wait for them, how many groups may remain
    closes: bool = False  # a matrix instruction that ends its group
    returns: bool = False  # a branch that costs nothing behind it


def issue_of(instruction: Instruction) -> Issue:
    """Classify an instruction."""
    base, name = instruction.base, instruction.name
    fields = instruction.stall or 1, instruction.sets, instruction.reads, instruction.waits
    if base == "HGMMA":
        closes = any("gsb0" in operand for operand in instruction.operands)
        return Issue("tensor", 0, 0, *fields, columns=columns_of(instruction), closes=closes)
    if base == "WARPGROUP" and "DEPBAR" in name:
        return Issue("wait", 0, 0, *fields, columns=int(instruction.operands[-1], 16))
    if base == "BAR":
        return Issue("barrier", 0, 0, *fields)
    pipe = PIPE.get(base) or ("uniform" if base[0] == "U" or base == "R2UR" else "other")
    if pipe == "lsu":
        words = 4 if ".128" in name else 2 if ".64" in name else 1
        occupies = {"STSM": 16, "LDSM": 16, "STG": 4, "LDL": 2, "STL": 2, "LDC": 1, "SYNCS": 1, "SHFL": 4}
        return Issue(pipe, occupies.get(base, 4 * words), LATENCY.get(base, 25), *fields)
    occupies = 2 if base in ("I2F", "F2I") else OCCUPIES[pipe]
    return Issue(pipe, occupies, LATENCY.get(base, 0), *fields, returns=base == "BSYNC")


def columns_of(instruction: Instruction) -> int:
    """Return N of a matrix instruction 64 x N x 16, which takes N / 2 cycles of a multiprocessor's tensor cores."""
    found = re.search(r"64x(\d+)x", instruction.name)
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Setting:
    """How a kernel's warps meet.

    `warps`: consumers a scheduler. `stages`, `refill`: tiles of weights in shared memory at once, and the cycles until
    one that all have left is full again; 0 stages: weights stay. `vectors`: cycles until the next row's vectors are
    there when all have left this row's, 0 where they are ahead. `apart`: whether warps start at different places.
    """

    warps: int
    stages: int = 0
    refill: int = 800
    vectors: int = 0
    apart: bool = True


@dataclass
class _Warp:
    time: float
    place: int = 0
    row: int = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    groups: list[float] = field(default_factory=list)  # when the last groups of matrix instructions end
    group: float = 0.0  # when the open one does
    tiles: int = 0
    barriers: int = 0


class Scheduler:
    """One scheduler that issues a row's trace for its warps, over and over."""

    def __init__(self, trace: list[Instruction], setting: Setting):
        self.code, self.setting = [issue_of(i) for i in trace], setting
        spread = 1.5 * len(trace) if setting.apart else 0.0
        self.warps = [_Warp(w * spread) for w in range(setting.warps)]
        self.free = dict.fromkeys(("fma", "alu", "mufu", "lsu", "uniform"), 0.0)
        self.tensor, self.now, self.last = 0.0, 0.0, -1
        self.met: list[dict[int, float]] = [{} for _ in self.warps]  # barrier -> arrival
        self.left: list[dict[int, float]] = [{} for _ in self.warps]  # tile -> when its products end
        self.done: dict[int, float] = {}  # row -> when the last warp has finished it

    def run(self, rows: int = 3) -> float:
        """Return the cycles between rows, for all warps together, once each of them has done one."""
        length, start, done = len(self.code), None, 0.0
        while True:
            progress = sum(w.row + w.place / length for w in self.warps)
            if start is None and all(w.row >= 1 for w in self.warps):
                start, done = self.now, progress
            if start is not None and progress - done >= rows * len(self.warps):
                return (self.now - start) / rows
            self.step()

    def step(self) -> None:
        """Issue what is ready first; of two warps, the one that issued last, unless the other has waited long."""
        ready = [(self.ready(w), w) for w in range(len(self.warps))]
        waiting = [(time, self.now - self.warps[w].time < PATIENCE, w != self.last, w) for time, w in ready if time]
        if not waiting:
            raise RuntimeError("no warp can issue: they wait for each other")
        time, _, _, w = min(waiting)
        self.issue(w, time)

    def ready(self, w: int) -> float | None:
        """Return when a warp's next instruction may issue, or None if that depends on another warp."""
        warp = self.warps[w]
        op, time = self.code[warp.place], warp.time
        for i in range(6):
            if op.waits >> i & 1:
                time = max(time, warp.scoreboards[i])
        if op.pipe in self.free:
            time = max(time, self.free[op.pipe] - (QUEUE if op.pipe == "lsu" else 0))
        elif op.pipe == "wait" and len(warp.groups) > op.columns:
            time = max(time, warp.groups[-op.columns - 1])
        elif op.pipe == "barrier":
            self.met[w].setdefault(warp.barriers, time)
            if any(warp.barriers not in met for met in self.met):
                return None
            time = max(time, *(met[warp.barriers] + BARRIER for met in self.met))
        elif op.pipe == "tensor" and self.setting.stages and not warp.group and warp.tiles >= self.setting.stages:
            ends = [left.get(warp.tiles - self.setting.stages) for left in self.left]
            if None in ends:
                return None
            time = max(time, max(ends) + self.setting.refill)
        if self.setting.vectors and warp.place == 0 and warp.row > 0:
            if any(other.row < warp.row for other in self.warps):
                return None
            time = max(time, self.done[warp.row] + self.setting.vectors)
        return max(time, self.now + 1)

    def issue(self, w: int, time: float) -> None:
        """Issue a warp's next instruction at a time."""
        warp, op = self.warps[w], self.code[self.warps[w].place]
        self.now, self.last = time, w
        start = max(time, self.free["lsu"]) if op.pipe == "lsu" else time
        if op.pipe in self.free:
            self.free[op.pipe] = start + op.occupies
        if op.pipe == "tensor":
            self.multiply(w, op, time)
        end = start + op.latency + (op.occupies - 4 if op.pipe == "lsu" else 0)
        for scoreboard, at in ((op.sets, end), (op.reads, time + min(op.latency, 12))):
            if scoreboard < 6:
                warp.scoreboards[scoreboard] = max(warp.scoreboards[scoreboard], at)
        warp.time = time + op.stall + (BRANCH if op.pipe == "branch" and not op.returns else 0)
        warp.barriers += op.pipe == "barrier"
        warp.place += 1
        if warp.place == len(self.code):
            warp.place, warp.row = 0, warp.row + 1
            self.done[warp.row] = max(self.done.get(warp.row, 0.0), time)

    def multiply(self, w: int, op: Issue, time: float) -> None:
        """Queue a matrix instruction behind those of all warps."""
        warp = self.warps[w]
        begin = max(self.tensor, time + (0 if warp.group else TENSOR_START))
        self.tensor = warp.group = begin + op.columns / 2
        if op.closes:
            warp.groups = [*warp.groups, self.tensor + TENSOR_START][-4:]
            self.left[w][warp.tiles] = self.tensor + TENSOR_START
            warp.group, warp.tiles = 0.0, warp.tiles + 1


def cycles(trace: list[Instruction], setting: Setting) -> float:
    """Return the cycles of a multiprocessor until all its consumers have done a row more."""
    return CALIBRATION * Scheduler(trace, setting).run()
