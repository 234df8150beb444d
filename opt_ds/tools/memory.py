"""Memory of one rank: what it holds permanently, and what a micro-batch and an optimiser step add.

Bytes per parameter follow from DeepSpeed 0.19's optimisers as configured by `training/deepspeed_config.py` (fp32
accumulation). The figures were measured on a CPU, where a test checks fp32 to within 15 %. Half precision takes about
0.2 GiB more there (oneDNN's buffers). Activations come from `activations.py`.

Legend: N ranks; b bytes of a weight in the run's precision.
"""

from dataclasses import asdict, dataclass

from opt_ds.config import Config
from opt_ds.training.deepspeed_config import Precision, deepspeed_settings

#: Python, PyTorch and DeepSpeed on the host, or a CUDA context with cuBLAS's workspace and NCCL's buffers on a GPU. On
#: an H100 the driver reported 2.9 to 3.4 GiB above the tensors' peak. This includes memory that the allocator kept
#: because nothing else required it.
PROCESS_BYTES = {"cpu": 0.70 * 2**30, "cuda": 1.2 * 2**30}
#: Loss by fragmentation in the allocator, as a fraction. For the CPU's C library 0.1 to 0.4 was observed. On a GPU it
#: has not been measured under memory pressure.
FRAGMENTATION = {"cpu": 0.3, "cuda": 0.06}
_MAX_LIVE_PARAMETERS = 1e9  # DeepSpeed's default; a smaller model stays gathered at stage 3


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device by use. `host` is what offloading moves to host memory."""

    weights: float
    gradients: float  # fp32 accumulation, and half-precision gradients that are not accumulated yet
    optimizer: float  # fp32 master weights and Adam's moments
    communication: float  # weights that stage 3 gathers, and buckets for reductions
    activations: float
    step: float  # memory of an optimiser step in excess of the activations, which are free by then
    workspace: float  # the process itself, and fragmentation
    host: float

    @property
    def total(self) -> float:
        """Total bytes on the device."""
        return sum(value for name, value in asdict(self).items() if name != "host")

    @property
    def tensors(self) -> float:
        """The total without the workspace."""
        return self.total - self.workspace


def rank_memory(
    config: Config, precision: Precision, num_parameters: int, world_size: int, device: str, activation_bytes: float
) -> RankMemory:
    """Return the memory of one rank.

    Args:
        config: The run's configuration.
        precision: The run's precision.
        num_parameters: Parameters of the model.
        world_size: Number of ranks.
        device: "cpu" or "cuda".
        activation_bytes: Result of `ActivationTracer.peak_bytes`.

    Returns:
        Bytes by use.
    """
    p, stage = float(num_parameters), config.zero.stage
    b = 4 if precision == "fp32" else 2
    fraction = 1 / world_size if stage >= 1 else 1.0
    weights = p * b * (fraction if stage == 3 else 1)
    accumulated = p * 4 * (fraction if stage >= 2 else 1)
    on_the_way = p * b if precision == "bf16" and stage == 1 else 0.0  # BF16_Optimizer accumulates them after backward
    optimizer = p * (8 if stage == 0 else 12) * fraction
    host = 0.0
    if config.zero.offload_optimizer:
        host, optimizer = optimizer, 0.0
    buffers = _reduction_buffers(config, precision, device)
    gathered = min(p, _MAX_LIVE_PARAMETERS) * b if stage == 3 else 0.0
    # Once the activations are free: the gradients of all weights (stage 1), then a rank's reduced partition, flattened.
    # BF16_Optimizer flattens them bucket by bucket.
    step = max(p * 4 * fraction, p * b if stage == 1 else 0.0) if stage >= 1 else 0.0
    if on_the_way:
        bucket = float(deepspeed_settings(config, precision)["zero_optimization"]["reduce_bucket_size"])
        step = 2 * 4 * min(bucket, p)
    communication = gathered + buffers
    held = weights + accumulated + on_the_way + optimizer + communication
    step = max(0.0, step - activation_bytes)
    workspace = PROCESS_BYTES[device] + FRAGMENTATION[device] * (held + activation_bytes)
    return RankMemory(
        weights, accumulated + on_the_way, optimizer, communication, activation_bytes, step, workspace, host
    )


def _reduction_buffers(config: Config, precision: Precision, device: str) -> float:
    """Return the bytes of the buckets that DeepSpeed reserves for backward.

    They are fp32 at stage 1 and of the run's precision at higher stages. On a CPU only pages that are written to take
    memory, and most are written when the activations are free.
    """
    stage = config.zero.stage
    if stage == 0 or device == "cpu":
        return 0.0
    zero = deepspeed_settings(config, precision)["zero_optimization"]
    size = 4 if stage == 1 or precision == "fp32" else 2
    return float(zero["reduce_bucket_size"]) * size * (2 if zero.get("overlap_comm", stage == 3) else 1)
