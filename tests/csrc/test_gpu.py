"""The kernels on a real GPU (`make test-gpu`): the same bits of dropout as on the CPU, results as exact as PyTorch's, gradients
that come out the same twice. Without a GPU these are reported as skipped."""

import pytest
import torch

from opt_ds.ops import compiled
from opt_ds.ops.sequences import Sequences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]
KEY, LAYER_ID = 0x0123_4567_89AB_CDEF, 11
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 130, 257]


def types() -> list[torch.dtype]:
    newer = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return [torch.float32, torch.float16] + [torch.bfloat16] * newer


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    if torch.cuda.is_available():
        reason = compiled.missing_on(torch.device("cuda"))
        assert reason == "", f"the kernels are not there: {reason}"


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    return (found.cpu().double() - true).abs().max().item()


def close(found: torch.Tensor, peer: torch.Tensor, true: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Within three times the error of PyTorch's operators at the same precision, and a few units in the last place."""
    allowed = 3 * error(peer, true) + 8 * torch.finfo(dtype).eps * max(1.0, true.abs().max().item())
    assert error(found, true) <= allowed, what


def weights_like(out: torch.Tensor) -> torch.Tensor:
    """What the outputs are summed with. Random: sums of gradients over rows then do not cancel to nearly nothing."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)


def layer_norm(inputs: list[torch.Tensor], keys: torch.Tensor, dropout: float) -> list[torch.Tensor]:
    normed, total, _, _ = torch.ops.opt_ds.layer_norm(*inputs, 1e-5, keys, dropout, KEY, LAYER_ID)
    weights = weights_like(normed)
    return [normed, total, *torch.autograd.grad((normed * weights + total * weights.flip(0)).sum(), inputs)]


@pytest.mark.parametrize("dtype", types())
@pytest.mark.parametrize("width", [64, 100, 768, 1024, 1032, 4096, 8192, 8200])
def test_layer_norm(dtype: torch.dtype, width: int) -> None:
    rows, generator = 300, torch.Generator().manual_seed(0)
    keys = Sequences.from_lengths([rows // 2, rows // 2], sample_index=[7, 3]).row_keys
    shapes = [(rows, width), (width,), (rows, width), (width,), (width,)]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    truth = layer_norm([x.double().requires_grad_() for x in values], keys, 0.1)
    peers = layer_norm([x.requires_grad_() for x in values], keys, 0.1)
    inputs = [x.detach().cuda().requires_grad_() for x in values]
    found, again = (layer_norm(inputs, keys.cuda(), 0.1) for _ in range(2))
    for which, (own, second, peer, true) in enumerate(zip(found, again, peers, truth, strict=True)):
        assert torch.equal(own, second), "deterministic"
        what = ("normed", "total", "d_x", "d_input_bias", "d_residual", "d_weight", "d_bias")[which]
        close(own, peer, true.detach(), dtype, what)


def run_attention(
    inputs: list[torch.Tensor], queries: Sequences, keys: Sequences, causal: bool, dropout: float
) -> list[torch.Tensor]:
    device = inputs[0].device
    q, k = queries.to(device), keys.to(device)
    out, _ = torch.ops.opt_ds.attention(
        *inputs, q.cu_seqlens, k.cu_seqlens, q.max_length, k.max_length, inputs[0].shape[-1] ** -0.5, causal,
        q.sample_index_or_range, dropout, KEY, LAYER_ID,
    )  # fmt: skip
    weights = weights_like(out)
    return [out, *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("dtype", types())
@pytest.mark.parametrize("size", [32, 64, 128, 40])
@pytest.mark.parametrize(("key_lengths", "causal"), [(LENGTHS, False), (LENGTHS, True), ([*LENGTHS[::-1][:-1], 0], False)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention(dtype: torch.dtype, size: int, key_lengths: list[int], causal: bool, dropout: float) -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(sum(n), 3, size, generator=generator).to(dtype) for n in (LENGTHS, key_lengths, key_lengths)]
    queries, keys = Sequences.from_lengths(LENGTHS), Sequences.from_lengths(key_lengths)
    truth = run_attention([x.double().requires_grad_() for x in values], queries, keys, causal, dropout)
    peers = run_attention([x.requires_grad_() for x in values], queries, keys, causal, dropout)
    inputs = [x.detach().cuda().requires_grad_() for x in values]
    found, again = (run_attention(inputs, queries, keys, causal, dropout) for _ in range(2))
    for which, (own, second, peer, true) in enumerate(zip(found, again, peers, truth, strict=True)):
        assert torch.equal(own, second), "deterministic"
        close(own, peer, true.detach(), dtype, ("out", "d_q", "d_k", "d_v")[which])


@pytest.mark.parametrize("dtype", types())
@pytest.mark.parametrize("width", [64, 70, 768])
def test_dropout_has_the_cpus_bits(dtype: torch.dtype, width: int) -> None:
    keys = Sequences.from_lengths([300, 200], sample_index=[7, 3]).row_keys
    ones = torch.ones(500, width, dtype=dtype)
    found = torch.ops.opt_ds.dropout(ones.cuda(), keys.cuda(), 0.3, KEY, LAYER_ID).cpu()
    assert torch.equal(found, torch.ops.opt_ds.dropout(ones, keys, 0.3, KEY, LAYER_ID))


def test_the_current_stream_and_device_are_used() -> None:
    x = torch.randn(4096, 1024, device="cuda")
    weight = torch.ones(1024, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        y = x
        for _ in range(20):
            y = torch.ops.opt_ds.layer_norm(y, None, None, weight, weight, 1e-5, None, 0.0, 0, 0)[0] * 1.5
    stream.synchronize()
    z = x
    for _ in range(20):
        z = torch.nn.functional.layer_norm(z, (1024,), weight, weight) * 1.5
    assert torch.allclose(y, z, atol=1e-3)
