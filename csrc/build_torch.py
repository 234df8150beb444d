"""Finds the torch that the operators are compiled against: that of the environment which opt_ds is installed into.

pip builds in an isolated environment, which hides the packages of the real one. Its interpreter is the real one all the same, so
that asking it without pip's additions to the environment finds the user's torch.
"""

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REQUIREMENT = "torch>=2.6"
_OLDEST = (2, 6)
_OFF = ("0", "no", "off", "false")
_ON = ("", "1", "yes", "on", "true")

_QUESTION = """
import importlib.util, json, sys
if importlib.util.find_spec("torch") is None:
    answer = None
else:
    import torch
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    answer = {
        "version": torch.__version__,
        "folder": torch.__path__[0],
        "cuda": torch.version.cuda,
        "cxx11_abi": bool(torch._C._GLIBCXX_USE_CXX11_ABI),
        "gpus": sorted({"{}{}".format(*torch.cuda.get_device_capability(index)) for index in range(count)}, key=int),
    }
print(json.dumps([list(sys.version_info[:2]), answer]))
"""


class BrokenTorchError(Exception):
    """There is a torch that cannot be imported. The message states the reason."""


@dataclass(frozen=True)
class Torch:
    """An installed torch: what compiling against it needs."""

    version: str
    folder: str
    cuda: str | None  # the CUDA release that it was built with; None: a CPU build
    cxx11_abi: bool
    gpus: tuple[str, ...]  # architectures of this machine's GPUs, e.g. "80"

    @property
    def compile_flags(self) -> list[str]:
        """Flags of a C++ file that includes torch's headers."""
        headers = Path(self.folder) / "include"
        return [f"-isystem{headers}", f"-isystem{headers / 'torch' / 'csrc' / 'api' / 'include'}", *self.abi_flags]

    @property
    def abi_flags(self) -> list[str]:
        """The layout of std::string and std::list that torch was compiled with."""
        return [f"-D_GLIBCXX_USE_CXX11_ABI={int(self.cxx11_abi)}"]

    @property
    def link_flags(self) -> list[str]:
        return [f"-L{Path(self.folder) / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]


def kernels_are_wanted() -> bool:
    """Whether OPT_DS_BUILD_KERNELS leaves the kernels on. Raises ValueError, one line, for an unknown value."""
    value = os.environ.get("OPT_DS_BUILD_KERNELS", "").strip()
    if value.lower() not in _OFF + _ON:
        raise ValueError(f'OPT_DS_BUILD_KERNELS is "{value}": use 0 to install without kernels, or 1')
    return value.lower() in _ON


@functools.cache
def find_torch() -> Torch | None:
    """The torch to compile against, or None where there is none. Raises BrokenTorchError, one line.

    Looked for in this order: this process's own environment; the same interpreter without what pip's isolation adds; the
    activated virtual environment (`python -m build` isolates by a virtual environment of its own).
    """
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    activated = Path(os.environ.get("VIRTUAL_ENV") or os.devnull) / "bin" / "python"
    for python, environment in ((sys.executable, dict(os.environ)), (sys.executable, outside), (str(activated), outside)):
        found = _ask(python, environment) if Path(python).is_file() else None
        if found is not None:
            return found
    return None


def missing_torch_message() -> str:
    """What to do where there is no torch, in one line."""
    return (
        "opt_ds compiles its kernels against your torch, and this environment has none: install it first (pip install torch "
        "torchvision torchaudio; for a V100 from PyTorch's cu126 index), then run pip install --no-build-isolation -e . "
        "(OPT_DS_BUILD_KERNELS=0 installs opt_ds without kernels)"
    )


def _ask(python: str, environment: dict[str, str]) -> Torch | None:
    done = subprocess.run([python, "-c", _QUESTION], env=environment, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BrokenTorchError(f"the torch of {python} cannot be imported ({lines[-1].strip()}): install it again")
    python_version, answer = json.loads(done.stdout.strip().splitlines()[-1])
    if answer is None or python_version != list(sys.version_info[:2]):
        return None
    torch = Torch(**answer | {"gpus": tuple(answer["gpus"])})
    numbers = tuple(int(part) for part in torch.version.split(".")[:2])
    return torch if numbers >= _OLDEST else None  # an older one is replaced by this very installation
