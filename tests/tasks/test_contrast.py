"""Contrast of two views: its formulas, gradients and exclusions, against plain PyTorch in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

import opt_ds.tasks.contrast as contrast_module
from opt_ds.tasks.contrast import LOG_SCALE_LIMIT, Contrast, Pair, Temperature, contrast

#: Two views of seven samples and a third view of four of them, in the rows of a table.
VIEWS = 18
FIRST, SECOND = torch.arange(7), torch.arange(13, 6, -1)
THIRD, OF_FIRST = torch.arange(14, 18), torch.tensor([0, 2, 3, 6])
WEIGHT = torch.tensor([0.5, 1.0, 0.5, 0.5, 1.0, 1.0, 0.5])


def table(seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(VIEWS, 5, generator=random, dtype=torch.float64), dim=1)


def keys() -> torch.Tensor:
    """Samples 1 and 4 have the same text, 2 and 6 the same image. Samples 0 and 3 have neither."""
    of_sample = torch.tensor([[0, 0], [5, 1], [7, 9], [0, 0], [5, 2], [8, 3], [6, 9]])
    found = torch.zeros(VIEWS, 2, dtype=torch.int64)
    found[FIRST], found[SECOND], found[THIRD] = of_sample, of_sample, of_sample[OF_FIRST]
    return found


def temperature(log_scale: float = 1.3, bias: float = -2.0) -> Temperature:
    return Temperature(torch.tensor([log_scale]), torch.tensor([bias]))


def pairs() -> list[Pair]:
    return [Pair(FIRST, SECOND, WEIGHT), Pair(FIRST[OF_FIRST], THIRD, WEIGHT[OF_FIRST])]


def expected(loss: str, log_scale: float = 1.3) -> tuple[torch.Tensor, ...]:
    """Loss, and gradients of the table, the logarithm of the scale and the bias, sample by sample."""
    vectors = table().requires_grad_()
    scale = torch.tensor([log_scale], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    total = torch.zeros(1, dtype=torch.float64)
    same = [{1, 4}, {2, 6}]
    for samples, rows, others in ((range(7), FIRST, SECOND), (OF_FIRST.tolist(), FIRST[OF_FIRST], THIRD)):
        for own, other in ((rows, others), (others, rows)):
            for i, sample in enumerate(samples):
                allowed = [j for j, of in enumerate(samples) if j == i or {sample, of} not in same]
                scores = torch.stack([vectors[own[i]] @ vectors[other[j]] for j in allowed]) * scale.exp()
                is_own = torch.tensor([j == i for j in allowed])
                if loss == "infonce":
                    found = scores.logsumexp(0) - scores[is_own]
                else:
                    found = -F.logsigmoid(torch.where(is_own, scores + bias, -(scores + bias))).sum()
                total = total + WEIGHT[sample] / 2 * found
    gradients = torch.autograd.grad(total, [vectors, scale, bias], allow_unused=True)
    return (total.detach(), *(torch.zeros(1) if gradient is None else gradient for gradient in gradients))


def found(loss: str, log_scale: float = 1.3, with_gradient: bool = True) -> Contrast:
    return contrast(table().float(), keys(), pairs(), temperature(log_scale), loss, with_gradient)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("scores_at_once", [1 << 22, 14, 1])
def test_loss_and_gradients_are_those_of_the_formula(
    loss: str, scores_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrast_module, "_SCORES_AT_ONCE", scores_at_once)  # all rows, two rows and one row at once
    own = found(loss)
    for value, right in zip((own.loss, own.of_table, *own.of_temperature), expected(loss), strict=True):
        assert value.double().numpy() == pytest.approx(right.double().numpy().reshape(value.shape), rel=2e-6, abs=2e-6)
    assert float(found(loss, with_gradient=False).loss) == pytest.approx(float(own.loss), rel=1e-6)


def test_recall_and_chance_are_over_the_candidates() -> None:
    own = found("infonce")
    candidates = [7, 6, 6, 7, 6, 7, 6], [4, 3, 4, 3]  # of the samples with the third view, 2 and 6 have the same image
    chance = sum(float(w) / n for w, n in zip(WEIGHT, candidates[0], strict=True))
    chance += sum(float(w) / n for w, n in zip(WEIGHT[OF_FIRST], candidates[1], strict=True))
    assert float(own.chance) == pytest.approx(chance, rel=1e-6)
    vectors = table()
    vectors[SECOND], vectors[THIRD] = vectors[FIRST], vectors[FIRST[OF_FIRST]]
    perfect = contrast(vectors.float(), keys(), pairs(), temperature(), "infonce")
    assert float(perfect.correct) == pytest.approx(float(WEIGHT.sum() + WEIGHT[OF_FIRST].sum()))


def test_one_sample_has_nothing_to_learn_from() -> None:
    one = [Pair(FIRST[:1], SECOND[:1], WEIGHT[:1])]
    own = contrast(table().float(), keys(), one, temperature(), "infonce")
    assert float(own.loss) == 0 and not own.of_table.any() and not own.of_temperature.log_scale.any()


def test_the_scale_is_limited_and_may_become_smaller_again() -> None:
    for log_scale in (LOG_SCALE_LIMIT + 0.5, math.log(100)):
        own, limit = found("infonce", log_scale), found("infonce", LOG_SCALE_LIMIT - 1e-4)
        assert float(own.loss) == pytest.approx(float(limit.loss), rel=1e-3)
        gradient = float(own.of_temperature.log_scale)
        assert gradient > 0 and gradient == pytest.approx(float(limit.of_temperature.log_scale), rel=1e-2)
    vectors = F.normalize(torch.ones(5, dtype=torch.float64) + 0.05 * table(), dim=1)
    vectors[SECOND], vectors[THIRD] = vectors[FIRST], vectors[FIRST[OF_FIRST]]  # a larger scale lowers this loss
    for log_scale, is_limited in ((LOG_SCALE_LIMIT + 0.5, True), (1.3, False)):
        perfect = contrast(vectors.float(), keys(), pairs(), temperature(log_scale), "infonce")
        assert (float(perfect.of_temperature.log_scale) == 0) if is_limited else (perfect.of_temperature.log_scale < 0)
