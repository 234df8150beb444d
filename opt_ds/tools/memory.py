"""The memory of one rank: what it holds all the time, and what a micro-batch and an optimiser step add to it.

Bytes a parameter follow from DeepSpeed 0.19's optimisers as `training/deepspeed_config.py` sets them up (fp32 accumulation);
the figures were found by measuring on a CPU, where a test holds fp32's to 15 %; half precision takes some 0.2 GiB more there
(oneDNN's buffers). Activations come from `activations.py`.

N: ranks; b: bytes of a weight in the run's precision.
"""

from dataclasses import asdict, dataclass

from opt_ds.config import Config
from opt_ds.training.deepspeed_config import Precision, deepspeed_settings

#: Python, PyTorch and DeepSpeed on the host, or a CUDA context with cuBLAS' workspace and NCCL's buffers on a GPU. On an H100 the
#: driver counted 2.9 to 3.4 GiB above the tensors' peak: with what the allocator kept, as nothing pressed it to give back.
PROCESS_BYTES = {"cpu": 0.70 * 2**30, "cuda": 1.2 * 2**30}
#: No allocator fits its pieces together perfectly. On the CPU, the C library's: seen from 0.1 to 0.4; on a GPU not measured when
#: memory is short.
FRAGMENTATION = {"cpu": 0.3, "cuda": 0.06}
_MAX_LIVE_PARAMETERS = 1e9  # DeepSpeed's default: a smaller model stays gathered at stage 3


@dataclass(frozen=True)
class RankMemory:
    """Bytes on the device, by what holds them. `host` is what offloading moves to the host's memory."""

    weights: float
    gradients: float  # fp32 accumulation, and half-precision gradients on their way to it
    optimizer: float  # fp32 master weights and Adam's moments
    communication: float  # what stage 3 gathers, and buckets for reductions
    activations: float
    step: float  # what an optimiser step needs where that is more than the activations, which it does not see
    workspace: float  # the process itself, and the allocator's losses
    host: float

    @property
    def total(self) -> float:
        return sum(value for name, value in asdict(self).items() if name != "host")

    @property
    def tensors(self) -> float:
        """The total without the workspace."""
        return self.total - self.workspace


def rank_memory(
    config: Config, precision: Precision, num_parameters: int, world_size: int, device: str, activation_bytes: float
) -> RankMemory:
    """Memory of one rank of `world_size`; `activation_bytes` as `ActivationTracer.peak_bytes` gives them."""
    p, stage = float(num_parameters), config.zero.stage
    b = 4 if precision == "fp32" else 2
    share = 1 / world_size if stage >= 1 else 1.0
    weights = p * b * (share if stage == 3 else 1)
    accumulated = p * 4 * (share if stage >= 2 else 1)
    on_the_way = p * b if precision == "bf16" and stage == 1 else 0.0  # BF16_Optimizer takes them when backward is over
    optimizer = p * (8 if stage == 0 else 12) * share
    host = 0.0
    if config.zero.offload_optimizer:
        host, optimizer = optimizer, 0.0
    buffers = _reduction_buffers(config, precision, device)
    gathered = min(p, _MAX_LIVE_PARAMETERS) * b if stage == 3 else 0.0
    # When the activations are gone: the gradients of all weights (stage 1), then a rank's reduced partition, flattened;
    # BF16_Optimizer flattens bucket by bucket.
    step = max(p * 4 * share, p * b if stage == 1 else 0.0) if stage >= 1 else 0.0
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
    """DeepSpeed reserves whole buckets for backward, of fp32 at stage 1, of the run's precision later. On a CPU only what is
    written to takes memory, and most of that when the activations are gone."""
    stage = config.zero.stage
    if stage == 0 or device == "cpu":
        return 0.0
    zero = deepspeed_settings(config, precision)["zero_optimization"]
    size = 4 if stage == 1 or precision == "fp32" else 2
    return float(zero["reduce_bucket_size"]) * size * (2 if zero.get("overlap_comm", stage == 3) else 1)
