"""Read machine code with the tools in Triton's package: of every kernel in a binary its resources and instructions."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# A line of a disassembly: address, opcode without its predicate, operands.
INSTRUCTION = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);"


def kernels(path: Path) -> dict[tuple[str, str], dict]:
    """Return {(architecture, mangled name): row} of a cubin, whose architecture is "", or of a library.

    A row holds registers, stack and static shared memory in bytes; the numbers of instructions, of matrix instructions
    (`hgmma` on sm_90, `hmma` before it) and of local loads and stores, which are spills; and the longest loop's length.
    """
    rows, architecture = {}, ""
    usage = r"^arch = (\S+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    for found, name, *resources in re.findall(usage, dump("--dump-resource-usage", path), re.MULTILINE):
        architecture = found or architecture
        if name:
            rows[architecture, name] = dict(zip(("registers", "stack", "shared"), map(int, resources), strict=True))
    architecture, bodies = "", {}
    code = rf"^arch = (\S+)|Function : (\S+)|{INSTRUCTION}"
    for found, name, *instruction in re.findall(code, dump("--dump-sass", path), re.MULTILINE):
        architecture = found or architecture
        if name:
            body = bodies.setdefault((architecture, name), [])
        elif instruction[0]:
            body.append(instruction)
    return {key: rows[key] | count(body) for key, body in bodies.items() if key in rows}


def count(body: list) -> dict:
    """Count the instructions of a kernel, given as (address, opcode, operands)."""
    opcodes = Counter(name.partition(".")[0] for _, name, _ in body)
    counts = {op.lower(): opcodes[op] for op in ("HGMMA", "HMMA", "LDL", "STL")}
    return counts | {"instructions": len(body) - opcodes["NOP"], "loop": _longest_loop(body)}


def _longest_loop(body: list) -> int:
    """Count the instructions of the widest backward branch: the walk over the rows."""
    at = {int(address, 16): i for i, (address, _, _) in enumerate(body)}
    longest = 0
    for i, (address, name, operands) in enumerate(body):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name.startswith("BRA") and target and int(target[1], 16) < int(address, 16):
            longest = max(longest, i - at.get(int(target[1], 16), i) + 1)
    return longest


def dump(flag: str, path: Path, *more: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", flag, *more, path], capture_output=True, text=True, check=True).stdout


def extract(path: Path, folder: Path) -> None:
    """Write the cubins of a library into a folder."""
    arguments = [TOOLS / "cuobjdump", "--extract-elf", "all", path.resolve()]
    subprocess.run(arguments, capture_output=True, check=True, cwd=folder)
