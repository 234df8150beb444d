"""Reads machine code (nvdisasm's listing of a cubin): which instructions a kernel has, and how busy they keep each unit of sm_70.

The bound is static: cycles of each unit for one trip through the tile loop of one warp, four warps side by side on the four
sub-cores of a multiprocessor, which share its memory unit. No latency and no scheduling: what no run can beat, not what it
reaches. Rates of sm_70 per sub-core and cycle (Jia et al. 2018, "Dissecting the NVIDIA Volta GPU Architecture via
Microbenchmarking"; CUDA programming guide, table of arithmetic throughput): one instruction issued; 16 lanes of fp32 and
integer multiply, 16 of integer and logic; 4 lanes of special functions; a tensor instruction of m8n8k4 is four steps of two
cycles. Shared memory serves a multiprocessor 128 bytes a cycle: a 16-byte access of a warp is four of these "wavefronts", and a
shuffle one.
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Instruction:
    opcode: str  # with its modifiers: LDS.U.128
    operands: str
    predicated: bool


@dataclass
class Kernel:
    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # label -> index of the instruction behind it

    def count(self, *prefixes: str) -> int:
        return sum(i.opcode.startswith(prefixes) for i in self.code)

    def branches(self) -> list[tuple[int, int]]:
        """(from, to) indices of jumps to a label."""
        found = []
        for at, i in enumerate(self.code):
            target = re.search(r"`\((\.L\S+?)\)", i.operands) if i.opcode.startswith("BRA") else None
            if target and target[1] in self.labels:
                found.append((at, self.labels[target[1]]))
        return found


def disassemble(nvdisasm: Path | str, cubin: Path) -> list[Kernel]:
    listing = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True).stdout
    kernels: list[Kernel] = []
    for line in listing.splitlines():
        if m := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            kernels.append(Kernel(m[1]))
        elif kernels and (m := re.match(r"(\.L\S+):", line)):
            kernels[-1].labels[m[1]] = len(kernels[-1].code)
        elif kernels and (m := re.match(r"\s*/\*[0-9a-f]{4,5}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)", line)):
            kernels[-1].code.append(Instruction(m[2], m[3], bool(m[1])))
    return kernels


TENSOR = ("HMMA",)
_SHARED = ("LDS", "STS", "SHFL", "LDSM")
_SPECIAL = ("MUFU", "F2F", "I2F", "F2I")
_MULTIPLY = ("FFMA", "FMUL", "FADD", "IMAD", "HADD2", "HMUL2", "HFMA2")
_LOGIC = (
    "LOP",
    "IADD",
    "ISETP",
    "FSETP",
    "FSEL",
    "SEL",
    "SHF",
    "PRMT",
    "FMNMX",
    "IMNMX",
    "R2P",
    "P2R",
    "LEA",
    "MOV",
    "PLOP3",
    "I2I",
    "BFE",
)


def _weights(code: list[Instruction], times: Counter[int]) -> dict[str, float]:
    units: dict[str, float] = dict.fromkeys(("tensor", "issue", "shared memory", "special", "multiply", "logic"), 0)
    for at, i in enumerate(code):
        n = times[at]
        units["issue"] += n
        if i.opcode.startswith(TENSOR):
            units["tensor"] += 2 * n
        elif i.opcode.startswith(_SHARED):
            units["shared memory"] += 4 * n * (4 if ".128" in i.opcode else 2 if ".64" in i.opcode else 1)
        elif i.opcode.startswith(_SPECIAL):
            units["special"] += 8 * n
        elif i.opcode.startswith(_MULTIPLY):
            units["multiply"] += (4 if i.opcode.startswith("IMAD.WIDE") else 2) * n
        elif i.opcode.startswith(_LOGIC):
            units["logic"] += 2 * n
    return units


def tile_loop(kernel: Kernel) -> dict[str, float]:
    """Cycles of each unit for one trip through the loop over tiles; an inner loop over column groups runs twice; code that only
    tiles on an edge run (a jump over comparisons without tensor work) is left out."""
    branches = kernel.branches()
    loops = [(to, at) for at, to in branches if to < at and any(i.opcode.startswith(TENSOR) for i in kernel.code[to:at])]
    if not loops:
        return {}
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
    inner = [loop for loop in loops if loop != (begin, end) and begin <= loop[0] and loop[1] <= end]
    times = Counter({at: 1 for at in range(begin, end + 1)})
    for first, last in inner:
        for at in range(first, last + 1):
            times[at] = 2
    for at, to in branches:
        skipped = range(at + 1, to)
        if not (begin <= at < to <= end and len(skipped) > 20):
            continue
        code = [kernel.code[i] for i in skipped]
        masks = sum(i.opcode.startswith(("FSEL", "ISETP")) for i in code)
        if masks >= 16 and not any(i.opcode.startswith((*TENSOR, "LDG", "STS", "MUFU", "IMAD.WIDE")) for i in code):
            for i in skipped:
                times[i] = 0
    return _weights(kernel.code, times)


def tensor_bound(units: dict[str, float], ignore: tuple[str, ...] = ()) -> tuple[float, str]:
    """Return the largest fraction of the tensor cores' peak that the busiest unit allows, and that unit."""
    worst = max((u for u in units if u not in ignore), key=lambda u: units[u])
    return units["tensor"] / units[worst], worst
