"""MVM: feature regression and classification of exactly the masked regions."""

import numpy as np
import pytest
import torch

from opt_ds.data.modalities import IMAGE
from opt_ds.store import FeatureStore
from tests.tiny import make_config, make_model, make_packer, positions_of, read_samples


@pytest.mark.parametrize("standardize", [False, True])
def test_both_losses_are_their_formulas(ragged: FeatureStore, standardize: bool) -> None:
    config = make_config(
        model={"standardize_features": standardize}, tasks={"sampling_weights": {"mvm": 0.6, "modality": 0.4}}, batch={"size": 60}
    )
    model, samples = make_model(config), read_samples(config, [ragged])
    model.set_feature_statistics([ragged])
    batch = make_packer(config, [ragged]).pack(samples)
    with torch.no_grad():
        hidden, terms = model.encode(batch.inputs).double(), model(batch)
    w = {name: value.detach().double() for name, value in model.mvm.named_parameters()}
    statistics = ragged.description.statistics["image"]
    error, cross_entropy, count, correct = 0.0, 0.0, 0, 0
    for sample, (_, _, places, _) in zip(samples, positions_of(samples), strict=True):
        for r in np.flatnonzero(sample.items[IMAGE].masked) if "mvm" in sample.targets else []:
            target = torch.from_numpy(sample.items[IMAGE].features[r].astype("float64"))
            if standardize:
                target = ((target - torch.tensor(statistics.mean)) / torch.tensor(statistics.std)).clamp(-8, 8)
            h = hidden[places[r]]
            error += ((w["regress.weight"] @ h + w["regress.bias"] - target) ** 2).sum().item() / len(target)
            scores = w["classify.weight"] @ h + w["classify.bias"]
            cross_entropy -= torch.log(torch.exp(scores) / torch.exp(scores).sum())[sample.items[IMAGE].labels[r]].item()
            correct += int(scores.argmax() == sample.items[IMAGE].labels[r])
            count += 1
    assert count > 15 and terms["mvfr"].count == terms["mrc"].count == count
    assert terms["mvfr"].sum.item() == pytest.approx(error, rel=1e-5)
    assert terms["mrc"].sum.item() == pytest.approx(cross_entropy, rel=1e-5)
    assert terms["mrc"].metrics["correct"] == correct
