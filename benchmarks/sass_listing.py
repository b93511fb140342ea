"""A kernel's machine code: instructions with their control bits, and the tables of its indirect branches."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import NamedTuple

import sass

# Address, predicate, opcode and operands, and the lower half of the encoding; the upper half is on the next line.
LINE = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/"
    r"\s*\n\s*/\* 0x([0-9a-f]{16}) \*/"
)


class Instruction(NamedTuple):
    """One instruction, and what the compiler says to the scheduler about it.

    `stall`: cycles until the warp's next one may issue; `sets` and `reads`: scoreboards that its result, and its
    reading of operands, release (7: none); `waits`: a mask of scoreboards that it waits for.
    """

    address: int
    predicate: str
    name: str
    operands: tuple[str, ...]
    stall: int = 1
    sets: int = 7
    reads: int = 7
    waits: int = 0

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch leads to."""
        found = re.search(r"0x([0-9a-f]+)", self.operands[-1]) if self.operands else None
        return int(found[1], 16) if self.base == "BRA" and found else None


def parse(text: str) -> list[Instruction]:
    """Return the instructions of one function's disassembly."""
    found = []
    for address, predicate, name, operands, high in LINE.findall(text):
        control = int(high, 16) >> 41
        fields = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
        split = tuple(part.strip() for part in operands.split(",")) if operands else ()
        found.append(Instruction(int(address, 16), predicate, name, split, *fields))
    return found


def listings(path: Path, architecture: str) -> dict[str, list[Instruction]]:
    """Return {mangled name: instructions} of a library's or a cubin's kernels for one architecture."""
    text = sass.dump("--dump-sass", path, "-arch", architecture)
    parts = re.split(r"Function : (\S+)", text)
    return {name: parse(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def branch_tables(cubin: bytes) -> dict[str, bytes]:
    """Return {mangled name: bytes of constant bank 2}: where a kernel's indirect branches look up their targets."""
    offset = struct.unpack_from("<Q", cubin, 40)[0]
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, offset + size * i) for i in range(count)]
    strings, prefix, found = sections[names][4], ".nv.constant2.", {}
    for name_at, _, _, _, start, length in sections:
        name = cubin[strings + name_at : cubin.index(b"\0", strings + name_at)].decode()
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = cubin[start : start + length]
    return found
