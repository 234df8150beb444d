"""Compile kernel files for a GPU that this machine lacks, and read the assembler's report.

Two compilers: nvcc where it is on PATH (the architectures that it knows), and NVRTC from PyPI in an environment of its own, which
CI can always have and which still compiles for sm_70. NVRTC compiles kernels alone, so the instances are named to it; the names
are those that the launchers make (`INSTANCES`).
"""

import ctypes
import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from itertools import product
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent
NVRTC_PACKAGES = (
    "nvidia-cuda-nvrtc-cu12==12.9.86", "nvidia-cuda-runtime-cu12==12.9.79", "nvidia-cuda-nvcc-cu12==12.9.86",
    "nvidia-cuda-cccl-cu12==12.9.27", "triton==3.4.0",  # triton brings an nvdisasm that reads sm_70
)  # fmt: skip
NVRTC_ARCHITECTURES = ("70", "75", "80", "90")


def _row_instances(kernel: str, *more: str) -> list[str]:
    layouts = [f"opt_ds::RowLayout<{threads}, {chunks}>" for threads, chunks in product((32, 256), (1, 2, 3, 4))]
    return [f"opt_ds::{kernel}<{t}, {layout}>" for t, layout in product(_TYPES, layouts)] + [
        f"opt_ds::{m}<{t}>" for m in more for t in _TYPES
    ]


_TYPES, _FLAGS, _SIZES = ("float", "half", "__nv_bfloat16"), ("true", "false"), (32, 64, 128)


def instances(file: str, architecture: str) -> list[str]:
    """The kernels of a file that a launcher can ask for on an architecture."""
    tensor_types = ("half", "__nv_bfloat16") if int(architecture) >= 80 else ("half",)
    if file == "layer_norm_forward":
        return _row_instances("layer_norm_forward", "layer_norm_forward_any")
    if file == "layer_norm_backward":
        return _row_instances("layer_norm_backward", "layer_norm_backward_any", "sum_partials")
    if file == "dropout":
        return [f"opt_ds::dropout_rows<{t}>" for t in _TYPES]
    if file == "attention_forward":
        return [f"opt_ds::attention_forward<{t}, {d}, {drop}>" for t, d, drop in product(tensor_types, _SIZES, _FLAGS)]
    if file == "attention_backward":
        both = [
            f"opt_ds::attention_backward<{t}, {d}, {keys}, {drop}>"
            for t, d, keys, drop in product(tensor_types, _SIZES, _FLAGS, _FLAGS)
        ]
        return both + [f"opt_ds::attention_delta<{t}, {d}>" for t, d in product(tensor_types, _SIZES)]
    kernels = ("forward", "backward_queries", "backward_keys")
    return [f"opt_ds::attention_plain_{k}<{t}>" for k, t in product(kernels, _TYPES)]


FILES = ("layer_norm_forward", "layer_norm_backward", "dropout", "attention_forward", "attention_backward", "attention_plain")


@dataclass(frozen=True)
class Resources:
    """What the assembler reports of a kernel."""

    registers: int
    spilled_bytes: int
    stack_bytes: int
    static_shared_bytes: int


def parse_report(text: str) -> dict[str, Resources]:
    """ptxas -v's output -> mangled kernel name: resources."""
    found, name, spilled, stack = {}, None, 0, 0
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)'", line):
            name, spilled, stack = m[1], 0, 0
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spilled = int(m[1]), int(m[2]) + int(m[3])
        elif name and (m := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = Resources(int(m[1]), spilled, stack, int(shared[1]) if shared else 0)
            name = None
    return found


def demangled(name: str) -> str:
    """`attention_backward half 64 keys dropout`: a kernel's mangled name made short, for tables and the budget."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    m = re.match(r"(?:void )?opt_ds::(\w+)(?:<(.*)>)?\(", text)
    if m is None:
        return text
    kernel, arguments = m[1], (m[2] or "").replace("__half", "half").replace("__nv_bfloat16", "bf16").replace("float", "fp32")
    arguments = (
        arguments.replace("half", "fp16")
        .replace("opt_ds::RowLayout<", "")
        .replace(">", "")
        .replace("(bool)1", "true")
        .replace("(bool)0", "false")
    )
    parts = [part.strip() for part in arguments.split(",")]
    if kernel == "attention_backward":
        parts[2] = "keys" if parts[2] == "true" else "queries"
    if kernel in ("attention_forward", "attention_backward"):
        parts[-1] = "dropout" if parts[-1] == "true" else "no dropout"
    return " ".join([kernel, *parts])


def nvrtc_python(folder: Path) -> Path:
    """The Python of an environment that holds NVRTC; made on first use (340 MB from PyPI)."""
    python = folder / "bin" / "python"
    stamp = folder / ".installed"
    if not stamp.exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *NVRTC_PACKAGES], check=True)
        stamp.touch()
    return python


def nvdisasm(folder: Path) -> Path:
    return next(folder.glob("lib/python3*/site-packages/triton/backends/nvidia/bin/nvdisasm"))


def compile_nvrtc(folder: Path, file: str, architecture: str, cubin: Path) -> dict[str, Resources]:
    """Compile one kernel file with NVRTC in a separate process. Raise RuntimeError with the compiler's log."""
    names = ";".join(instances(file, architecture))
    command = [nvrtc_python(folder), __file__, CSRC / "kernels" / f"{file}.cu", f"sm_{architecture}", cubin, names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{file}.cu for sm_{architecture}: {done.stdout[-3000:]}{done.stderr[-2000:]}")
    return parse_report(done.stdout)


def compile_nvcc(nvcc: str, file: str, architecture: str, cubin: Path) -> dict[str, Resources]:
    """Compile one kernel file with nvcc; raises RuntimeError with the compiler's log."""
    command = [nvcc, "-cubin", "-O3", "-std=c++17", f"-arch=sm_{architecture}", f"-I{CSRC / 'include'}", "-Xptxas=-v",
               "-o", cubin, CSRC / "kernels" / f"{file}.cu"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{file}.cu for sm_{architecture}: {done.stderr[-3000:]}")
    return parse_report(done.stdout + done.stderr)


def nvcc_architectures(nvcc: str) -> list[str]:
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [a for a in ("75", "80", "90") if f"compute_{a}" in listed]


def _nvrtc_main(source: str, architecture: str, cubin: str, names: str) -> int:
    """Runs in the environment that has NVRTC."""
    packages = Path(sys.executable).parent.parent
    nvidia = next(packages.glob("lib/python3*/site-packages/nvidia"))
    nvrtc = ctypes.CDLL(str(next((nvidia / "cuda_nvrtc" / "lib").glob("libnvrtc.so.1*"))))
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), Path(source).read_bytes(), os.path.basename(source).encode(), 0, None, None)
    for name in names.split(";"):
        nvrtc.nvrtcAddNameExpression(program, name.encode())
    include = [nvidia / part / "include" for part in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")] + [CSRC / "include"]
    options = [
        f"--gpu-architecture={architecture}",
        "-std=c++17",
        "-default-device",
        "--ptxas-options=-v",
        *(f"-I{i}" for i in include),
    ]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options)))

    def get(what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, data)
        return data.raw

    print(get("ProgramLog").decode())
    if not failed:
        Path(cubin).write_bytes(get("CUBIN"))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(_nvrtc_main(*sys.argv[1:5]))
