"""Test the fused linear layer and cross-entropy against the separate ones, in chunks and without rows."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from opt_ds.ops import linear_cross_entropy as module
from opt_ds.ops.linear_cross_entropy import linear_cross_entropy


def make(rows: int, classes: int = 11, width: int = 5, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden, weight, bias = (torch.randn(*shape, generator=generator).to(dtype).requires_grad_()
                            for shape in ((rows, width), (classes, width), (classes,)))  # fmt: skip
    return [hidden, weight, bias, torch.randint(classes, (rows,), generator=generator)]


@pytest.mark.parametrize("rows_of_chunk", [1, 4, 100])
def test_loss_hits_and_gradients_are_those_of_linear_and_cross_entropy(
    rows_of_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 11 * rows_of_chunk)
    hidden, weight, bias, targets = make(13)
    targets[::3] = F.linear(hidden, weight, bias).argmax(-1)[::3]
    scores = F.linear(hidden, weight, bias)
    truth = F.cross_entropy(scores, targets, reduction="sum")
    loss, correct = linear_cross_entropy(hidden, weight, bias, targets)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    assert correct.item() == (scores.argmax(-1) == targets).sum().item() >= 5
    expected = torch.autograd.grad(3.5 * truth, [hidden, weight, bias])
    for own, true in zip(torch.autograd.grad(3.5 * loss, [hidden, weight, bias]), expected, strict=True):
        assert torch.allclose(own, true, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda *x: linear_cross_entropy(*x, targets)[0], (hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_pytorch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 300 * 8)  # eight chunks
    inputs = make(64, 300, 32, dtype)
    hidden, weight, bias, targets = inputs
    exact = [x.detach().double().requires_grad_() for x in inputs[:3]]

    def gradients(loss: torch.Tensor, of: list[torch.Tensor]) -> list[torch.Tensor]:
        return [g.double() for g in torch.autograd.grad(1024 * loss, of)]

    truth = gradients(F.cross_entropy(F.linear(*exact), targets, reduction="sum"), exact)
    torchs = gradients(F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum"), inputs[:3])
    owns = gradients(linear_cross_entropy(hidden, weight, bias, targets)[0], inputs[:3])
    for own, pytorch, true in zip(owns, torchs, truth, strict=True):
        assert (own - true).norm() <= 1.5 * (pytorch - true).norm() + 1e-6 * true.norm()


def test_the_scores_of_all_rows_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    classes, rows = 3000, 64
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * classes * 8)
    hidden, weight, bias, targets = make(rows, classes, 4, torch.float32)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, bias, targets)[0].backward()
    assert classes * 8 <= largest.numel <= classes * 8 * 1.01


def test_without_rows_the_loss_is_0_and_the_weight_gets_no_gradient() -> None:
    hidden, weight, bias, targets = make(0)
    with torch.no_grad():
        weight.fill_(float("inf"))
    loss, correct = linear_cross_entropy(hidden, weight, bias, targets)
    assert loss.item() == correct.item() == 0
    grads = torch.autograd.grad(loss, [hidden, weight, bias], allow_unused=True)
    assert grads[0].shape == hidden.shape and grads[1] is None and torch.equal(grads[2], torch.zeros(11, dtype=torch.float64))
