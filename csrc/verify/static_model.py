"""Count what the kernels must move and compute, from their definitions, and the same for PyTorch's unfused sequence.

Bytes are those that pass between a kernel and device memory: every tensor that a kernel reads or writes once, counted in full; a
matrix that several kernels share is counted for each, since at these sizes (hundreds of megabytes) caches hold none of it. The
time is a bound: the larger of bytes / bandwidth and FLOPs / peak, times nothing. Measured times: benchmarks/README.md.

    python csrc/verify/static_model.py        prints the tables of benchmarks/README.md
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from opt_ds.training import hardware
from opt_ds.training.hardware import Gpu

FP16, FP32, INT32 = 2, 4, 4
#: Of a multiprocessor of each of these GPUs.
REGISTERS, MAX_THREADS, MAX_BLOCKS = 65536, 2048, 32

#: The GPUs of the tables.
GPUS = tuple(hardware.GPUS[name] for name in ("V100-16GB", "A100-40GB", "H100-80GB"))


@dataclass(frozen=True)
class Cost:
    bytes: float
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def bound_us(self, gpu: Gpu) -> float:
        """Time below which no kernel of this cost can stay, in microseconds."""
        return 1e6 * max(self.bytes / gpu.memory_bandwidth, self.flops / gpu.half_flops)


# ---- LayerNorm: rows x width of fp16; bias, dropout, residual


def layer_norm_least(rows: int, width: int) -> tuple[Cost, Cost]:
    """Return forward and backward with each input read once, and each output and saved tensor written once."""
    matrix, vector = rows * width * FP16, width * FP16
    forward = 4 * matrix + 3 * vector + 2 * rows * FP32  # x, residual -> total, normed; bias, weight, bias; mean, rstd
    # d_normed, d_total, total -> d_residual, d_x; weight; mean, rstd; three gradients of vectors
    backward = 5 * matrix + vector + 2 * rows * FP32 + 3 * vector
    return Cost(forward), Cost(backward)


def layer_norm_fused(rows: int, width: int, gpu: Gpu) -> tuple[Cost, Cost]:
    """Return the kernels' own: the above, the rows' keys, and the partial sums of vector gradients, written and read again."""
    forward, backward = layer_norm_least(rows, width)
    keys = 2 * rows * INT32
    rows_per_block = 4 if width <= 1024 else 1
    parts = min(2 * gpu.multiprocessors, -(-rows // rows_per_block))
    return forward + Cost(keys), backward + Cost(keys + 2 * 3 * parts * width * FP32)


def layer_norm_unfused(rows: int, width: int) -> tuple[Cost, Cost]:
    """PyTorch eager: bias add (in the matmul's epilogue: free), dropout (byte mask), add, layer_norm; and back."""
    matrix, mask = rows * width * FP16, rows * width
    dropout = 2 * matrix + mask
    add = 3 * matrix
    norm = 2 * matrix + 2 * rows * FP32
    norm_input_backward = 3 * matrix + 2 * rows * FP32  # d_normed, total -> d_input
    norm_weight_backward = 2 * matrix
    accumulate = 3 * matrix  # the stream's gradient joins
    dropout_backward = 2 * matrix + mask
    bias_backward = matrix  # a sum over rows
    return Cost(dropout + add + norm), Cost(
        norm_input_backward + norm_weight_backward + accumulate + dropout_backward + bias_backward
    )


# ---- attention: batch sequences of L queries and L keys, heads of `size` in fp16, dropout on


def attention_fused(batch: int, heads: int, length: int, size: int) -> tuple[Cost, Cost]:
    """Ours. Keys and values are read again by every block of 128 (64 for size 128) queries of a head; after the first time they
    lie in the L2 cache (6 MB on V100; a head has at most 128 KB of them here), so memory sees them once."""
    rows = batch * length * heads
    matrix, statistics = rows * size * FP16, rows * FP32
    product = 2.0 * batch * heads * length * length * size  # FLOPs of one L x L x size product
    forward = Cost(4 * matrix + statistics, 2 * product)  # q, k, v -> out, lse
    delta = Cost(2 * matrix + statistics)  # out, d_out -> delta
    keys = Cost(6 * matrix + 2 * statistics, 4 * product)  # k, v, q, d_out, lse, delta -> d_k, d_v
    queries = Cost(5 * matrix + 2 * statistics, 3 * product)  # q, d_out, k, v, lse, delta -> d_q
    return forward, delta + keys + queries


def attention_unfused(batch: int, heads: int, length: int, size: int) -> tuple[Cost, Cost]:
    """The sequence of `ops.backend=torch` without padding: scale, matmul, float, mask, softmax, dropout, cast, matmul; and
    back."""
    rows = batch * length * heads
    matrix, scores = rows * size * FP16, float(rows) * length
    product = 2.0 * batch * heads * length * length * size
    half, single, mask = scores * FP16, scores * FP32, scores
    forward = (
        2 * matrix  # q scaled
        + 2 * matrix + half  # scores
        + half + single  # to fp32
        + 2 * single  # + mask
        + 2 * single  # softmax
        + 2 * single + mask  # dropout
        + single + half  # to fp16
        + half + 2 * matrix  # times v
    )  # fmt: skip
    backward = (
        half + 2 * matrix  # d_v
        + 2 * matrix + half  # d_probabilities
        + half + single  # to fp32
        + 2 * single + mask  # dropout
        + 3 * single  # softmax
        + single + half  # to fp16
        + 2 * (half + 2 * matrix)  # d_q, d_k
        + 2 * matrix  # scale
    )  # fmt: skip
    return Cost(forward, 2 * product), Cost(backward, 4 * product)


# ---- occupancy


def blocks_per_multiprocessor(gpu: Gpu, registers: int, threads: int, shared_bytes: int) -> int:
    """Registers are allocated per warp in units of 256, shared memory in units of 256 bytes (1 KB more per block from sm_80)."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // (threads // 32)
    reserved = 1024 if gpu.capability >= (8, 0) else 0
    by_shared = gpu.shared_bytes // max(1, -(-shared_bytes // 256) * 256 + reserved)
    return min(by_registers, by_shared, MAX_THREADS // threads, MAX_BLOCKS)


def attention_shared_bytes(size: int, backward: bool) -> int:
    rows, row_bytes = (128 if size <= 64 else 64), 2 * size
    tile = 32 * row_bytes
    if not backward:
        return max(4 * tile, rows * row_bytes)
    return 2 * rows * row_bytes + (4 if size <= 64 else 2) * tile


# ---- tables

LAYER_NORM_SHAPES = ((8192, 768), (8192, 1024), (8192, 384))
ATTENTION_SHAPES = ((32, 12, 128, 64), (32, 12, 256, 64), (32, 12, 512, 64), (32, 8, 256, 128))


def tables() -> str:
    lines = [
        "| LayerNorm, rows x width | least MB | ours MB (/ least) | PyTorch eager MB (/ ours) | bound V100 / A100 / H100, us |",
        "|---|---|---|---|---|",
    ]
    for rows, width in LAYER_NORM_SHAPES:
        least = sum((c.bytes for c in layer_norm_least(rows, width)), 0.0)
        ours = [layer_norm_fused(rows, width, gpu) for gpu in GPUS]
        eager = sum((c.bytes for c in layer_norm_unfused(rows, width)), 0.0)
        own = max(f.bytes + b.bytes for f, b in ours)
        times = " / ".join(f"{(f + b).bound_us(gpu):.0f}" for (f, b), gpu in zip(ours, GPUS, strict=True))
        lines.append(f"| {rows} x {width}, forward + backward | {least / 1e6:.1f} | {own / 1e6:.1f} ({own / least:.3f}) | "
                     f"{eager / 1e6:.1f} ({eager / own:.2f}) | {times} |")  # fmt: skip
    lines += [
        "",
        "| attention, sequences x heads x L x D, forward + backward | ours MB | PyTorch eager MB (/ ours) | GFLOP ours (eager) | "
        "bound V100 / A100 / H100, us: ours | the same, eager |",
        "|---|---|---|---|---|---|",
    ]
    for shape in ATTENTION_SHAPES:
        ours, eager = sum(attention_fused(*shape), Cost(0)), sum(attention_unfused(*shape), Cost(0))
        # kernels of eager run one after the other: their bounds add up
        own_us, eager_us = (
            [sum(c.bound_us(gpu) for c in costs(*shape)) for gpu in GPUS] for costs in (attention_fused, attention_unfused)
        )
        moved = f"{ours.bytes / 1e6:.0f} | {eager.bytes / 1e6:.0f} ({eager.bytes / ours.bytes:.1f})"
        own_times, eager_times = (" / ".join(f"{t:.0f}" for t in times) for times in (own_us, eager_us))
        flops = f"{ours.flops / 1e9:.0f} ({eager.flops / 1e9:.0f})"
        lines.append(f"| {' x '.join(map(str, shape))} | {moved} | {flops} | {own_times} | {eager_times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables())
