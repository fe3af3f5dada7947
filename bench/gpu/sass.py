"""Loops of a SASS listing, as ``nvdisasm -c`` prints it, and what their instructions say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_LABEL = re.compile(r"^(\.L\w*):")
_INSTRUCTION = re.compile(
    r"^/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);?\s*(?:/\*.*)?$"
)
_NARROW = re.compile(r"LDG\.E\.(U8|U16|S8|S16)\b")
_MMA = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")


@dataclass(frozen=True)
class Loop:
    """The instructions between a backward branch and its target: (opcode, operands)."""

    body: tuple[tuple[str, str], ...]

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode begins with one of ``prefixes``."""
        return sum(opcode.startswith(prefixes) for opcode, _ in self.body)

    @property
    def instructions(self) -> int:
        return len(self.body)

    @property
    def mma(self) -> int:
        """Tensor-core instructions."""
        return self.count(*_MMA)

    @property
    def narrow_loads(self) -> int:
        """Global loads of 8 or 16 bits."""
        return sum(bool(_NARROW.match(opcode)) for opcode, _ in self.body)

    @property
    def mma_waits(self) -> int:
        return self.count("WARPGROUP.DEPBAR")

    @property
    def copies(self) -> int:
        """Asynchronous copies to shared memory (cp.async, TMA)."""
        return self.count("LDGSTS", "UTMALDG", "UBLKCP")

    @property
    def copies_in_flight(self) -> int:
        """Groups of cp.async that the loop leaves in flight where it waits; 0 without copies."""
        waits = [
            int(found[1], 16)
            for opcode, operands in self.body
            if opcode.startswith("DEPBAR")
            and (found := re.search(r"SB0, (0x[0-9a-f]+)", operands)) is not None
        ]
        return min(waits, default=0) if self.copies else 0

    @property
    def loads_used_at_once(self) -> bool:
        """Whether tensor cores wait in each turn for global loads issued in the same turn."""
        return self.mma > 0 and not self.copies and self.count("LDG.") > 0


def parse(listing: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(opcode, operands) of each instruction, and the index that each label stands before."""
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, listing.splitlines()):
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append((found[1], found[2]))
    return instructions, labels


def loops(listing: str, least: int = 8) -> Iterator[Loop]:
    """Innermost loops of at least ``least`` instructions, in order of their branch."""
    instructions, labels = parse(listing)
    spans = []
    for index, (opcode, operands) in enumerate(instructions):
        target = re.search(r"(\.L\w+)", operands) if opcode.startswith("BRA") else None
        if target and labels.get(target[1], index + 1) <= index:
            spans.append((labels[target[1]], index))
    for first, last in spans:
        inner = any(
            first <= a and b <= last and (a, b) != (first, last) and b - a + 1 >= least
            for a, b in spans
        )
        if last - first + 1 >= least and not inner:
            yield Loop(tuple(instructions[first : last + 1]))
