"""The CUDA side of the build: nvcc, the architectures to compile for, and the runtime library to link."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_OLDEST = 70
_EXAMPLES = 'write for example "80", "8.0;9.0", "8.0+PTX" or "90a"; "none" for no CUDA kernels; unset: the GPUs of this machine'
_ARCHITECTURE = re.compile(r"(?:sm_|compute_)?(\d{1,2})\.?(\d)([af]?)(\+ptx)?", re.IGNORECASE | re.ASCII)
_QUERY_SECONDS = 120


class NotBuiltError(Exception):
    """A part cannot be built here. The message is one line with the reason."""


@dataclass(frozen=True, order=True)
class Architecture:
    """A GPU architecture to compile for."""

    number: int  # 80 is sm_80
    suffix: str = ""  # "a" or "f": only this chip, or its family
    ptx: bool = False  # also as PTX, which drivers translate for later chips

    def __str__(self) -> str:
        return f"{self.number}{self.suffix}{'+PTX' if self.ptx else ''}"

    @property
    def flag(self) -> str:
        """nvcc's option."""
        name = f"{self.number}{self.suffix}"
        return f"-gencode=arch=compute_{name},code=" + (f"[sm_{name},compute_{name}]" if self.ptx else f"sm_{name}")


@dataclass(frozen=True)
class Nvcc:
    """An nvcc that can serve this torch."""

    path: str
    host_compiler: str

    def compile_command(self, architectures: list[Architecture]) -> list[str]:
        """All but the source and the object file."""
        named = " ".join(f"sm_{architecture}" for architecture in architectures)
        return [self.path, f"-ccbin={self.host_compiler}", "-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden",
                f'-DOPT_DS_ARCHITECTURES="{named}"', *(architecture.flag for architecture in architectures), "-c"]  # fmt: skip

    def runtime_flags(self, source: Path) -> list[str]:
        """Return linker flags of the static CUDA runtime. nvcc reports its toolkit's folder, as PATH may have a wrapper.

        `source`: any CUDA file. Raises NotBuiltError where the library is missing.
        """
        told = run([self.path, f"-ccbin={self.host_compiler}", "--dryrun", "-c", str(source)], _QUERY_SECONDS)
        top = re.search(r"TOP=(.*)", told)
        toolkit = Path(top[1].strip()) if top else Path(self.path).resolve().parent.parent
        folders = [toolkit / "lib64", toolkit / "lib", *sorted(toolkit.glob("targets/*/lib"))]
        folder = next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)
        if folder is None:
            raise NotBuiltError(f"the CUDA toolkit in {toolkit} has no libcudart_static.a: install its runtime development files")
        return [f"-L{folder}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def find_nvcc(torch_cuda: str | None, host_compiler: str) -> Nvcc:
    """CUDACXX, or the nvcc on PATH. Raises NotBuiltError where there is none of torch's CUDA generation."""
    if torch_cuda is None:
        raise NotBuiltError("this torch is a CPU build")
    wanted = os.environ.get("CUDACXX", "").strip()
    path = shutil.which(wanted or "nvcc")
    if path is None and wanted:
        raise NotBuiltError(f'CUDACXX is "{wanted}", which is no program that can be run: set it to the path of nvcc')
    if path is None:
        raise NotBuiltError(f"no nvcc on PATH: install the CUDA {torch_cuda} toolkit, or set CUDACXX")
    found = re.search(r"release (\d+)\.(\d+)", run([path, "--version"], _QUERY_SECONDS))
    if found is None or found[1] != torch_cuda.split(".")[0]:
        version = f"CUDA {found[1]}.{found[2]}" if found else "of an unknown version (its --version names no release)"
        raise NotBuiltError(f"{path} is {version}, torch was built with CUDA {torch_cuda}: their major versions must agree")
    return Nvcc(path, host_compiler)


def choose_architectures(nvcc: Nvcc, gpus: tuple[str, ...]) -> list[Architecture]:
    """OPT_DS_CUDA_ARCHITECTURES, or those of this machine's GPUs. Raises NotBuiltError where nvcc does not know one."""
    asked = parse_architectures(os.environ.get("OPT_DS_CUDA_ARCHITECTURES", ""))
    architectures = asked or [Architecture(int(gpu)) for gpu in gpus]
    known = set(re.findall(r"compute_(\d+)\b", run([nvcc.path, "--list-gpu-arch"], _QUERY_SECONDS)))
    names = ", ".join(sorted(known, key=int))
    if not architectures:
        raise NotBuiltError(f"no GPU on this machine: to build for another, set OPT_DS_CUDA_ARCHITECTURES (nvcc knows {names})")
    for architecture in architectures:
        if str(architecture.number) not in known:
            raise NotBuiltError(f"this nvcc does not compile for sm_{architecture.number} (it knows {names})")
    return architectures


def parse_architectures(text: str) -> list[Architecture]:
    """"8.0;9.0a", "70,80+PTX", "sm_80": sorted, each once; [] where nothing is asked for.

    Raises NotBuiltError for "none", and for a word that is no architecture.
    """
    words = [word for word in re.split(r"[,;\s]+", text) if word]
    if [word.lower() for word in words] == ["none"]:
        raise NotBuiltError("OPT_DS_CUDA_ARCHITECTURES is none")
    found: dict[tuple[int, str], bool] = {}
    for word in words:
        parts = _ARCHITECTURE.fullmatch(word)
        if parts is None:
            raise NotBuiltError(f'OPT_DS_CUDA_ARCHITECTURES: "{word}" is no GPU architecture: {_EXAMPLES}')
        key = int(parts[1] + parts[2]), parts[3].lower()
        if key[0] < _OLDEST:
            raise NotBuiltError(f'OPT_DS_CUDA_ARCHITECTURES: "{word}" is too old: the kernels need sm_{_OLDEST} (V100) or later')
        found[key] = found.get(key, False) or parts[4] is not None
    return sorted(Architecture(number, suffix, ptx) for (number, suffix), ptx in found.items())


def run(command: list[str], seconds: float | None = None) -> str:
    """A program's output. Raises NotBuiltError, one line, when it fails or cannot be started; its own words go to stderr."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except OSError as error:
        raise NotBuiltError(f"{command[0]} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise NotBuiltError(f"{name} did not answer within {seconds:.0f} seconds") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}, without a message"]
        print(" ".join(command), done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise NotBuiltError(f"{name} failed: {next((line for line in lines if 'error' in line.lower()), lines[-1]).strip()}")
    return done.stdout + done.stderr
