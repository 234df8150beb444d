"""Test the plan of fine-tuning: only samples that fit, inputs that are never the target, negatives of other groups."""

import numpy as np
import pytest

from opt_ds.config import Config
from opt_ds.data.finetune_plan import FineTunePlan
from opt_ds.data.hard_negatives import HardNegativeSampler
from opt_ds.data.modalities import AUDIO, IMAGE, MODALITIES, TEXT
from opt_ds.data.samples import SampleReader
from opt_ds.data.step_samples import StepSamples
from opt_ds.errors import UserError
from opt_ds.store import FeatureStore
from tests.tiny import LABELS, MATCHING, WRITE, index_with, make_config, written


def config(task: str, *inputs: str, labels: dict | None = None, size: int = 200, **options: object) -> Config:
    finetune = {"task": task, "checkpoint": "", "weights_sha256": "", "inputs": inputs, **options}
    return make_config(finetune=finetune, tasks={"labels": labels}, batch={"size": size, "max_tokens": 4096})


def test_transcription_hears_and_writes_and_never_reads_the_text(ragged: FeatureStore) -> None:
    plan = FineTunePlan(config("transcription", "A", "A+I"), [ragged])
    samples = plan.step(0).samples
    assert (samples.task == WRITE).all() and samples.columns["has_text_target"].all()
    assert (samples.input_rows[:, TEXT] < 0).all() and (samples.input_rows[:, AUDIO] >= 0).all()
    with_image = samples.source_rows[:, IMAGE] >= 0
    assert (samples.input_rows[~with_image, IMAGE] < 0).all()
    assert 0.3 < (samples.input_rows[with_image, IMAGE] >= 0).mean() < 0.7, "both inputs are drawn where both are there"
    own = ragged.rows[ragged.split_samples("train")]
    assert plan.num_samples == ((own[:, TEXT] >= 0) & (own[:, AUDIO] >= 0)).sum()


def test_nothing_is_masked_and_the_whole_text_is_the_target(complete: FeatureStore) -> None:
    setting = config("captioning", "I", size=8)
    step_plan, reader = FineTunePlan(setting, [complete]).step(0), SampleReader(setting, [complete])
    num_written = 0
    for index in range(8):
        sample = reader.read(step_plan.samples, index)
        text, limit = complete.text(int(step_plan.samples.source_rows[index, TEXT])), setting.model.max_text_tokens
        assert sample.items.keys() == {IMAGE} and sample.of(IMAGE).masked is None
        np.testing.assert_array_equal(written(sample).text, text[:limit])
        num_written += limit if len(text) > limit else len(text) + 1
    assert step_plan.counts == {**dict.fromkeys(step_plan.counts, 0.0), "dtr": num_written}


def _pairs(samples: StepSamples) -> tuple[np.ndarray, np.ndarray]:
    """(which samples have a negative's part, their differing modality)"""
    differs = samples.input_rows != samples.source_rows
    differs &= samples.input_rows >= 0
    return differs.any(1), differs.argmax(1)


def test_retrieval_judges_pairs_half_of_which_have_a_negative_on_either_side(grouped: FeatureStore) -> None:
    plan = FineTunePlan(config("retrieval", "T+I", size=1000), [grouped])
    samples = plan.step(0).samples
    negative, side = _pairs(samples)
    assert (samples.task == MATCHING).all() and (samples.input_rows[:, AUDIO] < 0).all()
    assert (samples.columns["matching_label"] == np.where(negative, 4, 3)).all(), "text_image or none"
    assert 0.4 < negative.mean() < 0.6
    assert 0.4 < (side[negative] == TEXT).mean() < 0.6
    for index in np.flatnonzero(negative):
        modality = int(side[index])
        providers = np.flatnonzero(grouped.rows[:, modality] == samples.input_rows[index, modality])
        assert set(grouped.groups[providers]).isdisjoint({grouped.groups[samples.sample[index]]})
        assert set(providers) <= set(grouped.split_samples("train"))


def test_a_triple_of_which_one_is_replaced_is_the_pair_that_remains(complete: FeatureStore) -> None:
    samples = FineTunePlan(config("retrieval", "T+A+I"), [complete]).step(0).samples
    negative, side = _pairs(samples)
    assert set(side[negative]) == set(MODALITIES)
    assert (samples.columns["matching_label"] == np.where(negative, side + 1, 0)).all()


def test_negatives_have_nearer_texts_than_random_ones_and_never_the_same(complete: FeatureStore) -> None:
    train = complete.split_samples("train")
    sample, key = np.repeat(train, 20), np.arange(20 * len(train), dtype=np.uint64)

    def overlap(candidates: int) -> float:
        pool = HardNegativeSampler(complete, train, candidates, same_group=False, key=[])
        rows, found = pool.replace(complete.rows[sample], np.full(len(sample), TEXT), sample, key)
        again, _ = pool.replace(complete.rows[sample], np.full(len(sample), TEXT), sample, key)
        np.testing.assert_array_equal(rows, again)
        shared = []
        for index, row in zip(sample[found], rows[found, TEXT], strict=True):
            own, other = complete.text(int(complete.rows[index, TEXT])), complete.text(int(row))
            assert own.tolist() != other.tolist()
            shared.append(len(set(own) & set(other)) / len(set(own) | set(other)))
        return float(np.mean(shared))

    assert overlap(32) > 2 * overlap(2)


def test_negatives_of_the_own_group_are_taken_only_if_asked_for(grouped: FeatureStore) -> None:
    train = grouped.split_samples("train")
    key = np.arange(len(train), dtype=np.uint64)
    image_group = {int(row): int(grouped.groups[i]) for i, row in enumerate(grouped.rows[:, IMAGE])}
    for same_group in (False, True):
        pool = HardNegativeSampler(grouped, train, 8, same_group, [])
        rows, found = pool.replace(grouped.rows[train], np.full(len(train), IMAGE), train, key)
        same = [image_group[int(row)] == grouped.groups[i] for i, row in zip(train, rows[:, IMAGE], strict=True)]
        assert found.all() and any(same) == same_group


def test_a_sample_without_any_negative_is_left_out(complete: FeatureStore) -> None:
    one = complete.split_samples("train")[:1]
    rows, found = HardNegativeSampler(complete, one, 4, same_group=True, key=[]).replace(
        complete.rows[one], np.array([TEXT]), one, np.zeros(1, np.uint64)
    )
    assert not found.any() and (rows == complete.rows[one]).all()


def test_labels_are_targets_and_answers_are_scored_by_how_often_they_were_given(
    complete: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["label1", "label3"]
    given = {"label1": 2, "label3": 5, "label0": 3}
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: [n for n, times in given.items() for _ in range(times)])
    for answers, agreement, expected in ((False, 3, [1, 1]), (True, 3, [2 / 3, 1]), (True, 1, [1, 1])):
        setting = config("classification", "T+I", labels={"names": names, "answers": answers}, size=4)
        setting = setting.model_copy(update={"finetune": setting.finetune.model_copy(update={"agreement": agreement})})
        step_plan = FineTunePlan(setting, [complete]).step(0)
        sample = SampleReader(setting, [complete]).read(step_plan.samples, 0)
        np.testing.assert_allclose(sample.targets["labels"], expected)
        assert (step_plan.samples.task == LABELS).all() and step_plan.counts["labels"] == 4


def test_samples_without_labels_are_left_out(complete: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: ["label1"] if index % 2 else [])
    plan = FineTunePlan(config("vqa", "T+I", labels={"names": ["label1"]}), [complete])
    assert set(plan.step(0).samples.sample % 2) == {1}


def test_every_validation_sample_is_judged_once_matching_and_once_with_each_side_replaced(complete: FeatureStore) -> None:
    plan = FineTunePlan(config("retrieval", "T+I"), [complete])
    samples = [step.samples for step in plan.validation()]
    valid = len(complete.split_samples("valid"))
    assert sum(len(s) for s in samples) == 3 * valid
    assert sum((s.columns["matching_label"] == 3).sum() for s in samples) == valid


def test_a_store_without_a_fitting_sample_is_refused_in_one_line(no_codes: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    without_audio = np.where(np.arange(3) == AUDIO, -1, no_codes.rows)
    monkeypatch.setitem(no_codes.__dict__, "index", index_with(no_codes, without_audio))
    with pytest.raises(UserError, match=r"no sample of split \"train\" has A or A\+I and text to write: choose other --inputs"):
        FineTunePlan(config("transcription", "A", "A+I"), [no_codes])
