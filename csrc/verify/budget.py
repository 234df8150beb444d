"""What a kernel may use, and a table of what it uses: registers, spills, shared memory, blocks on a multiprocessor, machine code.

python csrc/verify/budget.py [ARCHITECTURE ...]        compiles, checks, prints the table (NVRTC; about a minute each)
"""

import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import sass
import static_model
import toolchain
from toolchain import Resources

#: Kernel (a prefix of its short name) -> (registers at most, blocks of a multiprocessor of sm_70 at least). Attention owns its
#: registers: two blocks of four warps, so that one computes while the other loads. LayerNorm wants many rows in flight.
BUDGET = {
    "layer_norm_forward": (128, 2),
    "layer_norm_backward": (252, 1),
    "sum_partials": (56, 4),
    "dropout_rows": (64, 4),
    "attention_forward": (255, 2),
    "attention_backward": (255, 2),
    "attention_delta": (48, 4),
    "attention_plain": (128, 4),
}
NVRTC_FOLDER = Path(os.environ.get("OPT_DS_NVRTC", ".venv-nvrtc"))


@dataclass(frozen=True)
class Measured:
    name: str
    file: str
    architecture: str
    resources: Resources
    code: sass.Kernel | None
    shared_bytes: int

    @property
    def budget(self) -> tuple[int, int]:
        return next(limits for prefix, limits in BUDGET.items() if self.name.startswith(prefix))

    @property
    def threads(self) -> int:
        narrow_rows = self.name.split()[2:3] == ["32"] and self.name.startswith("layer_norm")
        return 128 if narrow_rows or self.name.startswith(("attention_forward", "attention_backward", "attention_plain")) else 256

    def blocks(self) -> int:
        """Of a multiprocessor of the V100 (whatever the architecture compiled for: the tightest of the three)."""
        return static_model.blocks_per_multiprocessor(
            static_model.GPUS[0], self.resources.registers, self.threads, self.shared_bytes
        )

    def faults(self) -> list[str]:
        """How this kernel breaks its budget or does not contain what it should."""
        registers, blocks = self.budget
        found = []
        if self.resources.spilled_bytes or self.resources.stack_bytes:
            found.append(f"spills {self.resources.spilled_bytes} bytes, stack {self.resources.stack_bytes}")
        if self.resources.registers > registers:
            found.append(f"{self.resources.registers} registers, budget {registers}")
        if self.blocks() < blocks:
            found.append(f"{self.blocks()} blocks on a multiprocessor, budget {blocks}")
        return found + self._machine_code_faults()

    def _machine_code_faults(self) -> list[str]:
        if self.code is None:
            return []
        found = [f"{self.code.count('LDL', 'STL')} accesses to local memory"] if self.code.count("LDL", "STL") else []
        tensor = self.name.startswith(("attention_forward", "attention_backward"))
        if tensor and not self.code.count("HMMA"):
            found.append("no tensor-core instruction")
        # ptxas also leaves a loop by "calling" a label of the kernel itself; a routine has a name
        if tensor and any(i.opcode.startswith("CALL") and "$" in i.operands for i in self.code.code):
            found.append("a call: a software routine, or a shuffle in code that seems divergent")
        wanted = {"70": "HMMA.884", "75": "HMMA.1688", "80": "HMMA.16816", "90": "HMMA.16816"}[self.architecture]
        if tensor and not self.code.count(wanted):
            found.append(f"no {wanted}")
        whole_rows = re.match(r"(layer_norm_(forward|backward) |attention_(forward|backward) )", self.name)
        if whole_rows and not any(i.opcode.startswith("LDG") and ".128" in i.opcode for i in self.code.code):
            found.append("no 128-bit load")
        return found


def shared_bytes(name: str) -> int:
    """Dynamic shared memory of a launch (what the launchers ask for)."""
    parts = name.split()
    if name.startswith(("attention_forward", "attention_backward")):
        return static_model.attention_shared_bytes(int(parts[2]), name.startswith("attention_backward"))
    if name.startswith("layer_norm_backward "):
        return 128 + (3 * 1024 * 4 if parts[2] == "32" else 0)
    return 1024 if name.startswith("sum_partials") else 128 if name.startswith("layer_norm") else 0


def measure(architecture: str, files: tuple[str, ...] = toolchain.FILES, nvcc: str | None = None) -> list[Measured]:
    """Compile and disassemble; with `nvcc` instead of NVRTC only the assembler's report is read."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            cubin = Path(folder) / f"{file}.cubin"
            if nvcc:
                report, codes = toolchain.compile_nvcc(nvcc, file, architecture, cubin), {}
            else:
                report = toolchain.compile_nvrtc(NVRTC_FOLDER, file, architecture, cubin)
                codes = {k.name: k for k in sass.disassemble(toolchain.nvdisasm(NVRTC_FOLDER), cubin)}
            for mangled, resources in report.items():
                name = toolchain.demangled(mangled)
                if not nvcc or resources.registers > 16:  # nvcc also makes the empty kernels that a launcher never asks for
                    found.append(Measured(name, file, architecture, resources, codes.get(mangled), shared_bytes(name)))
    return found


def table(measured: list[Measured]) -> str:
    lines = [
        "| kernel | sm | registers | spills | shared bytes | blocks (V100) | tensor / 128-bit / local | bound of tensor peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for m in measured:
        code, bound = "", ""
        if m.code:
            wide = sum(i.opcode.startswith("LDG") and ".128" in i.opcode for i in m.code.code)
            code = f"{m.code.count('HMMA')} / {wide} / {m.code.count('LDL', 'STL')}"
            units = sass.tile_loop(m.code) if m.architecture == "70" else {}
            if units:
                share, unit = sass.tensor_bound(units)
                bound = f"{share:.0%} ({unit})"
        used = f"{m.resources.registers} | {m.resources.spilled_bytes} | {m.shared_bytes} | {m.blocks()}"
        lines.append(f"| {m.name} | {m.architecture} | {used} | {code} | {bound} |")
    return "\n".join(lines)


if __name__ == "__main__":
    everything = [m for a in sys.argv[1:] or toolchain.NVRTC_ARCHITECTURES for m in measure(a)]
    print(table(everything))
    broken = [f"{m.name} sm_{m.architecture}: {fault}" for m in everything for fault in m.faults()]
    print("\n".join(["", *broken]) if broken else "\nall within budget")
    raise SystemExit(bool(broken))
