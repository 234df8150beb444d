"""Builds the compiled operators ahead of time, for setup.py: `opt_ds._C` (CPU reference, and the CUDA kernels where they can be
compiled) and `opt_ds._emulator` (the kernels run on a CPU). Needs a C++ compiler and torch; says in `opt_ds/_build.json`, which
`opt_ds.ops` reads, what was built and why something was not.

OPT_DS_CUDA_ARCHITECTURES chooses the GPUs: "70,80", "none", or (the default) those of this machine.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).resolve().parent
KERNELS = sorted((CSRC / "kernels").glob("*.cu"))
EMULATED_ARCHITECTURE = "70"  # V100; `make test-kernels` emulates the others too
SUPPORTED_ARCHITECTURES = ("70", "75", "80", "86", "89", "90", "100", "120")


class NotBuiltError(Exception):
    """A part cannot be built here; the message says why."""


def kernel_extensions() -> list[Extension]:
    return [Extension("opt_ds._C", []), Extension("opt_ds._emulator", [])]


class BuildKernels(build_ext):
    """Compiles with g++ and nvcc directly: the kernels know nothing of torch, and the binding needs no CUDA header."""

    def run(self) -> None:
        record = {"cpu": "built", "cuda": "", "architectures": [], "emulator": "built"}
        folder = Path(self.get_ext_fullpath("opt_ds._C")).parent
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._build(record)
        except NotBuiltError as reason:
            record.update(cpu=str(reason), emulator=str(reason))
            record["cuda"] = record["cuda"] or str(reason)
        (folder / "_build.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for part in ("cpu", "cuda", "emulator"):
            print(f"opt_ds kernels, {part}: {record[part]}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an editable build writes in place."""

    def _build(self, record: dict) -> None:
        torch = _torch()
        compiler = shutil.which(os.environ.get("CXX", "g++"))
        if compiler is None:
            raise NotBuiltError("no C++ compiler: install g++, or set CXX")
        objects = Path(self.build_temp).resolve() / "opt_ds"
        objects.mkdir(parents=True, exist_ok=True)
        jobs = _Jobs(objects)

        include = [f"-I{CSRC / 'include'}"]
        cxx = [compiler, "-O2", "-fPIC", "-fvisibility=hidden", "-std=c++20", *include, "-c"]
        with_torch = [*cxx, *(f"-isystem{path}" for path in torch.include)]
        nvcc, architectures = None, []
        try:
            nvcc, architectures = _nvcc(torch.cuda), None
            architectures = _architectures(nvcc)
        except NotBuiltError as reason:
            record["cuda"] = str(reason)
        with_cuda = ["-DOPT_DS_WITH_CUDA"] if architectures else []
        jobs.add("binding.o", [*with_torch, *with_cuda, str(CSRC / "binding.cpp")])
        jobs.add("autograd.o", [*with_torch, str(CSRC / "autograd.cpp")])
        jobs.add("reference.o", [*with_torch, str(CSRC / "reference.cpp")])
        jobs.add("step_plan.o", [*with_torch, str(CSRC / "step_plan.cpp")])
        for kernel in KERNELS if architectures else []:
            targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
            named = f'-DOPT_DS_ARCHITECTURES="{" ".join(f"sm_{a}" for a in architectures)}"'
            jobs.add(f"{kernel.stem}.cuda.o", [nvcc, "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", named, *targets,
                                               *include, "-c", str(kernel)])  # fmt: skip
        emulates = platform.machine() in ("x86_64", "AMD64")
        if emulates:
            emulator = [f"-I{CSRC / 'emulator'}", "-march=x86-64-v3", f"-DOPT_DS_EMULATED_ARCH={EMULATED_ARCHITECTURE}",
                        f'-DOPT_DS_ARCHITECTURES="emulator of sm_{EMULATED_ARCHITECTURE}"', "-Wno-unknown-pragmas"]  # fmt: skip
            for part in ("binding", "autograd"):
                jobs.add(f"emulator_{part}.o", [*with_torch, "-DOPT_DS_LIBRARY=opt_ds_emulator", str(CSRC / f"{part}.cpp")])
            for source in [*KERNELS, CSRC / "emulator" / "simt.cpp"]:
                jobs.add(f"{source.stem}.emulator.o", [*cxx, *emulator, "-x", "c++", str(source)])
        else:
            record["emulator"] = f"the emulator switches stacks in x86-64 assembly; this is {platform.machine()}"
        jobs.run()

        link = [compiler, "-shared", *(f"-L{path}" for path in torch.libraries), "-ltorch", "-ltorch_cpu", "-lc10"]
        cuda_runtime = [f"-L{_cuda_libraries(nvcc)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"] if architectures else []
        names = ["binding.o", "autograd.o", "reference.o", "step_plan.o", *(f"{k.stem}.cuda.o" for k in KERNELS if architectures)]
        self._link(link, "opt_ds._C", [objects / name for name in names], cuda_runtime)
        if emulates:
            parts = [f"{k.stem}.emulator.o" for k in KERNELS]
            names = ["emulator_binding.o", "emulator_autograd.o", "simt.emulator.o", *parts]
            self._link(link, "opt_ds._emulator", [objects / name for name in names], [])
        if architectures:
            record.update(cuda="built", architectures=list(architectures))

    def _link(self, link: list[str], name: str, objects: list[Path], more: list[str]) -> None:
        target = Path(self.get_ext_fullpath(name))
        _run([*link[:2], "-o", f"{target}.new", *map(str, objects), *link[2:], *more])
        os.replace(f"{target}.new", target)  # a process that has the old one open keeps it


class _Torch:
    def __init__(self) -> None:
        import torch
        from torch.utils import cpp_extension

        self.include, self.libraries = cpp_extension.include_paths(), cpp_extension.library_paths()
        self.cuda = torch.version.cuda


def _torch() -> _Torch:
    try:
        return _Torch()
    except ImportError:
        raise NotBuiltError(
            "torch was not there when opt_ds was built: install torch first, then pip install --no-build-isolation"
        ) from None


def _nvcc(torch_cuda: str | None) -> str:
    if torch_cuda is None:
        raise NotBuiltError("this torch is a CPU build")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        raise NotBuiltError(f"no nvcc on PATH: install the CUDA {torch_cuda} toolkit, or set CUDACXX")
    found = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"]))
    if found is None or found[1] != torch_cuda.split(".")[0]:
        version = f"{found[1]}.{found[2]}" if found else "unknown"
        raise NotBuiltError(f"{nvcc} is CUDA {version}, torch was built with CUDA {torch_cuda}: their major versions must agree")
    return nvcc


def _architectures(nvcc: str) -> list[str]:
    wanted = os.environ.get("OPT_DS_CUDA_ARCHITECTURES", "").strip()
    if wanted.lower() == "none":
        raise NotBuiltError("OPT_DS_CUDA_ARCHITECTURES is none")
    if wanted:
        architectures = sorted(
            {a.strip().removeprefix("sm_").replace(".", "") for a in re.split(r"[,; ]+", wanted) if a.strip()}, key=int
        )
    else:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        architectures = sorted({"{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(count)}, key=int)
        if not architectures:
            raise NotBuiltError(
                "no GPU on this machine: to build for another, set OPT_DS_CUDA_ARCHITECTURES "
                f"(of {','.join(SUPPORTED_ARCHITECTURES)})"
            )
    able = set(re.findall(r"compute_(\d+)", _run([nvcc, "--list-gpu-arch"])))
    for architecture in architectures:
        if architecture not in able:
            raise NotBuiltError(f"this nvcc does not compile for sm_{architecture} (it knows {', '.join(sorted(able, key=int))})")
    return architectures


def _cuda_libraries(nvcc: str) -> Path:
    """Where the toolkit's libcudart_static.a is; nvcc on PATH may be a wrapper."""
    top = re.search(r"TOP=(.*)", _run([nvcc, "--dryrun", "-c", str(KERNELS[0])]))
    folder = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
    return folder / ("lib64" if (folder / "lib64").is_dir() else "lib")


class _Jobs:
    """Compilations, as many at a time as there are cores."""

    def __init__(self, objects: Path) -> None:
        self.objects, self.commands = objects, []

    def add(self, name: str, command: list[str]) -> None:
        self.commands.append([*command, "-o", str(self.objects / name)])

    def run(self) -> None:
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(_run, self.commands))


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if "error" in line.lower()] or ["no message"]
        print(" ".join(command), done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise NotBuiltError(f"{Path(command[0]).name} failed: {lines[0].strip()}")
    return done.stdout + done.stderr
