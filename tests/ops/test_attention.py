"""Variable-length attention held to a float64 computation, sequence by sequence, and to PyTorch's own error at that precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from opt_ds.ops.attention import attention, cached_attention
from opt_ds.ops.sequences import Sequences

HEADS, WIDTH = 3, 8
AROUND_TILES = [1, 2, 15, 16, 17, 33]
CASES = {
    **{f"length {n}": ([n], [n], False) for n in AROUND_TILES},
    **{f"causal {n}": ([n], [n], True) for n in AROUND_TILES},
    "ragged": ([5, 1, 33, 16, 2], [5, 1, 33, 16, 2], False),
    "causal ragged": ([5, 1, 33, 16, 2], [5, 1, 33, 16, 2], True),
    "cross": ([4, 17, 1, 9], [16, 3, 33, 1], False),
}


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ql: list[int], kl: list[int], causal: bool
) -> torch.Tensor:
    """Return softmax(q kᵀ / √d) v, computed per sequence in the dtype of its inputs."""
    outputs = []
    for qs, ks, vs in zip(q.split(ql), k.split(kl), v.split(kl), strict=True):
        if not len(ks):
            outputs.append(qs * 0 + (ks.sum() + vs.sum()) * 0)
            continue
        scores = torch.einsum("qhd,khd->hqk", qs, ks) / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.arange(len(ks))[None, :] > torch.arange(len(qs))[:, None], float("-inf"))
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        outputs.append(torch.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdim=True), vs))
    return torch.cat(outputs)


def max_score(q: torch.Tensor, k: torch.Tensor, ql: list[int], kl: list[int]) -> float:
    pairs = zip(q.double().split(ql), k.double().split(kl), strict=True)
    return max(torch.einsum("qhd,khd->hqk", *pair).abs().max().item() for pair in pairs) / math.sqrt(q.shape[-1])


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ql: list[int], kl: list[int], causal: bool) -> torch.Tensor:
    """PyTorch's own attention, per sequence, in the dtype of its inputs: the yardstick of the error."""
    parts = zip(q.split(ql), k.split(kl), v.split(kl), strict=True)
    heads_first = ((qs.transpose(0, 1), ks.transpose(0, 1), vs.transpose(0, 1)) for qs, ks, vs in parts)
    return torch.cat([F.scaled_dot_product_attention(*p, is_causal=causal).transpose(0, 1) for p in heads_first])


def make(ql: list[int], kl: list[int], scale: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(n), HEADS, WIDTH, generator=generator) * scale for n in (ql, kl, kl)]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ql: list[int], kl: list[int], causal: bool) -> torch.Tensor:
    queries = Sequences.from_lengths(ql)
    return attention(q, k, v, queries, queries if ql == kl else Sequences.from_lengths(kl), causal)


def with_gradients(function, inputs: list[torch.Tensor], *arguments) -> list[torch.Tensor]:
    """The output, then the gradients of a fixed weighting of it to each input; in float64."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*inputs, *arguments)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(output.dtype)
    return [x.detach().double() for x in (output, *torch.autograd.grad((output * weights).sum(), inputs))]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradients_are_as_exact_as_pytorchs(name: str, scale: float, dtype: torch.dtype) -> None:
    ql, kl, causal = CASES[name]
    inputs = [x.to(dtype) for x in make(ql, kl, scale)]
    truth = with_gradients(reference, [x.double() for x in inputs], ql, kl, causal)
    largest_score = max(1.0, max_score(*inputs[:2], ql, kl))
    own, yardstick = (with_gradients(f, inputs, ql, kl, causal) for f in (ours, sdpa))
    for which, (true, found, torchs) in enumerate(zip(truth, own, yardstick, strict=True)):
        factor = 3 if which else 2
        # a softmax turns a score's rounding, eps · |score|, into a relative error of its result
        floor = torch.finfo(dtype).eps * largest_score * max(1.0, true.abs().max().item())
        allowed = max(factor * (torchs - true).abs().max().item(), floor)
        assert (found - true).abs().max().item() <= allowed, ("output", "dq", "dk", "dv")[which]


def test_a_query_without_keys_gives_0_and_disturbs_nothing() -> None:
    ql, kl = [3, 4, 2], [5, 0, 2]
    inputs = make(ql, kl)
    output, dq, dk, dv = with_gradients(ours, inputs, ql, kl, False)
    truth = with_gradients(reference, [x.double() for x in inputs], ql, kl, False)
    assert (output[3:7] == 0).all() and (dq[3:7] == 0).all()
    for found, true in zip((output, dq, dk, dv), truth, strict=True):
        assert torch.isfinite(found).all() and (found - true).abs().max() < 1e-5


@pytest.mark.parametrize("kl", [[4, 0], [0, 0], [2, 3]])
def test_sequences_without_queries(kl: list[int]) -> None:
    for ql in ([0, 0], [2, 0]):
        inputs = make(ql, kl)
        truth = with_gradients(reference, [x.double() for x in inputs], ql, kl, False)
        for found, true in zip(with_gradients(ours, inputs, ql, kl, False), truth, strict=True):
            assert torch.allclose(found, true, atol=1e-5)


def test_no_sequences_at_all_still_give_a_gradient() -> None:
    inputs = [torch.zeros(0, HEADS, WIDTH, requires_grad=True) for _ in range(3)]
    none = Sequences.from_lengths([])
    attention(*inputs, none, none).sum().backward()
    assert all(x.grad is not None and x.grad.shape == (0, HEADS, WIDTH) for x in inputs)


def test_huge_scores_saturate_without_overflow() -> None:
    ql = [7, 3]
    q, k, v = make(ql, ql, seed=3)
    found = with_gradients(ours, [q * 1e8, k * 1e8, v], ql, ql, True)
    assert all(torch.isfinite(x).all() for x in found)
    truth = reference((q * 1e8).double(), (k * 1e8).double(), v.double(), ql, ql, True)
    assert (found[0] - truth).abs().max() < 1e-5
    weights_sum_to_1 = ours(q * 1e8, k * 1e8, torch.ones_like(v), ql, ql, False)
    assert torch.allclose(weights_sum_to_1, torch.ones_like(v))


def test_non_contiguous_inputs() -> None:
    ql = [4, 9]
    fused = torch.randn(13, 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    views = fused.unbind(1)
    assert not views[0].is_contiguous()
    assert torch.equal(ours(*views, ql, ql, True), ours(*(x.contiguous() for x in views), ql, ql, True))


def test_sequences_do_not_see_each_other() -> None:
    ql = [4, 6, 3]
    q, k, v = make(ql, ql)
    before = ours(q, k, v, ql, ql, False)
    k[4:10], v[4:10] = 100.0, -100.0
    after = ours(q, k, v, ql, ql, False)
    assert torch.equal(before[:4], after[:4]) and torch.equal(before[10:], after[10:])
    assert not torch.allclose(before[4:10], after[4:10])


def test_causal_attention_sees_no_later_key() -> None:
    q, k, v = make([9], [9])
    before = ours(q, k, v, [9], [9], True)
    k[5:], v[5:] = 50.0, 50.0
    assert torch.equal(before[:5], ours(q, k, v, [9], [9], True)[:5])


def test_bf16_scores_are_rounded_and_nothing_else_is_lost() -> None:
    ql = [33, 16]
    inputs = [x.bfloat16() for x in make(ql, ql)]
    truth = reference(*(x.double() for x in inputs), ql, ql, False)
    found = ours(*inputs, ql, ql, False)
    assert found.dtype == torch.bfloat16
    rounding = torch.finfo(torch.bfloat16).eps / 2
    allowed = 2 * rounding * max_score(*inputs[:2], ql, ql) * truth.abs().max().item()  # of the query, and of the score
    assert (found.double() - truth).abs().max().item() <= allowed


def test_dropout_acts_on_the_probabilities_and_keeps_their_mean() -> None:
    torch.manual_seed(0)
    sequences = Sequences.from_lengths([40] * 50)
    q, k = torch.zeros(2000, HEADS, WIDTH), torch.zeros(2000, HEADS, WIDTH)
    output = attention(q, k, torch.ones(2000, HEADS, WIDTH), sequences, sequences, dropout=0.25)
    kept = output[:, :, 0] * 40 * 0.75  # each of 40 equal probabilities is dropped, or grows by 1 / 0.75
    assert torch.allclose(kept, kept.round(), atol=1e-3), "a whole number of probabilities stays"
    assert output.mean().item() == pytest.approx(1.0, abs=0.005)
    assert kept.std().item() == pytest.approx(math.sqrt(40 * 0.25 * 0.75), rel=0.05)


def test_cached_attention_is_attention() -> None:
    q, k, v = make([3, 3, 3], [5, 5, 5])
    valid = torch.tensor([[True] * 5, [True, True, False, False, False], [True] * 3 + [False] * 2])
    heads_first = [x.unflatten(0, (3, -1)).transpose(1, 2) for x in (q, k, v)]
    found = cached_attention(*heads_first, valid).transpose(1, 2).flatten(0, 1)
    rows = valid.flatten()
    assert (found - ours(q, k[rows], v[rows], [3, 3, 3], [5, 2, 3], False)).abs().max() < 1e-6
