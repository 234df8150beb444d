"""Test trivial baselines: the exact loss over the validation pass of predictions by counts in context and by means."""

from typing import Any

import numpy as np
import pytest
import torch

from opt_ds.data.matching import NUM_LABELS
from opt_ds.data.modalities import AUDIO
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.store import FeatureStore
from opt_ds.tasks.baselines import baseline_result, trivial_baselines
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
def test_matching_is_what_the_best_constant_scores_of_each_set_of_modalities_reach(complete: FeatureStore, loss: str) -> None:
    config = make_config(tasks={"matching": {"loss": loss}})
    steps = [(s.samples, s.samples.task == MATCHING) for s in PretrainingPlan(config, [complete]).validation()]
    labels = np.concatenate([samples.columns["matching_label"][own] for samples, own in steps])
    present = np.concatenate([samples.input_rows[own][:, :3] >= 0 for samples, own in steps])
    sets, number = np.unique(present, axis=0, return_inverse=True)
    assert len(sets) == 4, "three modalities, and each pair"
    expected, correct, alone = 0.0, 0.0, 0.0
    for one in range(len(sets)):
        own = labels[number.reshape(-1) == one]
        loss_of_set, accuracy = best_constant(own, loss)
        expected, correct = expected + loss_of_set * len(own) / len(labels), correct + accuracy * len(own) / len(labels)
        alone = best_constant(labels, loss)[0]
    found = baseline_result(config, [complete])
    assert found.losses["matching"] == pytest.approx(expected, rel=1e-6)
    assert found.accuracies["matching"] == pytest.approx(correct)
    assert found.losses["matching"] < 0.8 * alone, "which modalities are present tells much about the label"


def best_constant(labels: np.ndarray, loss: str) -> tuple[float, float]:
    """Return loss and accuracy of the best constant scores, by the model's own loss functions."""
    prior = torch.from_numpy(np.bincount(labels, minlength=NUM_LABELS) / len(labels))
    wanted = torch.from_numpy(labels.astype(np.int64))
    scores = torch.logit(prior, eps=1e-12) if loss == "bce" else torch.log(prior.clamp_min(1e-12))
    scores = scores.expand(len(labels), -1)
    if loss == "bce":
        targets = torch.nn.functional.one_hot(wanted, NUM_LABELS).double()
        found = torch.nn.functional.binary_cross_entropy_with_logits(scores, targets)
    else:
        found = torch.nn.functional.cross_entropy(scores, wanted)
    return float(found), float(prior.max())


def test_a_model_that_knows_the_training_means_reaches_about_the_baselines_of_noise(complete: FeatureStore) -> None:
    """MVFR and MAFR of heads that ignore their input. The store's features are noise, so neighbours tell nothing."""
    config = make_config(model={"standardize_features": True})
    model = make_model(config)
    model.set_feature_statistics([complete])
    with torch.no_grad():
        for head in (model.mvm.regress, model.mam.regress):
            head.weight.zero_(), head.bias.zero_()
    reached, baselines = validate(model, config, complete).losses, trivial_baselines(config, [complete])
    assert reached["mvfr"] == pytest.approx(baselines["mvfr"], rel=0.02)
    assert reached["mafr"] == pytest.approx(baselines["mafr"], rel=0.02)


def test_neighbours_count_where_they_tell_something(complete: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions and frames that resemble each other, one word after another, codes that copy the left one."""
    config = make_config(model={"standardize_features": True})
    before = baseline_result(config, [complete])
    regions, frames, text = complete.regions, complete.frames, complete.text

    def alike(row: int) -> Any:
        found = regions(row)
        own = np.random.default_rng(row).normal(size=(1, found.features.shape[1]))
        return found._replace(features=(own + 0.1 * found.features).astype("f2"), labels=found.labels * 0 + row % 7)

    monkeypatch.setattr(complete, "regions", alike, raising=False)
    monkeypatch.setattr(complete, "frames", lambda row: np.cumsum(frames(row), 0) * 0.3, raising=False)
    monkeypatch.setattr(complete, "text", lambda row: 5 + (row + np.arange(len(text(row)))) % 35, raising=False)
    monkeypatch.setattr(complete, "codes", lambda row: np.full(config.model.num_image_codes, row % 16), raising=False)
    after = baseline_result(config, [complete])
    for loss in ("mvfr", "mafr", "mrc", "mlm", "dtr", "dir"):
        assert after.losses[loss] < 0.75 * before.losses[loss], loss
    for loss in ("mrc", "dir", "dtr"):
        assert after.accuracies[loss] > 0.5 > before.accuracies[loss], loss


def test_accuracies_are_those_of_classifications_and_at_chance_on_random_data(complete: FeatureStore) -> None:
    found = baseline_result(make_config(), [complete])
    assert set(found.accuracies) == {"mlm", "mrc", "mac", "dtr", "dir", "matching"}
    assert found.accuracies["dir"] == pytest.approx(1 / 16, abs=0.03) and found.accuracies["mlm"] < 0.2


def test_only_active_losses_that_have_terms_are_listed(no_codes: FeatureStore) -> None:
    found = trivial_baselines(make_config(tasks={"mvm": {"weight": 0.0}}), [no_codes])
    assert set(found) == {"mlm", "mafr", "mac", "dtr", "matching"}
