"""Checks of whether this machine can run opt_ds. Each check reports ok, or what is wrong and how to fix it.

Errors of a check are reported as findings, because a checker that fails on a broken installation would be useless.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from opt_ds.config import Config
from opt_ds.errors import UserError
from opt_ds.version import __version__

_PACKAGES = ("torch", "deepspeed", "transformers", "torchaudio", "torchvision", "h5py", "numpy", "safetensors", "tensorboard")
_GIB = 2**30
_LITTLE_SHM = 1 * _GIB
_SLOW_STORE = 100e6  # bytes per second
_READ_SECONDS = 1.0
_NOFILE = 1024


class Finding(NamedTuple):
    """One line of the report."""

    level: Literal["ok", "warn", "FAIL"]
    subject: str
    text: str


@dataclass(frozen=True)
class Question:
    """What is to be run. The checks of precision, kernels, stores and output depend on it."""

    config: Config
    output: Path | None = None


def default_config(stores: list[str]) -> str:
    """Return the preset that pretrain.py without --config uses on this machine.

    Return opt-base if that cannot be determined.
    """
    try:
        import torch

        from opt_ds.training.preflight import default_preset

        return default_preset(stores, torch.cuda.is_available())[0]
    except (ImportError, UserError):
        return "opt-base"  # the report names the cause


def resolve(source: str, settings: list[str], stores: list[str]) -> tuple[Config, str | None]:
    """Return the configuration with the stores' sizes, and a line that lists them.

    The report names stores that cannot be read.
    """
    from opt_ds.config import load_config
    from opt_ds.training.preflight import settle

    try:
        config, _, taken = settle(source, settings, stores)
        return config, taken
    except UserError:
        return load_config(source, [*settings, *([f"data.stores={stores!r}"] if stores else [])]), None


def examine(question: Question) -> Iterator[Finding]:
    """Yield every finding as soon as it is available."""
    for check in CHECKS:
        try:
            yield from check(question)
        except UserError as error:
            yield Finding("FAIL", _subject(check), str(error))
        except Exception as error:
            yield Finding("FAIL", _subject(check), f"{type(error).__name__}: {' '.join(str(error).split())}")


def _subject(check: Callable[..., object]) -> str:
    return check.__name__.strip("_").replace("_", " ")


def _versions(_: Question) -> Iterator[Finding]:
    found, missing = [f"opt_ds {__version__}", f"python {platform.python_version()}"], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Finding("ok", "versions", ", ".join(found))
    if missing:
        yield Finding("FAIL", "versions", f"not installed: {', '.join(missing)}: run make install")
    import torch

    from opt_ds.training.deepspeed_internals import name_accelerator

    name_accelerator()
    import deepspeed
    import transformers

    loaded = (torch, deepspeed, transformers)
    yield Finding("ok", "imports", f"{', '.join(m.__name__ for m in loaded)} load; torch is built for CUDA {torch.version.cuda}")
    if not deepspeed.__version__.startswith("0.19."):
        yield Finding(
            "warn", "deepspeed", f"{deepspeed.__version__}: the engine relies on 0.19.8: pip install 'deepspeed>=0.19.8,<0.20'"
        )


def _device(question: Question) -> Iterator[Finding]:
    import torch

    from opt_ds.training.deepspeed_config import Hardware, choose_precision, has_kernels

    driver = _first_line(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    if not torch.cuda.is_available():
        if driver and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            yield Finding(
                "FAIL", "gpu", f"nvidia-smi sees {driver}, but torch {torch.__version__} sees no GPU: its CUDA "
                f"{torch.version.cuda} is newer than the driver, or CUDA_VISIBLE_DEVICES hides it"
            )  # fmt: skip
        else:
            yield Finding("ok", "gpu", "none found: training runs on the CPU")
    hardware = Hardware.detect()
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        kind = Hardware("cuda", found.name, (found.major, found.minor), tuple(torch.cuda.get_arch_list()))
        text = f"{found.name}, {found.total_memory / _GIB:.1f} GiB, sm_{found.major}{found.minor}"
        if has_kernels(kind):
            yield Finding("ok", f"gpu {index}", f"{text}: this torch has kernels for it")
        else:
            remedy = "install one that has, for a V100 from PyTorch's cu126 index"
            yield Finding("FAIL", f"gpu {index}", f"{text}: this torch has no kernels for it: {remedy}")
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding("ok", "cpu", f"{hardware.name if hardware.kind == 'cpu' else platform.machine()}, "
                  f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable, OMP_NUM_THREADS {threads}")  # fmt: skip
    precision = choose_precision(question.config, hardware)
    yield Finding("ok", "precision", f"{precision} with ZeRO stage {question.config.zero.stage}")


def _apex(_: Question) -> Iterator[Finding]:
    spec = importlib.util.find_spec("apex")
    if spec is None:
        yield Finding("ok", "apex", "not installed; nothing needs it (only a kernel benchmark compares with it)")
    elif spec.submodule_search_locations and any(
        (Path(folder) / "normalization" / "fused_layer_norm.py").is_file() for folder in spec.submodule_search_locations
    ):
        yield Finding("ok", "apex", "NVIDIA's")
    else:
        yield Finding(
            "warn", "apex", "an unrelated package of that name: pip uninstall apex; NVIDIA's is built from github.com/NVIDIA/apex"
        )


def _compilers(_: Question) -> Iterator[Finding]:
    import torch

    compiler = _first_line(["g++", "--version"])
    if compiler:
        yield Finding("ok", "g++", compiler)
    else:
        yield Finding("warn", "g++", "not found: needed only to build extensions: apt install g++")
    cuda = [line for line in _output(["nvcc", "--version"]).splitlines() if "release" in line]
    built_for = torch.version.cuda
    if not cuda:
        yield Finding("ok", "nvcc", "not found: needed only to build CUDA extensions")
    elif built_for and f"release {built_for.split('.')[0]}." not in cuda[0]:
        yield Finding("warn", "nvcc", f"{cuda[0].strip()}, but torch is built for CUDA {built_for}: extensions may not build")
    else:
        yield Finding("ok", "nvcc", cuda[0].strip())


def _communication(_: Question) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        version = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        yield Finding("ok", "nccl", version)
    elif torch.distributed.is_gloo_available():
        yield Finding("ok", "gloo", "between CPU ranks")
    else:
        yield Finding("FAIL", "gloo", "this torch has none: install one that has")
    host = socket.gethostname()
    try:
        yield Finding("ok", "host name", f"{host} is {socket.gethostbyname(host)}")
    except OSError:
        yield Finding("warn", "host name", f"{host} has no address: gloo may not find its interface: set GLOO_SOCKET_IFNAME")


def _memory(_: Question) -> Iterator[Finding]:
    import resource

    shm = shutil.disk_usage("/dev/shm")
    if shm.total < _LITTLE_SHM:
        yield Finding(
            "warn", "/dev/shm", f"{shm.total / _GIB:.2f} GiB: NCCL may fail with more than one GPU: docker run --shm-size=8g"
        )
    else:
        yield Finding("ok", "/dev/shm", f"{shm.free / _GIB:.1f} of {shm.total / _GIB:.1f} GiB free")
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    yield Finding("ok", "memory", f"{kib['MemAvailable'] / 2**20:.1f} of {kib['MemTotal'] / 2**20:.1f} GiB available")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files < _NOFILE:
        yield Finding("warn", "open files", f"at most {files}: a store of many shards needs more: ulimit -n 4096")


def _kernels(question: Question) -> Iterator[Finding]:
    import torch

    from opt_ds.ops import backend, compiled

    chosen = ", ".join(f"{operator}: {kernel}" for operator, kernel in backend.choose(question.config.ops.backend).items())
    failed = {"cpu": compiled.load("opt_ds"), "emulator": compiled.load("opt_ds_emulator")}
    cuda = compiled.build_record()["cuda"]
    there = [part for part, reason in failed.items() if not reason] + ["cuda"] * (cuda == "built")
    text = f"{chosen}; compiled: {', '.join(there) or 'nothing'}" + (f"; cuda: {cuda}" if cuda != "built" else "")
    missing = compiled.missing_on(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if missing:
        yield Finding("warn", "kernels", f"{text}; not used: {missing}" if missing != cuda else text)
    else:
        yield Finding("ok", "kernels", text)


def _stores(question: Question) -> Iterator[Finding]:
    from opt_ds.data.truncation import truncation_lines
    from opt_ds.store.verify import open_store
    from opt_ds.training.preflight import training_problems

    if not question.config.data.stores:
        yield Finding("ok", "store", "none named: --store DIR checks one")
    opened = [open_store(path) for path in question.config.data.stores]
    for problem in training_problems(question.config, opened):
        yield Finding("FAIL", "stores", problem)
    for line in truncation_lines(question.config.model, opened):
        yield Finding("warn", "limits", line)
    for path, store in zip(question.config.data.stores, opened, strict=True):
        rate, samples = reading_rate(store)
        text = f"{path}: {store.num_samples:,} samples, read at random at {rate / 1e6:.0f} MB/s, {samples:,.0f} samples/s"
        if rate < _SLOW_STORE:
            yield Finding("warn", "store", f"{text}: slow: copy it to a local disk ($SLURM_TMPDIR), or compare with opt-ds plan")
        else:
            yield Finding("ok", "store", f"{text} (the system's cache helps)")


def reading_rate(store: "object", seconds: float = _READ_SECONDS) -> tuple[float, float]:
    """Return bytes and samples per second, read by one thread in random order.

    The first shards are opened in advance.
    """
    import numpy as np

    from opt_ds.store.reader import FeatureStore

    assert isinstance(store, FeatureStore)
    order = np.random.default_rng(0).permutation(store.num_samples)
    rows = store.rows
    total, count, began = 0, 0, time.perf_counter()
    for sample in order:
        text, *others = rows[sample]
        arrays = [store.text(text)] if text >= 0 else []
        arrays += [store.features(name, row) for name, row in zip(store.modalities[1:], others, strict=True) if row >= 0]
        total += sum(np.array(array).nbytes for array in arrays)  # copy the arrays so that the pages are really read
        count += 1
        if time.perf_counter() - began > seconds:
            break
    took = max(time.perf_counter() - began, 1e-9)
    return total / took, count / took


def _output_folder(question: Question) -> Iterator[Finding]:
    if question.output is None:
        return
    folder = next(parent for parent in (question.output, *question.output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(folder).free / _GIB
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        yield Finding("FAIL", "output", f"{question.output}: {folder} cannot be written to: use another --output")
    else:
        yield Finding("ok", "output", f"{question.output}: {free:.0f} GiB free")


def _slurm(_: Question) -> Iterator[Finding]:
    from opt_ds.training.time_limit import END_TIME_VARIABLE

    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    where = f"job {job}, node {os.environ.get('SLURMD_NODENAME', '?')}, {os.environ.get('SLURM_NTASKS', '?')} task(s)"
    end = os.environ.get(END_TIME_VARIABLE)
    if end is None:
        yield Finding("warn", "slurm", f"{where}: its end is not known: the run cannot save before it: set {END_TIME_VARIABLE}")
    else:
        yield Finding("ok", "slurm", f"{where}, {(float(end) - time.time()) / 60:.0f} minutes left")


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _first_line(command: list[str]) -> str:
    return _output(command).partition("\n")[0].strip()


CHECKS: tuple[Callable[[Question], Iterator[Finding]], ...] = (
    _versions,
    _device,
    _apex,
    _compilers,
    _communication,
    _memory,
    _kernels,
    _stores,
    _output_folder,
    _slurm,
)
