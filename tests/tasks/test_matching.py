"""Sample-level matching: sigmoid and binary cross-entropy over five scores, or softmax cross-entropy."""

import numpy as np
import pytest
import torch

from opt_ds.store import FeatureStore
from tests.tiny import make_config, make_model, make_packer, positions_of, read_samples


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_the_loss_is_its_formula(complete: FeatureStore, loss: str) -> None:
    tasks = {"sampling_weights": {"matching": 0.8, "mlm": 0.2}, "matching": {"loss": loss}}
    config = make_config(tasks=tasks, batch={"size": 60})
    model, samples = make_model(config), read_samples(config, [complete])
    batch = make_packer(config, [complete]).pack(samples)
    with torch.no_grad():
        hidden, term = model.encode(batch.inputs).double().numpy(), model(batch)["matching"]
    weight, bias = (p.detach().double().numpy() for p in (model.matching.score.weight, model.matching.score.bias))
    total, count, correct = 0.0, 0, 0
    for sample, (cls, *_) in zip(samples, positions_of(samples), strict=True):
        if "matching" not in sample.targets:
            continue
        label = sample.targets["matching"]
        scores = weight @ hidden[cls] + bias
        if loss == "bce":
            probability = 1 / (1 + np.exp(-scores))
            right = np.arange(5) == label
            total -= np.where(right, np.log(probability), np.log(1 - probability)).sum() / 5
        else:
            total -= np.log(np.exp(scores[label]) / np.exp(scores).sum())
        correct += int(scores.argmax() == label)
        count += 1
    assert count > 30 and term.count == count and term.metrics["correct"] == correct
    assert term.sum.item() == pytest.approx(total, rel=1e-5)
