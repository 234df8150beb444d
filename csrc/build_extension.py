"""Builds the compiled operators ahead of time, for setup.py: `opt_ds._C` (CPU reference, and the CUDA kernels where they can be
compiled) and `opt_ds._emulator` (the kernels run on a CPU). `opt_ds/_build.json`, which `opt_ds.ops` reads, records what was
built, against which torch, and why something was not.

Each part stands alone: a CUDA part that fails leaves the CPU operators and the emulator. Without torch the build stops.

    OPT_DS_BUILD_KERNELS        0: install without any kernels
    OPT_DS_CUDA_ARCHITECTURES   "70,80", "8.0+PTX", "90a", "none"; default: the GPUs of this machine
    CXX, CUDACXX, MAX_JOBS      the compilers (nvcc uses CXX too), and how many of them at a time
"""

import json
import os
import platform
import shlex
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from build_nvcc import Architecture, NotBuiltError, choose_architectures, find_nvcc, run
from build_torch import BrokenTorchError, Torch, find_torch, kernels_are_wanted, missing_torch_message
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

CSRC = Path(__file__).resolve().parent
KERNELS = sorted((CSRC / "kernels").glob("*.cu"))
EMULATED_ARCHITECTURE = "70"  # V100; `make test-kernels` emulates the others too
_OPERATORS, _EMULATOR = "opt_ds._C", "opt_ds._emulator"
_COMPILER_CACHES = ("ccache", "sccache", "distcc")


def kernel_extensions() -> list[Extension]:
    return [Extension(_OPERATORS, []), Extension(_EMULATOR, [])]


class BuildKernels(build_ext):
    """Compiles with g++ and nvcc directly: the kernels know nothing of torch, and the binding needs no CUDA header."""

    def run(self) -> None:
        torch = _require_torch()
        folder = self._record_file().parent
        folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = {"cpu": "", "cuda": "", "architectures": [], "emulator": "", "torch": torch and torch.version}
        if torch is None:
            record |= dict.fromkeys(("cpu", "cuda", "emulator"), "opt_ds was installed with OPT_DS_BUILD_KERNELS=0")
        else:
            self._build(torch, record)
        for part, name in (("cpu", _OPERATORS), ("emulator", _EMULATOR)):
            if record[part] != "built":
                Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)  # of an earlier build
        self._record_file().write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for part in ("cpu", "cuda", "emulator"):
            print(f"opt_ds kernels, {part}: {record[part]}", file=sys.stderr)

    def get_outputs(self) -> list[str]:
        return [path for path in [*super().get_outputs(), str(self._record_file())] if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an editable build writes in place."""

    def _record_file(self) -> Path:
        return Path(self.get_ext_fullpath(_OPERATORS)).parent / "_build.json"

    def _build(self, torch: Torch, record: dict[str, Any]) -> None:
        try:
            compiler = _compiler()
        except NotBuiltError as reason:
            record |= dict.fromkeys(("cpu", "cuda", "emulator"), str(reason))
            return
        objects = Path(self.build_temp).resolve() / "opt_ds"
        shutil.rmtree(objects, ignore_errors=True)
        objects.mkdir(parents=True)
        with ThreadPoolExecutor(_num_jobs()) as pool:
            jobs = _Jobs(pool, objects)
            cuda = _CudaPart(jobs, torch, compiler, record)
            operators, emulator = _OperatorsPart(jobs, torch, compiler), _EmulatorPart(jobs, torch, compiler)
            try:
                self._link_operators(operators, cuda, record)
            except NotBuiltError as reason:
                record["cpu"] = str(reason)
                record["cuda"] = record["cuda"] if record["cuda"] not in ("", "built") else str(reason)
            try:
                self._link(_EMULATOR, compiler, emulator.files(), torch.link_flags)
                record["emulator"] = "built"
            except NotBuiltError as reason:
                record["emulator"] = str(reason)

    def _link_operators(self, operators: "_OperatorsPart", cuda: "_CudaPart", record: dict[str, Any]) -> None:
        """With the CUDA kernels if they were compiled and can be linked, else without them."""
        compiler, flags = operators.compiler, operators.torch.link_flags
        try:
            kernels = cuda.files()
            self._link(_OPERATORS, compiler, [*operators.files(with_cuda=True), *kernels], [*flags, *cuda.runtime_flags])
            record |= {"cuda": "built", "architectures": list(map(str, cuda.architectures))}
        except NotBuiltError as reason:
            record["cuda"] = str(reason)
            self._link(_OPERATORS, compiler, operators.files(with_cuda=False), flags)
        record["cpu"] = "built"

    def _link(self, name: str, compiler: list[str], objects: list[Path], libraries: list[str]) -> None:
        """Undefined symbols are errors here, rather than when the library is loaded."""
        target = Path(self.get_ext_fullpath(name))
        run([*compiler, "-shared", "-Wl,-z,defs", "-o", f"{target}.new", *map(str, objects), *libraries])
        os.replace(f"{target}.new", target)  # a process that has the old one open keeps it


class _Jobs:
    """Run compilations in parallel, one per thread of the pool."""

    def __init__(self, pool: ThreadPoolExecutor, folder: Path) -> None:
        self._pool, self._folder = pool, folder

    def add(self, name: str, command: list[str], source: Path) -> Future[Path]:
        return self._pool.submit(self._compile, [*command, str(source)], self._folder / name)

    @staticmethod
    def _compile(command: list[str], target: Path) -> Path:
        run([*command, "-o", str(target)])
        return target


class _CudaPart:
    """The kernels as nvcc compiles them."""

    def __init__(self, jobs: _Jobs, torch: Torch, compiler: list[str], record: dict[str, Any]) -> None:
        self.architectures: list[Architecture] = []
        self.runtime_flags: list[str] = []
        self._jobs: list[Future[Path]] = []
        self._reason: NotBuiltError | None = None
        try:
            nvcc = find_nvcc(torch.cuda, _without_cache(compiler)[0])
            self.architectures = choose_architectures(nvcc, torch.gpus)
            self.runtime_flags = nvcc.runtime_flags(KERNELS[0])
        except NotBuiltError as reason:
            self._reason = reason
            return
        command = [*nvcc.compile_command(self.architectures), f"-I{CSRC / 'include'}"]
        self._jobs = [jobs.add(f"{kernel.stem}.cuda.o", command, kernel) for kernel in KERNELS]

    def files(self) -> list[Path]:
        """The object files, when they are there. Raises NotBuiltError, the first reason why there are none."""
        if self._reason is not None:
            raise self._reason
        return [job.result() for job in self._jobs]


class _OperatorsPart:
    """The operators and their CPU reference, against torch's headers."""

    def __init__(self, jobs: _Jobs, torch: Torch, compiler: list[str]) -> None:
        self.compiler, self.torch, self._jobs = compiler, torch, jobs
        self._command = [*_cxx(compiler), *torch.compile_flags, "-c"]
        parts = ("autograd", "reference", "step_plan")
        self._objects = [jobs.add(f"{part}.o", self._command, CSRC / f"{part}.cpp") for part in parts]

    def files(self, with_cuda: bool) -> list[Path]:
        """The object files; the binding registers CUDA kernels only where there are some."""
        flags = ["-DOPT_DS_WITH_CUDA"] if with_cuda else []
        name = f"binding{'_cuda' if with_cuda else ''}.o"
        binding = self._jobs.add(name, [*self._command[:-1], *flags, "-c"], CSRC / "binding.cpp")
        return [binding.result(), *(job.result() for job in self._objects)]


class _EmulatorPart:
    """The kernels as g++ compiles them for the emulator."""

    def __init__(self, jobs: _Jobs, torch: Torch, compiler: list[str]) -> None:
        self._objects: list[Future[Path]] = []
        if not _can_emulate():
            return
        emulator = [f"-I{CSRC / 'emulator'}", "-march=x86-64-v3", f"-DOPT_DS_EMULATED_ARCH={EMULATED_ARCHITECTURE}",
                    f'-DOPT_DS_ARCHITECTURES="emulator of sm_{EMULATED_ARCHITECTURE}"', "-Wno-unknown-pragmas"]  # fmt: skip
        binding = [*_cxx(compiler), *torch.compile_flags, "-DOPT_DS_LIBRARY=opt_ds_emulator", "-c"]
        kernels = [*_cxx(compiler), *torch.abi_flags, *emulator, "-c", "-x", "c++"]
        for part in ("binding", "autograd"):
            self._objects.append(jobs.add(f"emulator_{part}.o", binding, CSRC / f"{part}.cpp"))
        for source in [CSRC / "emulator" / "simt.cpp", *KERNELS]:
            self._objects.append(jobs.add(f"{source.stem}.emulator.o", kernels, source))

    def files(self) -> list[Path]:
        if not self._objects:
            raise NotBuiltError(f"the emulator switches stacks in x86-64 assembly; this is {platform.machine()}")
        return [job.result() for job in self._objects]


def _can_emulate() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def _require_torch() -> Torch | None:
    """The torch to compile against; None where no kernels are wanted. Stops the build, with one line, where there is none."""
    try:
        if not kernels_are_wanted():
            return None
        torch = find_torch()
    except (ValueError, BrokenTorchError) as error:
        raise SetupError(str(error)) from None
    if torch is None:
        raise SetupError(missing_torch_message())
    return torch


def _compiler() -> list[str]:
    """CXX, which may have arguments ("ccache g++"), or g++; the program as a full path. Raises NotBuiltError."""
    wanted = os.environ.get("CXX", "").strip()
    try:
        words = shlex.split(wanted) or ["g++"]
    except ValueError as error:
        raise NotBuiltError(f"CXX is {wanted!r}, which is no command ({error})") from None
    path = shutil.which(words[0])
    if path is None and wanted:
        raise NotBuiltError(f'CXX is "{wanted}", which is no program that can be run: set it to a C++ compiler')
    if path is None:
        raise NotBuiltError("no C++ compiler: install g++, or set CXX")
    return [path, *words[1:]]


def _without_cache(compiler: list[str]) -> list[str]:
    """What nvcc takes as its host compiler: "ccache g++" is two words."""
    return compiler[1:] if Path(compiler[0]).name in _COMPILER_CACHES and len(compiler) > 1 else compiler


def _cxx(compiler: list[str]) -> list[str]:
    return [*compiler, "-O2", "-fPIC", "-fvisibility=hidden", "-std=c++20", f"-I{CSRC / 'include'}"]


def _num_jobs() -> int:
    wanted = os.environ.get("MAX_JOBS", "")
    if wanted and not (wanted.isascii() and wanted.isdigit() and int(wanted) > 0):
        print(f'MAX_JOBS is "{wanted}", which is no number of jobs: using one per core', file=sys.stderr)
        wanted = ""
    return int(wanted or os.cpu_count() or 1)
