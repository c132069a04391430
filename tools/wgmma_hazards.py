"""Finds, in machine code, registers that are touched while products in flight (IGMMA, HGMMA) still use them.

wgmma reads its register operands and writes its sums after the instruction has been issued, until a wait has
seen its group done. Neither nvcc nor ptxas keeps other instructions off those registers: a load that was moved ahead
of the wait gave wrong sums in one product of four and passed every test of the small ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)")
_PRODUCT = re.compile(r"\b[IH]GMMA\.64x(\d+)x\d+")
_LABEL = re.compile(r"^(\.L_\w+):")
#: Their first operand is read.
_WITHOUT_RESULT = re.compile(r"(ST|RED|BAR|MEMBAR|WARPSYNC|BRX|SYNCS|UTMA|R2UR|NANOSLEEP)")


def _registers(operand: str, count: int) -> set[int]:
    match = re.match(r"[-~|]*R(\d+)\b", operand.strip())
    return set(range(int(match[1]), int(match[1]) + count)) if match else set()


def _width(opcode: str) -> int:
    if ".128" in opcode:
        return 4
    return 2 if ".64" in opcode or ".WIDE" in opcode else 1


def loops_of_products(code: list[str]) -> Iterator[list[str]]:
    """The innermost loops that multiply, from lines of nvdisasm with their labels."""
    labels = {m[1]: i for i, line in enumerate(code) if (m := _LABEL.match(line))}
    ranges = []
    for end, line in enumerate(code):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        begin = labels.get(target[1], end) if target else end
        if begin < end and any(_PRODUCT.search(inner) for inner in code[begin:end]):
            ranges.append((begin, end))
    for begin, end in ranges:
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in ranges):
            yield code[begin : end + 1]


def hazards(code: list[str]) -> list[str]:
    """Instructions of `code` (lines of nvdisasm with their labels) that touch registers in flight."""
    found: dict[str, None] = {}
    for loop in loops_of_products(code):
        groups: list[tuple[set[int], set[int]]] = []  # operands and sums of the groups in flight
        operands: set[int] = set()  # of the group that is being issued
        sums: set[int] = set()
        for line in loop * 2:
            match = _INSTRUCTION.search(line)
            if match is None:
                continue
            opcode, fields = match[1], [field.strip() for field in match[2].split(",")]
            if opcode.startswith(("IGMMA", "HGMMA")):
                shape = _PRODUCT.search(opcode)
                sums |= _registers(fields[0], int(shape[1]) // 2 if shape else 0)
                operands |= _registers(fields[1], 4)
                if "gsb0" in match[2]:
                    groups.append((operands, sums))
                    operands, sums = set(), set()
            elif opcode.startswith("WARPGROUP.DEPBAR"):
                keep = int(fields[-1], 16)
                groups = groups[len(groups) - keep :] if keep else []
            else:
                reads_first = _WITHOUT_RESULT.match(opcode) is not None
                written = set() if reads_first else _registers(fields[0], _width(opcode))
                read = set().union(*(_registers(f, 1) for f in (fields if reads_first else fields[1:])))
                busy_operands = operands.union(*(group[0] for group in groups))
                busy_sums = sums.union(*(group[1] for group in groups))
                if written & (busy_operands | busy_sums) or read & busy_sums:
                    found[" ".join(line.split())] = None
    return list(found)
