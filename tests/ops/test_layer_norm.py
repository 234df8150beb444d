"""LayerNorm, alone and after dropout and residual, held to a float64 computation and to PyTorch's own fp32 error."""

import pytest
import torch
import torch.nn.functional as F

from opt_ds.ops.layer_norm import add_layer_norm, layer_norm

EPS = 1e-12


def reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple:
    total = x + residual
    mean = total.mean(-1, keepdim=True)
    variance = (total - mean).square().mean(-1, keepdim=True)
    return (total - mean) / torch.sqrt(variance + eps) * weight + bias, total


def make(shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    rows = [torch.randn(shape, generator=generator) * scale + shift for _ in range(2)]
    return [*rows, *(torch.randn(shape[-1], generator=generator) + 1 for _ in range(2))]


def with_gradients(function, inputs: list[torch.Tensor], eps: float) -> list[torch.Tensor]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*inputs, eps)
    generator = torch.Generator().manual_seed(9)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outputs)
    return [x.detach().double() for x in (*outputs, *torch.autograd.grad(loss, inputs))]


def pytorchs(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> tuple:
    return F.layer_norm(x + residual, weight.shape, weight, bias, eps), x + residual


@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (33, 96), (2, 7, 16), (0, 8), (300, 24)])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1e3, 0.0), (1.0, 30.0), (1e-3, 0.0)])
def test_output_and_gradients_are_as_exact_as_pytorchs(shape: tuple[int, ...], scale: float, shift: float) -> None:
    inputs = make(shape, scale, shift)
    truth = with_gradients(reference, [x.double() for x in inputs], EPS)
    found, yardstick = (with_gradients(f, inputs, EPS) for f in (add_layer_norm, pytorchs))
    for which, (true, own, torchs) in enumerate(zip(truth, found, yardstick, strict=True)):
        assert own.shape == true.shape
        if true.numel():
            largest = max(1.0, true.abs().max().item())
            allowed = max((3 if which > 1 else 2) * (torchs - true).abs().max().item(), 2e-6 * largest)
            assert (own - true).abs().max().item() <= allowed


def test_total_is_residual_plus_input_and_its_gradient_flows_twice() -> None:
    x, residual, weight, bias = (t.requires_grad_() for t in make((4, 8)))
    normed, total = add_layer_norm(x, residual, weight, bias, EPS)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, layer_norm(total, weight, bias, EPS))
    (from_total,) = torch.autograd.grad(total.sum(), x, retain_graph=True)
    assert torch.equal(from_total, torch.ones_like(x))


def test_a_constant_row_gives_the_bias() -> None:
    weight, bias = torch.full((8,), 2.0), torch.arange(8.0)
    found = layer_norm(torch.full((2, 8), 4.0), weight, bias, 1e-5)
    assert torch.allclose(found, bias.expand(2, 8))


def test_non_contiguous_rows() -> None:
    x, residual, weight, bias = make((16, 8))
    turned = x.t().contiguous().t()
    assert not turned.is_contiguous()
    assert torch.equal(
        add_layer_norm(turned, residual, weight, bias, EPS)[0], add_layer_norm(x, residual, weight, bias, EPS)[0]
    )


def test_dropout_acts_on_the_input_and_not_on_the_residual() -> None:
    torch.manual_seed(0)
    x, residual, weight, bias = torch.ones(500, 40), torch.full((500, 40), 10.0), torch.ones(40), torch.zeros(40)
    normed, total = add_layer_norm(x, residual, weight, bias, EPS, dropout=0.2)
    added = (total - residual).unique()
    assert torch.allclose(added, torch.tensor([0.0, 1.25]), atol=1e-5)
    assert (total > 10.5).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert torch.equal(normed, layer_norm(total, weight, bias, EPS))
