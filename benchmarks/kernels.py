"""Measure the operators of opt_ds and PyTorch's at the model's shapes, as ratios and relative to the limits of the
device.

    python benchmarks/kernels.py            on a GPU: fp16 (and bf16 if the chip has it), forward + backward, medians; as CUDA
                                            graphs, so that launches cost no time
    python benchmarks/kernels.py --device cpu      the measurement behind `auto` choosing PyTorch on the CPU

The limits of the device are measured first: a large copy (bytes per second) and a large fp16 matmul (FLOPs per second).
Bytes and FLOPs of each operator come from csrc/verify/static_model.py.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc" / "verify")]
import static_model  # noqa: E402

from opt_ds.ops import backend, compiled  # noqa: E402
from opt_ds.ops.attention import attention  # noqa: E402
from opt_ds.ops.layer_norm import add_layer_norm  # noqa: E402
from opt_ds.ops.sequences import Sequences  # noqa: E402

DROPOUT = 0.1
_CALLS = 10  # in a CUDA graph


def captured(step: Callable[[], object]) -> Callable[[], object]:
    """Capture _CALLS calls as one CUDA graph, which has no gaps between the launches of small kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            step()
    return graph.replay


def milliseconds(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of one call after a warm-up. On a GPU, ten calls are in one graph."""
    calls = 1
    if device.type == "cuda":
        try:
            step, calls = captured(step), _CALLS
        except RuntimeError as error:
            print(f"not captured as a graph, launched one by one: {str(error).splitlines()[0]}", file=sys.stderr)
    for _ in range(3):
        step()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step()
            end.record()
            torch.cuda.synchronize(device)
            times.append(begin.elapsed_time(end) / calls)
        else:
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def limits(device: torch.device, dtype: torch.dtype, repeats: int) -> tuple[float, float]:
    """Return the measured copy bandwidth (GB/s, read + write) and matmul rate (TFLOP/s)."""
    large = device.type == "cuda"
    source = torch.empty((256 if large else 32) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.numel() / milliseconds(lambda: target.copy_(source), device, repeats) / 1e6
    n = 8192 if large else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    matmul = 2 * n**3 / milliseconds(lambda: a @ a, device, repeats) / 1e9
    return copy, matmul


def forward_backward(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], object]:
    gradient = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)


def layer_norm_methods(
    width: int, rows: int, dtype: torch.dtype, device: torch.device
) -> Iterable[tuple[str, Callable[[], object]]]:
    x, residual = (torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    weight, bias = (torch.ones(width, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    sequences = Sequences.from_lengths([128] * (rows // 128), device)
    names = ["fused", "torch"] + ([] if backend.apex_missing() or device.type == "cpu" else ["apex"])
    for name in names:
        backend.choose(f"layer_norm={name}", device)

        def fused(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return add_layer_norm(x, residual, weight, bias, 1e-12, DROPOUT, sequences)[0]

        yield name, forward_backward(fused, [x, residual, weight, bias])


def attention_methods(
    batch: int, heads: int, length: int, size: int, dtype: torch.dtype, device: torch.device
) -> Iterable[tuple[str, Callable[[], object]]]:
    inputs = [
        torch.randn(batch * length, heads, size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
    ]
    sequences = Sequences.from_lengths([length] * batch, device)
    for name in ("fused", "torch"):
        backend.choose(f"attention={name}", device)
        yield name, forward_backward(lambda q, k, v: attention(q, k, v, sequences, sequences, False, DROPOUT), inputs)
    padded = [x.detach().unflatten(0, (batch, length)).transpose(1, 2).contiguous().requires_grad_() for x in inputs]
    for kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):

        def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: SDPBackend = kind) -> torch.Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, dropout_p=DROPOUT)

        try:
            yield f"SDPA {kind.name.lower()}", forward_backward(sdpa, padded)
        except RuntimeError:  # this chip or type has no such kernel
            continue


def table(title: str, methods: Iterable[tuple[str, Callable[[], object]]], cost: static_model.Cost, device: torch.device,
          peak: tuple[float, float], repeats: int) -> None:  # fmt: skip
    times = {name: milliseconds(step, device, repeats) for name, step in methods}
    for name, ms in times.items():
        copy, matmul = cost.bytes / ms / 1e6 / peak[0], cost.flops / ms / 1e9 / peak[1]
        fractions = f"{copy:.0%} of copy, {matmul:.0%} of matmul" if name == "fused" else ""
        print(f"| {title} | {name} | {ms:.3f} | {ms / times['fused']:.2f} | {fractions} |")


def main() -> int:
    parser = argparse.ArgumentParser(description="Times of the operators of opt_ds and PyTorch.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    missing = compiled.missing_on(device)
    if missing:
        print(f"the operators of opt_ds do not run on {device}: {missing}", file=sys.stderr)
        return 2
    small = device.type == "cpu"
    types = (
        [torch.float32]
        if small
        else [torch.float16] + [torch.bfloat16] * (torch.cuda.get_device_capability(device)[0] >= 8)
    )
    name = f"CPU, {torch.get_num_threads()} threads" if small else torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}")
    for dtype in types:
        peak = limits(device, dtype, arguments.repeats)
        print(f"\n{dtype}: copy {peak[0]:.0f} GB/s, matmul {peak[1]:.2f} TFLOP/s\n")
        print(
            "| operator, forward + backward, dropout 0.1 | backend | ms | relative to opt_ds | opt_ds: of the device's limits |"
        )
        print("|---|---|---|---|---|")
        for rows, width in static_model.LAYER_NORM_SHAPES:
            rows = rows // 8 if small else rows
            cost = sum(static_model.layer_norm_fused(rows, width, static_model.GPUS[0]), static_model.Cost(0))
            methods = layer_norm_methods(width, rows, dtype, device)
            table(f"add + LayerNorm {rows} x {width}", methods, cost, device, peak, arguments.repeats)
        for batch, heads, length, size in static_model.ATTENTION_SHAPES:
            batch = 2 if small else batch
            cost = sum(static_model.attention_fused(batch, heads, length, size), static_model.Cost(0))
            methods = attention_methods(batch, heads, length, size, dtype, device)
            table(f"attention {batch} x {heads} x {length} x {size}", methods, cost, device, peak, arguments.repeats)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
