"""Test trivial baselines: the exact loss over the validation pass of predictions by frequencies and means."""

import numpy as np
import pytest
import torch

from opt_ds.data.matching import NUM_LABELS
from opt_ds.data.modalities import AUDIO
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.store import FeatureStore
from opt_ds.tasks.baselines import trivial_baselines
from opt_ds.training.validation import validate
from tests.tiny import MATCHING, make_config, make_model


def test_they_are_close_to_uniform_guesses_on_random_data(complete: FeatureStore) -> None:
    found = trivial_baselines(make_config(), [complete])
    assert set(found) == set(make_config().tasks.active_losses)
    assert found["mlm"] == pytest.approx(np.log(35), abs=0.4)  # 35 ordinary words, uniform
    assert found["mrc"] == pytest.approx(np.log(7), abs=0.2)
    assert found["dir"] == pytest.approx(np.log(16), abs=0.05)
    assert found["mvfr"] == pytest.approx(1.0, abs=0.2) and found["mafr"] == pytest.approx(1.0, abs=0.2)


def test_mac_is_log_k_of_each_masked_frame(complete: FeatureStore) -> None:
    config = make_config()
    reader, logs = SampleReader(config, [complete]), []
    for step in PretrainingPlan(config, [complete]).validation():
        for index in range(step.num_samples):
            sample = reader.read(step.samples, index)
            if "mam" in sample.targets:
                logs += [np.log(1 + (~sample.items[AUDIO].masked).sum())] * int(sample.items[AUDIO].masked.sum())
    assert trivial_baselines(config, [complete])["mac"] == pytest.approx(np.mean(logs))


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_matching_is_what_the_best_constant_scores_reach(complete: FeatureStore, loss: str) -> None:
    config = make_config(tasks={"matching": {"loss": loss}})
    labels = np.concatenate(
        [
            s.samples.columns["matching_label"][s.samples.task == MATCHING]
            for s in PretrainingPlan(config, [complete]).validation()
        ]
    )
    prior = torch.from_numpy(np.bincount(labels, minlength=NUM_LABELS) / len(labels)).float()
    model = make_model(config)
    with torch.no_grad():
        model.matching.score.weight.zero_()
        best = torch.logit(prior, eps=1e-6) if loss == "bce" else torch.log(prior.clamp_min(1e-6))
        model.matching.score.bias.copy_(best)
    reached = validate(model, config, complete).losses["matching"]
    assert trivial_baselines(config, [complete])["matching"] == pytest.approx(reached, rel=1e-3)


def test_a_model_that_knows_the_training_means_reaches_them(complete: FeatureStore) -> None:
    """MVFR and MAFR of heads that ignore their input: the baseline's own knowledge, through the model's own losses."""
    config = make_config(model={"standardize_features": True})
    model = make_model(config)
    model.set_feature_statistics([complete])
    with torch.no_grad():
        for head in (model.mvm.regress, model.mam.regress):
            head.weight.zero_(), head.bias.zero_()
    reached, baselines = validate(model, config, complete).losses, trivial_baselines(config, [complete])
    assert reached["mvfr"] == pytest.approx(baselines["mvfr"], rel=1e-3)
    assert reached["mafr"] == pytest.approx(baselines["mafr"], rel=1e-3)


def test_only_active_losses_that_have_terms_are_listed(no_codes: FeatureStore) -> None:
    found = trivial_baselines(make_config(tasks={"mvm": {"weight": 0.0}}), [no_codes])
    assert set(found) == {"mlm", "mafr", "mac", "dtr", "matching"}
