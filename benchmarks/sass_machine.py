"""Follow one thread through a kernel's machine code, to see which instructions a row of it issues.

Integers that follow from the kernel's parameters and the thread's place are computed; all else (what is loaded, floats)
is unknown, None. That decides every branch that depends on the program and on counters. A barrier that is waited for is
met at once, and a branch on something unknown is not taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from sass_listing import Instruction

PREDICATE = r"U?P(\d|T)"
MASK, LIMIT = 0xFFFFFFFF, 2_000_000
FLAGS = {"PT": True, "UPT": True}
COMPARISONS = {
    "EQ": lambda a, b: a == b, "NE": lambda a, b: a != b, "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "GE": lambda a, b: a >= b,
}  # fmt: skip
# Instructions without a result in a register.
NO_RESULT = {"STS", "STG", "ST", "STSM", "BAR", "WARPSYNC", "BRA", "BSSY", "BSYNC", "EXIT", "NOP", "MEMBAR", "FENCE"}
NO_RESULT |= {"WARPGROUP", "DEPBAR", "LDGSTS", "LDGDEPBAR", "UBLKCP", "CCTL", "ERRBAR", "UCGABAR_ARV"}


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


@dataclass
class Thread:
    """A thread's registers and predicates, as far as they are known."""

    body: list[Instruction]
    banks: dict[int, bytes]  # constants: 0 has the launch and the parameters, 2 the tables of branches
    thread: int = 0
    known: dict[str, int | None] = field(default_factory=dict)
    local: dict[int, int | None] = field(default_factory=dict)
    undecided: Counter = field(default_factory=Counter)  # addresses of branches on something unknown

    def run(self) -> Iterator[Instruction]:
        """Yield the instructions in the order in which the thread issues them."""
        places = {instruction.address: i for i, instruction in enumerate(self.body)}
        at = 0
        for _ in range(LIMIT):
            instruction = self.body[at]
            yield instruction
            guard = self.flag(instruction.predicate) if instruction.predicate else True
            if instruction.base in ("EXIT", "RET") and guard is not False:
                return
            if instruction.base in ("BRX", "BRXU"):
                at = places[self._indirect(instruction)]
            elif instruction.target is not None and self._taken(instruction, guard):
                at = places[instruction.target]
            else:
                self.execute(instruction, guard)
                at += 1
        raise RuntimeError(f"after {LIMIT} instructions the thread is still at {instruction.address:#x}")

    def _taken(self, instruction: Instruction, guard: bool | None) -> bool:
        for operand in instruction.operands[:-1]:  # a uniform predicate beside the one of the instruction
            also = self.flag(operand)
            guard = None if guard is None or also is None else guard and also
        if guard is None:
            self.undecided[instruction.address] += 1
        return bool(guard)

    def _indirect(self, instruction: Instruction) -> int:
        register, offset = re.match(r"(U?R\d+) (-?0x[0-9a-f]+)", instruction.operands[0]).groups()
        base = self.known.get(register)
        if base is None:
            raise RuntimeError(f"an indirect branch at {instruction.address:#x} depends on something unknown")
        return (base + int(offset, 16) + instruction.address + 16) & MASK

    def flag(self, name: str) -> bool | None:
        """Return a predicate's value."""
        value = FLAGS.get(name.lstrip("!"), self.known.get(name.lstrip("!")))
        return value if value is None or not name.startswith("!") else not value

    def value(self, token: str) -> int | None:
        """Return an operand's 32 bits."""
        token = re.sub(r"\.(reuse|H0_H0|X\d+|U32|64)", "", token)
        if (token[0] in "-~" and not token.startswith("-0x")) or token.startswith("-c"):
            inner = self.value(token[1:])
            return None if inner is None else (-inner if token[0] == "-" else ~inner) & MASK
        if token in ("RZ", "URZ", "SRZ"):
            return 0
        if token.startswith("c["):
            return self.constant(token)
        if re.fullmatch(r"-?0x[0-9a-f]+", token):
            return int(token, 16) & MASK
        return self.known.get(token)

    def constant(self, token: str, offset: int = 0) -> int | None:
        """Return a word of a constant bank, c[bank][register + offset]."""
        bank, place = re.match(r"c\[(0x\w+)\]\s*\[([^\]]+)\]", token).groups()
        for part in place.split("+"):
            value = self.value(part)
            if value is None:
                return None
            offset += signed(value)
        memory = self.banks.get(int(bank, 16), b"")
        return int.from_bytes(memory[offset : offset + 4], "little") if offset + 4 <= len(memory) else None

    def execute(self, instruction: Instruction, guard: bool | None) -> None:
        """Compute what an instruction leaves; of one that may not happen, nothing is known."""
        if guard is False or instruction.base in NO_RESULT or not instruction.operands:
            return
        for name, value in self.results(instruction):
            if name not in FLAGS and name not in ("RZ", "URZ"):
                self.known[name] = value if guard else None

    def results(self, instruction: Instruction) -> Iterator[tuple[str, int | bool | None]]:
        """Yield (register or predicate, value) of all that an instruction writes."""
        name, operands = instruction.name, instruction.operands
        base = instruction.base
        kind = base[1:] if base[0] == "U" and hasattr(self, f"_{base[1:].lower()}") else base
        compute = getattr(self, f"_{kind.lower()}", None)
        if base in ("STL", "SYNCS", "HGMMA") or compute is None:
            yield from self._opaque(instruction)
            return
        rest = list(operands)
        # Predicates that are written: two come first in comparisons, some before or behind another's result.
        start = 0 if kind in ("ISETP", "PLOP3") or re.fullmatch(PREDICATE, rest[0]) else 1
        end = next((i for i in range(start, len(rest)) if not re.fullmatch(PREDICATE, rest[i])), len(rest))
        end = 2 if kind in ("ISETP", "PLOP3") else start if kind in ("SEL", "VIMNMX", "VIADDMNMX") else end
        flags, rest = rest[start:end], rest[:start] + rest[end:]
        found = compute(name.split(".")[1:], rest)
        if kind in ("ISETP", "PLOP3"):  # predicates alone: a result, and its complement, which nobody reads
            yield flags[0], found
            yield from ((flag, None) for flag in flags[1:])
            return
        target, words = rest[0], found if isinstance(found, tuple) else (found,)
        # LOP3 writes a predicate too: whether its result is not zero. Others' are carries, or say that all is well.
        other = None if words[0] is None else words[0] != 0
        carry = other if kind == "LOP3" else True if kind in ("R2UR", "SHFL") else self.carry
        yield from ((flag, carry) for flag in flags)
        if re.fullmatch(r"U?R\d+", target):
            letters, number = re.match(r"(U?R)(\d+)", target).groups()
            yield from ((f"{letters}{int(number) + i}", word) for i, word in enumerate(words))

    carry: bool | None = None

    def _opaque(self, instruction: Instruction) -> Iterator[tuple[str, int | bool | None]]:
        """Yield unknown values for all that another instruction writes; a barrier that is tried is met."""
        base, name, operands = instruction.base, instruction.name, instruction.operands
        if base == "STL":
            self._store(operands, name)
            return
        flags = [o for o in operands[:2] if re.fullmatch(r"U?P\d", o)]
        yield from ((flag, True if base in ("SYNCS", "ELECT", "USETMAXREG") else None) for flag in flags)
        target = next((o for o in operands if not re.fullmatch(r"U?P(\d|T)", o)), "")
        if match := re.fullmatch(r"(U?R)(\d+)", target):
            size = re.search(r"64x(\d+)x", name)
            wide = 4 if ".128" in name else 2 if ".64" in name or ".WIDE" in name else 1
            count = int(size[1]) // 2 if base == "HGMMA" and size else wide
            yield from ((f"{match[1]}{int(match[2]) + i}", None) for i in range(count))

    def _place(self, token: str) -> int | None:
        parts = [self.value(part) for part in token.strip("[]").split("+")]
        return None if None in parts else sum(map(signed, parts))

    def _store(self, operands: tuple[str, ...], name: str) -> None:
        place, (letters, number) = self._place(operands[0]), re.match(r"(U?R)(\d+|Z)", operands[1]).groups()
        for i in range(4 if ".128" in name else 2 if ".64" in name else 1):
            if place is not None:
                self.local[place + 4 * i] = 0 if number == "Z" else self.known.get(f"{letters}{int(number) + i}")

    def _ldl(self, flags: list[str], operands: list[str]):
        place, count = self._place(operands[1]), 4 if "128" in flags else 2 if "64" in flags else 1
        return tuple(None if place is None else self.local.get(place + 4 * i) for i in range(count))

    def _all(self, operands: list[str]) -> list[int] | None:
        found = [self.value(o) for o in operands]
        return None if None in found else found

    def _mov(self, flags: list[str], operands: list[str]):
        return self.value(operands[1])

    def _s2r(self, flags: list[str], operands: list[str]):
        return self.thread if operands[1] == "SR_TID.X" else 0

    _s2ur = _s2r

    def _cs2r(self, flags: list[str], operands: list[str]):
        return (0,) if "32" in flags else (0, 0)

    def _r2ur(self, flags: list[str], operands: list[str]):
        return self.value(operands[-1])

    def _shfl(self, flags: list[str], operands: list[str]):
        return self.value(operands[1]) if "IDX" in flags else None  # of a value that all lanes share

    def _ldc(self, flags: list[str], operands: list[str]):
        count = 4 if "128" in flags else 2 if "64" in flags else 1
        return tuple(self.constant(operands[1], 4 * i) for i in range(count))

    def _imad(self, flags: list[str], operands: list[str]):
        found = self._all(operands[1:4])
        wide = "WIDE" in flags
        if found is None or "HI" in flags or "X" in flags:
            return (None, None) if wide else None
        a, b, c = found
        if not wide:
            return (a * b + c) & MASK
        if "U32" not in flags:
            a, b = signed(a), signed(b)
        high = self._next(operands[3])
        product = a * b + c + ((high or 0) << 32)
        return product & MASK, None if high is None else product >> 32 & MASK

    def _next(self, token: str) -> int | None:
        """Return the upper half of a pair of registers."""
        match = re.match(r"(U?R)(\d+)", token)
        return self.known.get(f"{match[1]}{int(match[2]) + 1}") if match else 0

    def _iadd3(self, flags: list[str], operands: list[str]):
        found = self._all(operands[1:4])
        carries = [self.flag(o) for o in operands[4:] if re.fullmatch(r"!?U?P(\d|T)", o)] if "X" in flags else []
        self.carry = None
        if found is None or None in carries:
            return None
        total = sum(found) + sum(map(bool, carries))
        self.carry = total > MASK
        return total & MASK

    def _viadd(self, flags: list[str], operands: list[str]):
        found = self._all(operands[1:3])
        return None if found is None else sum(found) & MASK

    def _lop3(self, flags: list[str], operands: list[str]):
        table, found = int(operands[4], 16), [self.value(o) for o in operands[1:4]]
        if table == 0xC0 and 0 in found[:2]:
            return 0
        if None in found:
            return None
        return _lookup(table, found) & MASK

    def _plop3(self, flags: list[str], operands: list[str]):
        inputs = [self.flag(o) for o in operands[:3]]
        return None if None in inputs else bool(_lookup(int(operands[3], 16), [int(v) for v in inputs]) & 1)

    def _shf(self, flags: list[str], operands: list[str]):
        low, by, high = (self.value(o) for o in operands[1:4])
        if by is None:
            return None
        by &= 63 if "U64" in flags or "S64" in flags else 31 if "W" in flags else 63
        if "L" in flags:
            if "HI" in flags:
                return None if None in (low, high) else (((high << 32 | low) << by) >> 32) & MASK
            return None if low is None else low << by & MASK
        if "HI" not in flags:
            return None if None in (low, high) else ((high << 32 | low) >> by) & MASK
        if high is None:
            return None
        return (signed(high) if "S32" in flags else high) >> min(by, 32) & MASK

    def _lea(self, flags: list[str], operands: list[str]):
        self.carry = None
        if "HI" in flags:
            a, b, c, by = (self.value(o) for o in operands[1:5])
            if None in (a, b, c, by):
                return None
            a = signed(a) if "SX32" in flags else a
            wide = a if "SX32" in flags else c << 32 | a
            return ((wide << by) >> 32) + b & MASK
        a, b, by = (self.value(o) for o in operands[1:4])
        return None if None in (a, b, by) else (a << by) + b & MASK

    def _isetp(self, flags: list[str], operands: list[str]):
        found = self._all(operands[:2])
        if found is None or "EX" in flags:
            return None
        a, b = found if "U32" in flags else map(signed, found)
        chain = self.flag(operands[2])
        result = COMPARISONS[flags[0]](a, b)
        if chain is None:
            return None
        return result and chain if "AND" in flags else result or chain if "OR" in flags else result != chain

    def _sel(self, flags: list[str], operands: list[str]):
        which = self.flag(operands[3])
        return None if which is None else self.value(operands[1] if which else operands[2])

    def _vimnmx(self, flags: list[str], operands: list[str]):
        found, which = self._all(operands[1:3]), self.flag(operands[3])
        if found is None or which is None:
            return None
        return (min if which else max)(found, key=(lambda v: v) if "U32" in flags else signed)

    def _viaddmnmx(self, flags: list[str], operands: list[str]):
        total = self._viadd(flags, operands)
        self.known["sum"] = total
        return self._vimnmx(flags, [operands[0], "sum", *operands[3:]])

    def _iabs(self, flags: list[str], operands: list[str]):
        value = self.value(operands[1])
        return None if value is None else abs(signed(value))


def _lookup(table: int, inputs: list[int]) -> int:
    """Combine three words bit by bit as an eight-entry table says."""
    a, b, c = inputs
    found = 0
    for i in range(8):
        if table >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def one_row(thread: Thread, rows: int) -> list[Instruction]:
    """Return what a thread issues from the start of its second row to that of the third, of `rows` in all.

    The loop over rows is the widest part that is passed as often as there are rows: between the first and the last
    visit of its first instruction lies most of all.
    """
    trace = list(thread.run())
    first, last, visits = {}, {}, Counter()
    for place, instruction in enumerate(trace):
        first.setdefault(instruction.address, place)
        last[instruction.address] = place
        visits[instruction.address] += 1
    loop = [address for address, times in visits.items() if times == rows]
    if not loop:
        raise RuntimeError(f"no instruction is passed {rows} times, once a row")
    header = max(loop, key=lambda address: (last[address] - first[address], -first[address]))
    starts = [place for place, instruction in enumerate(trace) if instruction.address == header]
    return trace[starts[1] : starts[2]]
