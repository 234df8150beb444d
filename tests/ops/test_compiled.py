"""The compiled operators: their CPU reference against autograd in float64, the emulated kernels against the reference and
PyTorch."""

import math

import numpy as np
import pytest
import torch

from opt_ds.ops import compiled
from opt_ds.ops.sequences import Sequences

KEY, LAYER_ID = 0x0123_4567_89AB_CDEF, 11


@pytest.fixture(autouse=True, scope="module")
def libraries() -> None:
    assert compiled.load() == "" and compiled.load("opt_ds_emulator") == "", "the CPU side is always built"


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def row_keys(lengths: list[int]) -> torch.Tensor:
    return Sequences.from_lengths(lengths, sample_index=[7 * i + 3 for i in range(len(lengths))]).row_keys


def layer_norm_inputs(width: int, dtype: torch.dtype, rows: int = 6) -> list[torch.Tensor]:
    """x, bias of x, residual, weight, bias"""
    shapes = [(rows, width), (width,), (rows, width), (width,), (width,)]
    return [draw(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]


def run_layer_norm(library: str, inputs: list[torch.Tensor], dropout: float, eps: float = 1e-5) -> list[torch.Tensor]:
    """normed, total, then the gradients of a fixed weighting of both; in float64."""
    keys = row_keys([2, len(inputs[0]) - 2])
    normed, total, _, _ = getattr(torch.ops, library).layer_norm(*inputs, eps, keys, dropout, KEY, LAYER_ID)
    loss = (normed * draw(*normed.shape, seed=8).to(normed.dtype) + total * draw(*total.shape, seed=9).to(total.dtype)).sum()
    return [x.detach().double() for x in (normed, total, *torch.autograd.grad(loss, inputs))]


def attention_inputs(
    ql: list[int], kl: list[int], size: int, dtype: torch.dtype, amplitude: float = 1.0, heads: int = 2
) -> list[torch.Tensor]:
    inputs = [draw(sum(n), heads, size, seed=i) for i, n in enumerate((ql, kl, kl))]
    inputs[0] *= amplitude
    return [x.to(dtype).requires_grad_() for x in inputs]


def run_attention(
    library: str, inputs: list[torch.Tensor], ql: list[int], kl: list[int], causal: bool, dropout: float
) -> list[torch.Tensor]:
    """out, then the gradients of a fixed weighting of it; in float64."""
    queries, keys = (Sequences.from_lengths(n, sample_index=range(4, 4 + len(n))) for n in (ql, kl))
    scale = inputs[0].shape[-1] ** -0.5
    out, _ = getattr(torch.ops, library).attention(
        *inputs,
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.max_length,
        keys.max_length,
        scale,
        causal,
        queries.sample_index,
        dropout,
        KEY,
        LAYER_ID,
    )
    gradients = torch.autograd.grad((out * draw(*out.shape, seed=9).to(out.dtype)).sum(), inputs)
    return [x.detach().double() for x in (out, *gradients)]


def philox(key: int, counter: tuple[int, ...], rounds: int = 7) -> list[int]:
    """Philox4x32 (Salmon et al. 2011), implemented from the paper."""
    key0, key1 = key & 0xFFFFFFFF, key >> 32
    c = list(counter)
    for _ in range(rounds):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [product1 >> 32 ^ c[1] ^ key0, product1 & 0xFFFFFFFF, product0 >> 32 ^ c[3] ^ key1, product0 & 0xFFFFFFFF]
        key0, key1 = key0 + 0x9E3779B9 & 0xFFFFFFFF, key1 + 0xBB67AE85 & 0xFFFFFFFF
    return c


def test_philox_is_philox() -> None:
    """Known answers of the paper's implementation (Random123, kat_vectors: philox4x32 10)."""
    assert philox(0, (0, 0, 0, 0), rounds=10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(0x299F31D0_A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), rounds=10) == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    ]  # fmt: skip


def kept_by_hand(sample_index: int, position: int, column: int, probability: float, head: int = 0) -> bool:
    words = [
        w
        for call in range(4)
        for w in philox(KEY, (4 * (column // 32) + call, position, sample_index, LAYER_ID + (head << 16)))
    ]
    number = sum((word >> (column % 32) & 1) << i for i, word in enumerate(words))
    return number >= round(probability * 65536)


@pytest.mark.parametrize("library", ["opt_ds", "opt_ds_emulator"])
@pytest.mark.parametrize("width", [64, 70])
def test_dropout_is_the_documented_function_of_the_place(library: str, width: int) -> None:
    keys = row_keys([3, 2])
    y = getattr(torch.ops, library).dropout(torch.ones(5, width), keys, 0.3, KEY, LAYER_ID)
    by_hand = [
        [kept_by_hand(sample_index, position, column, 0.3) for column in range(width)]
        for sample_index, position in keys.tolist()
    ]
    assert torch.equal(y != 0, torch.tensor(by_hand))
    assert torch.allclose(y[y != 0], torch.tensor(1 / (1 - round(0.3 * 65536) / 65536)))


@pytest.mark.parametrize("library", ["opt_ds", "opt_ds_emulator"])
@pytest.mark.parametrize("size", [32, 64, 128, 40])
def test_attention_drops_the_same_probabilities_in_every_tiling(library: str, size: int) -> None:
    """With equal scores and the identity as values, the output is the mask; d_v of ones is its column sums."""
    length = size  # the number of keys equals that of dims
    q, k = torch.zeros(length, 1, size), torch.zeros(length, 1, size)
    v = torch.eye(size)[:, None].clone()
    q, k, v = (x.to(torch.float16 if library == "opt_ds_emulator" else torch.float32).requires_grad_() for x in (q, k, v))
    cu, sample_index = torch.tensor([0, length], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    out, _ = getattr(torch.ops, library).attention(
        q, k, v, cu, cu, length, length, 1.0, False, sample_index, 0.4, KEY, LAYER_ID
    )
    by_hand = torch.tensor([[kept_by_hand(9, i, j, 0.4) for j in range(length)] for i in range(length)])
    assert torch.equal(out[:, 0] != 0, by_hand), "forward"
    (d_v,) = torch.autograd.grad(out.sum(), v)
    expected = by_hand.sum(0) / length / (1 - round(0.4 * 65536) / 65536)
    assert torch.allclose(d_v[:, 0, 0].double(), expected.double(), rtol=4e-3), "backward, from the keys' side"


def test_the_mask_depends_on_key_layer_sample_position_and_head_alone() -> None:
    def mask(key: int = KEY, layer_id: int = LAYER_ID, keys: torch.Tensor | None = None) -> torch.Tensor:
        keys = row_keys([4]) if keys is None else keys
        return torch.ops.opt_ds.dropout(torch.ones(4, 64), keys, 0.5, key, layer_id) != 0

    other_sample = torch.tensor([[4, i] for i in range(4)], dtype=torch.int32)
    masks = [mask(), mask(key=KEY + 1), mask(layer_id=LAYER_ID + 1), mask(keys=other_sample)]
    for i, one in enumerate(masks):
        for other in masks[i + 1 :]:
            assert 0.3 < (one == other).double().mean() < 0.7
    shuffled = torch.tensor([2, 0, 3, 1])
    assert torch.equal(mask(keys=row_keys([4])[shuffled]), mask()[shuffled]), "rows keep their bits wherever they lie"
    q = torch.zeros(64, 3, 32)
    cu, sample_index = torch.tensor([0, 64], dtype=torch.int32), torch.tensor([9], dtype=torch.int32)
    values = torch.eye(64, 32)[:, None].expand(64, 3, 32).contiguous()
    out, _ = torch.ops.opt_ds.attention(q, q, values, cu, cu, 64, 64, 1.0, False, sample_index, 0.5, KEY, LAYER_ID)
    assert not torch.equal(out[:, 0], out[:, 1]) and not torch.equal(out[:, 1], out[:, 2])


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
def test_dropout_statistics(probability: float) -> None:
    rows, width = 2000, 768
    kept = torch.ops.opt_ds.dropout(torch.ones(rows, width), row_keys([rows // 4] * 4), probability, KEY, LAYER_ID) != 0
    share, n = 1 - probability, rows * width
    assert abs(kept.double().mean().item() - share) < 4.5 * math.sqrt(share * probability / n) + 1e-5
    for axis, length in ((0, rows), (1, width)):  # neither a row nor a column is favoured
        spread = kept.double().mean(axis).std().item()
        assert spread == pytest.approx(math.sqrt(share * probability / length), rel=0.15)
    centred = (kept.double() - share).numpy()
    for shift in ((0, 1), (0, 8), (0, 32), (1, 0), (1, 1), (500, 0)):  # neighbours are independent
        correlation = (centred * np.roll(centred, shift, (0, 1))).mean() / (share * probability)
        assert abs(correlation) < 4.5 / math.sqrt(n), shift


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layer_norm_passes_gradcheck(dropout: float) -> None:
    keys = row_keys([2, 2])

    def function(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.opt_ds.layer_norm(*inputs, 1e-5, keys, dropout, KEY, LAYER_ID)[:2]

    assert torch.autograd.gradcheck(function, layer_norm_inputs(5, torch.float64, rows=4))


@pytest.mark.parametrize(("ql", "kl", "causal"), [([3, 2], [3, 2], True), ([2, 1, 2], [3, 0, 2], False)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_passes_gradcheck(ql: list[int], kl: list[int], causal: bool, dropout: float) -> None:
    queries, keys = Sequences.from_lengths(ql), Sequences.from_lengths(kl)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.opt_ds.attention(
            q, k, v, queries.cu_seqlens, keys.cu_seqlens, queries.max_length, keys.max_length, 0.6, causal,
            queries.sample_index_or_range, dropout, KEY, LAYER_ID,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(function, attention_inputs(ql, kl, 4, torch.float64))


@pytest.mark.parametrize("library", ["opt_ds", "opt_ds_emulator"])
def test_opcheck(library: str) -> None:
    ops = getattr(torch.ops, library)
    x, input_bias, residual, weight, bias = layer_norm_inputs(64, torch.float32)
    keys, none = row_keys([2, 4]), None
    for arguments in (
        (x, input_bias, residual, weight, bias, 1e-5, keys, 0.1, KEY, LAYER_ID),
        (x, none, none, weight, bias, 1e-5, none, 0.0, 0, 0),
    ):
        torch.library.opcheck(ops.layer_norm.default, arguments)
    torch.library.opcheck(ops.dropout.default, (x, keys, 0.1, KEY, LAYER_ID))
    ql = [5, 8]
    q, k, v = attention_inputs(ql, ql, 32, torch.float32)
    queries = Sequences.from_lengths(ql)
    cu, sample_index = queries.cu_seqlens, queries.sample_index_or_range
    torch.library.opcheck(ops.attention.default, (q, k, v, cu, cu, 8, 8, 0.2, True, sample_index, 0.1, KEY, LAYER_ID))


def test_torch_compile_sees_whole_graphs() -> None:
    inputs, keys = layer_norm_inputs(64, torch.float32), row_keys([2, 4])

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.opt_ds.layer_norm(*inputs, 1e-5, keys, 0.1, KEY, LAYER_ID)[0].square().sum()

    eager, found = function(*inputs), torch.compile(function, backend="aot_eager", fullgraph=True)(*inputs)
    assert torch.equal(eager, found)
    for a, b in zip(torch.autograd.grad(eager, inputs), torch.autograd.grad(found, inputs), strict=True):
        assert torch.equal(a, b)


def unfused_layer_norm(inputs: list[torch.Tensor], mask: torch.Tensor, eps: float = 1e-5) -> list[torch.Tensor]:
    x, input_bias, residual, weight, bias = inputs
    total = residual + (x + input_bias) * mask
    normed = torch.nn.functional.layer_norm(total, weight.shape, weight, bias, eps)
    loss = (normed * draw(*normed.shape, seed=8).to(normed.dtype) + total * draw(*total.shape, seed=9).to(total.dtype)).sum()
    return [y.detach().double() for y in (normed, total, *torch.autograd.grad(loss, inputs))]


@pytest.mark.parametrize("library", ["opt_ds", "opt_ds_emulator"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 192, 768, 100])
def test_layer_norm_is_as_exact_as_pytorchs(library: str, dtype: torch.dtype, width: int) -> None:
    inputs = layer_norm_inputs(width, dtype, rows=9)
    mask = torch.ops.opt_ds.dropout(torch.ones(9, width, dtype=torch.float64), row_keys([2, 7]), 0.1, KEY, LAYER_ID)
    truth = unfused_layer_norm([x.detach().double().requires_grad_() for x in inputs], mask)
    torchs = unfused_layer_norm(inputs, mask.to(dtype))
    found = run_layer_norm(library, inputs, 0.1)
    for which, (true, own, yardstick) in enumerate(zip(truth, found, torchs, strict=True)):
        allowed = (3 if which > 1 else 2) * (yardstick - true).abs().max().item() + torch.finfo(
            dtype
        ).eps * true.abs().max().item() / 4
        assert (own - true).abs().max().item() <= allowed, which


def unfused_attention(inputs: list[torch.Tensor], ql: list[int], kl: list[int], causal: bool) -> list[torch.Tensor]:
    parts = []
    for q, k, v in zip(*(x.split(n) for x, n in zip(inputs, (ql, kl, kl), strict=True)), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        if causal:
            scores = scores.masked_fill(torch.ones(len(q), len(k), dtype=torch.bool).triu(1), -math.inf)
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v) if len(k) else q * 0)
    out = torch.cat(parts)
    gradients = torch.autograd.grad((out * draw(*out.shape, seed=9).to(out.dtype)).sum(), inputs)
    return [x.detach().double() for x in (out, *gradients)]


SHAPES = {  # queries, keys, causal; the model's: encoder, text decoder, its memory
    "encoder": ([37, 64, 5], [37, 64, 5], False),
    "text decoder": ([1, 24, 9, 17], [1, 24, 9, 17], True),
    "image decoder": ([64], [64], True),
    "memory": ([16, 3, 2], [65, 15, 33], False),
    "no keys": ([4, 2], [0, 7], False),
}


@pytest.mark.parametrize("library", ["opt_ds", "opt_ds_emulator"])
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 64), (torch.float16, 32), (torch.float32, 48), (torch.bfloat16, 64)])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_as_exact_as_pytorchs(library: str, dtype: torch.dtype, size: int, shape: str) -> None:
    ql, kl, causal = SHAPES[shape]
    inputs = attention_inputs(ql, kl, size, dtype)
    truth = unfused_attention([x.detach().double().requires_grad_() for x in inputs], ql, kl, causal)
    torchs = unfused_attention(inputs, ql, kl, causal)
    found = run_attention(library, inputs, ql, kl, causal, 0.0)
    for which, (true, own, yardstick) in enumerate(zip(truth, found, torchs, strict=True)):
        allowed = (3 if which else 2) * (yardstick - true).abs().max().item() + torch.finfo(
            dtype
        ).eps * true.abs().max().item() / 4
        assert (own - true).abs().max().item() <= allowed, ("out", "d_q", "d_k", "d_v")[which]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_emulated_kernels_are_the_reference_with_dropout(shape: str) -> None:
    ql, kl, causal = SHAPES[shape]
    inputs = attention_inputs(ql, kl, 64, torch.float16)
    found, expected = (run_attention(library, inputs, ql, kl, causal, 0.2) for library in ("opt_ds_emulator", "opt_ds"))
    for own, true in zip(found, expected, strict=True):
        assert (own - true).abs().max() <= 4e-3 * max(1.0, true.abs().max().item())


def test_a_wrong_call_is_refused() -> None:
    x, _, _, weight, bias = layer_norm_inputs(64, torch.float32)
    emulator = torch.ops.opt_ds_emulator
    with pytest.raises(RuntimeError, match="must agree"):
        emulator.layer_norm(x, None, None, weight.half(), bias, 1e-5, None, 0.0, 0, 0)
    with pytest.raises(RuntimeError, match="which rows"):
        emulator.layer_norm(x, None, x, weight, bias, 1e-5, None, 0.1, 0, 0)
    with pytest.raises(RuntimeError, match="no kernel for this type or shape"):
        q = torch.zeros(2, 1, 320)
        cu = torch.tensor([0, 2], dtype=torch.int32)
        emulator.attention(q, q, q, cu, cu, 2, 2, 1.0, False, None, 0.0, 0, 0)
