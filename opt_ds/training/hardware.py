"""Capabilities of devices: the one table of GPUs, and the measured peak of this machine.

Figures are those of the makers (dense, without sparsity): data sheets and architecture white papers of NVIDIA's V100,
A100, H100 and H200 Tensor Core GPUs.
"""

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opt_ds.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from opt_ds.training.deepspeed_config import Hardware, Precision

_MOMENT_S = 0.005  # a product that takes longer is large enough to measure a processor by


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. Rates are operations or bytes per second.

    The last two fields are known for NVIDIA's GPUs only; the kernels' static model reads them.
    """

    name: str
    memory_gib: float  # as its driver reports it
    capability: tuple[int, int]
    half_flops: float  # fp16 (and bf16, from Ampere on) matrix products
    fp32_flops: float
    memory_bandwidth: float
    link_bandwidth: float  # NVLink, one direction
    multiprocessors: int = 0
    shared_bytes: int = 0  # shared memory of a multiprocessor that blocks can use


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100-16GB", 15.7, (7, 0), 125e12, 15.7e12, 900e9, 150e9, 80, 96 << 10),
        Gpu("V100-32GB", 31.7, (7, 0), 125e12, 15.7e12, 900e9, 150e9, 80, 96 << 10),
        Gpu("A100-40GB", 39.5, (8, 0), 312e12, 19.5e12, 1555e9, 300e9, 108, 164 << 10),
        Gpu("A100-80GB", 79.2, (8, 0), 312e12, 19.5e12, 2039e9, 300e9, 108, 164 << 10),
        Gpu("H100-80GB", 79.6, (9, 0), 989e12, 67e12, 3350e9, 450e9, 132, 228 << 10),
        Gpu("H200-141GB", 140.4, (9, 0), 989e12, 67e12, 4800e9, 450e9, 132, 228 << 10),
    )
}


def find_gpu(name: str) -> Gpu:
    """The kind of this name ("V100" alone takes the first that fits). Raises UserError for an unknown one."""
    for known, gpu in GPUS.items():
        if known.lower().startswith(name.lower()):
            return gpu
    raise UserError(f'GPU "{name}": unknown{did_you_mean(name, GPUS)}: choose {", ".join(GPUS)}, or custom')


def known_gpu(device_name: str) -> Gpu | None:
    """The kind of a GPU that calls itself so ("Tesla V100-SXM2-16GB", "NVIDIA H200"), as far as rates go; None: not in GPUS."""
    return next((gpu for name, gpu in GPUS.items() if name.split("-")[0] in device_name), None)


def this_machine() -> Gpu:
    """This machine's processor as one more kind: all its memory, its measured peak, and loopback as the link."""
    import os

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Gpu("cpu", memory, (0, 0), _measured_peak("cpu", "bf16"), _measured_peak("cpu", "fp32"), 20e9, 2e9)


@dataclass(frozen=True)
class PeakFlops:
    """The most matrix operations a second that a rank's device does, and where the figure comes from."""

    flops_per_s: float
    source: str


def peak_flops(hardware: "Hardware", precision: "Precision") -> PeakFlops:
    """Of this rank's device: the data sheet's for a known GPU, else that of a matrix product measured now, in a moment."""
    gpu = known_gpu(hardware.name) if hardware.kind == "cuda" else None
    if gpu is not None:
        return PeakFlops(gpu.fp32_flops if precision == "fp32" else gpu.half_flops, f"{gpu.name.split('-')[0]}'s data sheet")
    return PeakFlops(_measured_peak(hardware.kind, precision), "a matrix product measured at the start")


@functools.cache
def _measured_peak(device: str, precision: "Precision") -> float:
    """Of a matrix product on this device, of the largest size that takes a moment only: in bf16 a processor without instructions
    for it does a hundredth of its fp32."""
    import torch

    if device == "cpu" and precision == "fp16":  # software, a hundred times slower: no peak to compare with
        precision = "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    best = 0.0
    for size in (96, 192, 384, 768) if device == "cpu" else (8192,):
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        for _ in range(5):
            began = time.perf_counter()
            torch.mm(left, right)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            best = max(best, 2 * size**3 / seconds)
        if seconds > _MOMENT_S:
            break
    return best
