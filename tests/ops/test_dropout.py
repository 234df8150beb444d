"""Test dropout by PyTorch's generator: kept fraction, scale and gradient, with 16 random bits per element on a CPU."""

import pytest
import torch

from opt_ds.ops.dropout import acting_as, generator_dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_kept_share_and_scale(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    y = generator_dropout(torch.ones(1001, 999, dtype=dtype), probability)
    kept = y != 0
    deviation = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - probability)) < 5 * deviation
    assert y[kept].double().unique().numel() == 1
    assert y[kept][0].item() == pytest.approx(1 / (1 - probability), rel=1e-4 + torch.finfo(dtype).eps)


def test_neighbours_are_dropped_independently() -> None:
    """Four elements share one number of the generator."""
    torch.manual_seed(0)
    kept = (generator_dropout(torch.ones(400_000), 0.5) != 0).double().reshape(-1, 4)
    correlation = torch.corrcoef(kept.T) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / 100_000**0.5


def test_the_gradient_passes_where_the_value_did() -> None:
    torch.manual_seed(0)
    x = torch.randn(37, 5, dtype=torch.float64, requires_grad=True)
    y = generator_dropout(x, 0.3)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient * x.detach(), y.detach())


@pytest.mark.parametrize("shape", [(0, 4), (1,), (3, 1, 7)])
def test_any_shape_the_same_bits_for_the_same_seed(shape: tuple[int, ...]) -> None:
    def draw() -> torch.Tensor:
        torch.manual_seed(5)
        return generator_dropout(torch.ones(shape), 0.5)

    assert draw().shape == shape and torch.equal(draw(), draw())


def test_acting_as_a_gpu_draws_as_pytorch_does() -> None:
    torch.manual_seed(5)
    with acting_as("cuda"):
        found = generator_dropout(torch.ones(9), 0.5)
    torch.manual_seed(5)
    assert torch.equal(found, torch.nn.functional.dropout(torch.ones(9), 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_precision_drops_the_same_elements(dtype: torch.dtype) -> None:
    def kept(dtype: torch.dtype) -> torch.Tensor:
        torch.manual_seed(7)
        return generator_dropout(torch.ones(301, 77, dtype=dtype), 0.1) != 0

    assert torch.equal(kept(dtype), kept(torch.float32))
