"""MVM: feature regression and classification of exactly the masked regions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opt_ds.data.modalities import IMAGE
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.tasks.base import total_loss
from opt_ds.tasks.baselines import trivial_baselines
from opt_ds.training.preflight import settle
from tests.tiny import make_config, make_model, make_packer, make_store, positions_of, read_samples


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


@pytest.mark.parametrize("classes", [0, 1])
def test_without_classes_mrc_is_disabled_and_mvfr_is_trained(tmp_path: Path, classes: int) -> None:
    """One class says nothing about a region either."""
    store = make_store(tmp_path / "s", image_num_classes=classes)
    assert inspect_store(store.path).failures == []
    config = make_config(model={"image_num_classes": classes}, tasks={"sampling_weights": {"mvm": 1.0}})
    plan = PretrainingPlan(config, [store])
    assert plan.disabled_tasks["mrc"] == "the store's image regions have no classes (their extractor gives none)"
    assert "mvm" not in plan.disabled_tasks
    step = plan.step(0)
    assert step.counts["mvfr"] > 0 and step.counts["mrc"] == 0
    model = make_model(config)
    assert not [name for name, _ in model.named_parameters() if "classify" in name]
    terms = model(make_packer(config, [store]).pack(read_samples(config, [store])))
    assert terms["mrc"].count == 0 and terms["mrc"].sum.item() == 0
    loss = total_loss(terms, step.counts, config.tasks, 1)
    loss.backward()
    assert torch.isfinite(loss) and model.mvm.regress.weight.grad.abs().sum() > 0
    found = trivial_baselines(config, [store])
    assert "mvfr" in found and "mrc" not in found
    with_store, _, taken = settle("opt-tiny", [], [str(store.path)])
    assert with_store.model.image_num_classes == classes and f"model.image_num_classes={classes}" in str(taken)


def test_a_store_with_classes_does_not_fit_a_model_without(tmp_path: Path) -> None:
    from opt_ds.training.preflight import store_problems

    stores = [make_store(tmp_path / "a", image_num_classes=0), make_store(tmp_path / "b")]
    problems = store_problems(make_config(model={"image_num_classes": 0}), stores)
    assert any("model.image_num_classes is 0 but the store has 7" in problem for problem in problems)
