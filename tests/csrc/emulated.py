"""Builds check_kernels.cpp and check_emulator.cpp with the emulator, plain or under a sanitizer, also from changed sources."""

import fcntl
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HERE = Path(__file__).resolve().parent
KERNELS = sorted((CSRC / "kernels").glob("*.cu"))

# The emulator's own code is never instrumented for races: it is what announces the order of things.
_FLAGS = {
    "plain": (["-O2", "-march=native"], ["-O2", "-march=native"]),
    "asan": (["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],) * 2,
    "tsan": (["-O1", "-g", "-fsanitize=thread"], ["-O1", "-g"]),
}
_RUNTIME_DEFINE = {"plain": [], "asan": ["-DSIMT_ASAN"], "tsan": ["-DSIMT_TSAN"]}


class Builder:
    """Compiles into one folder, which several processes may share; a file that was compiled already (same flags, same content
    of all sources) is taken from there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def build(
        self, program: str = "check_kernels", checker: str = "plain", arch: int = 70, csrc: Path = CSRC, changed: str = ""
    ) -> Path:
        """`changed`: the file under csrc/ that differs from the real sources; only what includes it is compiled again."""
        objects, own = self.folder / f"{checker}-{arch}", self.folder / f"changed-{os.getpid()}"
        sources = [csrc / "emulator" / "simt.cpp", HERE / f"{program}.cpp", *(csrc / "kernels" / k.name for k in KERNELS)]
        if program == "check_emulator":
            sources = sources[:2]
        again = [source for source in sources if changed and _includes(source, Path(changed).name, csrc)]
        same = [source for source in sources if source not in again]
        objects.mkdir(parents=True, exist_ok=True)
        with open(objects / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            linked = self._compile(same, objects, checker, arch, csrc)
            if not changed:
                return self._link(linked, objects / program, checker)
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        return self._link([*linked, *self._compile(again, own, checker, arch, csrc)], own / program, checker)

    def _compile(self, sources: list[Path], folder: Path, checker: str, arch: int, csrc: Path) -> list[Path]:
        """The sources' objects in the folder; those that are missing are compiled."""
        targets = {source: folder / f"{source.stem}.o" for source in sources}
        commands = [self._command(s, target, checker, arch, csrc) for s, target in targets.items() if not target.exists()]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, commands))
        return list(targets.values())

    def _link(self, objects: list[Path], binary: Path, checker: str) -> Path:
        if not binary.exists():
            sanitizer = [flag for flag in _FLAGS[checker][0] if flag.startswith("-fsanitize")]
            _run(["g++", *sanitizer, "-no-pie", *map(str, objects), "-o", str(binary)])
        return binary

    def _command(self, source: Path, target: Path, checker: str, arch: int, csrc: Path) -> list[str]:
        kernel_flags, runtime_flags = _FLAGS[checker]
        runtime = source.name == "simt.cpp"
        flags = [*runtime_flags, *_RUNTIME_DEFINE[checker]] if runtime else list(kernel_flags)
        return ["g++", "-std=c++17", *flags, f"-DOPT_DS_EMULATED_ARCH={arch}", f"-I{csrc / 'include'}", f"-I{csrc / 'emulator'}",
                "-Wno-unknown-pragmas", "-x", "c++", "-c", str(source), "-o", str(target)]  # fmt: skip


def run(binary: Path, *arguments: str, seed: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a built program; `seed` orders the threads of a block. ThreadSanitizer wants its addresses where it expects them."""
    environment = os.environ | {
        "SIMT_SEED": str(seed), "ASAN_OPTIONS": "detect_stack_use_after_return=0", "TSAN_OPTIONS": "halt_on_error=1",
    }  # fmt: skip
    unrandomised = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*unrandomised, str(binary), *arguments], capture_output=True, text=True, env=environment, check=False, timeout=1500
    )


def _includes(source: Path, name: str, csrc: Path, seen: set[Path] | None = None) -> bool:
    """Whether a file is, or includes at any depth, the file of this name."""
    seen = set() if seen is None else seen
    if source.name == name:
        return True
    if source in seen or not source.exists():
        return False
    seen.add(source)
    included = [line.split('"')[1] for line in source.read_text(encoding="utf-8").splitlines() if line.startswith('#include "')]
    return any(_includes(folder / i, name, csrc, seen) for i in included for folder in (csrc / "include", csrc / "emulator"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-3000:]}"
