"""Capabilities of devices: the table of known GPUs, and the measured peak of this machine.

The figures are the manufacturer's (dense, without sparsity), from the data sheets and architecture white papers of
NVIDIA's V100, A100, H100 and H200 Tensor Core GPUs.
"""

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opt_ds.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from opt_ds.training.deepspeed_config import Hardware, Precision

_MOMENT_S = 0.005  # seconds; a matrix product that takes longer is large enough to measure the peak


@dataclass(frozen=True)
class Gpu:
    """A GPU model. Rates are in operations or bytes per second.

    The last two fields are known for NVIDIA's GPUs only. The static model of the kernels reads them.
    """

    name: str
    memory_gib: float  # as reported by the driver
    capability: tuple[int, int]
    half_flops: float  # matrix products in fp16 (and in bf16, from Ampere on)
    fp32_flops: float
    memory_bandwidth: float
    link_bandwidth: float  # NVLink, one direction
    multiprocessors: int = 0
    shared_bytes: int = 0  # shared memory per multiprocessor that blocks can use


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
    """Return the GPU with this name or the first whose name starts with it ("V100").

    Raise UserError if there is none.
    """
    for known, gpu in GPUS.items():
        if known.lower().startswith(name.lower()):
            return gpu
    raise UserError(f'GPU "{name}": unknown{did_you_mean(name, GPUS)}: choose {", ".join(GPUS)}, or custom')


def known_gpu(device_name: str) -> Gpu | None:
    """Return the entry of GPUS for a device name such as "Tesla V100-SXM2-16GB" or "NVIDIA H200", or None.

    Only the rates of the entry are reliable: the memory size may be that of another variant.
    """
    return next((gpu for name, gpu in GPUS.items() if name.split("-")[0] in device_name), None)


def this_machine() -> Gpu:
    """Return this machine's processor as a Gpu, with all of its memory, its measured peak, and loopback as the link."""
    import os

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Gpu("cpu", memory, (0, 0), _measured_peak("cpu", "bf16"), _measured_peak("cpu", "fp32"), 20e9, 2e9)


@dataclass(frozen=True)
class PeakFlops:
    """Peak matrix throughput of a rank's device, and the source of the figure."""

    flops_per_s: float
    source: str


def peak_flops(hardware: "Hardware", precision: "Precision") -> PeakFlops:
    """Return the peak of this rank's device.

    It comes from the data sheet for a known GPU. Otherwise a short matrix product is measured.
    """
    gpu = known_gpu(hardware.name) if hardware.kind == "cuda" else None
    if gpu is not None:
        return PeakFlops(gpu.fp32_flops if precision == "fp32" else gpu.half_flops, f"{gpu.name.split('-')[0]}'s data sheet")
    return PeakFlops(_measured_peak(hardware.kind, precision), "a matrix product measured at the start")


@functools.cache
def _measured_peak(device: str, precision: "Precision") -> float:
    """Return the measured rate of a matrix product on this device, in FLOP/s.

    Sizes grow until one product takes more than _MOMENT_S. Larger sizes are not run, because bf16 on a processor
    without bf16 instructions reaches only a hundredth of its fp32 rate.
    """
    import torch

    # Emulated in software, a hundred times slower, and so useless as a peak.
    if device == "cpu" and precision == "fp16":
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
