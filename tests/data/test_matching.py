"""Test matching examples: five labels in equal parts, negatives of other groups of the same split, correct labels."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from opt_ds.data.matching import MATCHING_LABELS
from opt_ds.data.negatives import NegativeSampler
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.step_samples import StepSamples, select
from opt_ds.data.text_similarity import TextSimilarity
from opt_ds.store import FeatureStore
from tests.tiny import MATCHING, index_with, make_config, make_store

PAIRS = {(1, 2): "image_audio", (0, 2): "text_audio", (0, 1): "text_image"}


def matching_samples(store: FeatureStore, pair_probability: float, size: int = 10_000) -> StepSamples:
    tasks = {"sampling_weights": {"matching": 1.0}, "matching": {"pair_probability": pair_probability}}
    samples = (
        PretrainingPlan(make_config(tasks=tasks, batch={"size": size, "max_tokens": 8192}), [store]).step(0).samples
    )
    keep = samples.task == MATCHING
    return select(samples, keep)


def true_label(store: FeatureStore, owners: list[dict[int, int]], rows: np.ndarray) -> str:
    """Return the label that follows from the store: which inputs come from samples of one group."""
    inputs = [m for m in range(3) if rows[m] >= 0]
    groups = {m: int(store.groups[owners[m][int(rows[m])]]) for m in inputs}
    agreeing = [pair for pair in PAIRS if set(pair) <= set(inputs) and groups[pair[0]] == groups[pair[1]]]
    if len(inputs) == 3 and len(agreeing) == 3:
        return "all"
    assert len(agreeing) <= 1
    return PAIRS[agreeing[0]] if agreeing else "none"


def owners_of(store: FeatureStore) -> list[dict[int, int]]:
    """Per modality: row -> the sample that has it (each row of these stores has one)."""
    return [{int(row): i for i, row in enumerate(store.rows[:, m]) if row >= 0} for m in range(3)]


@pytest.mark.parametrize("name", ["complete", "grouped"])
def test_five_cases_in_equal_shares_and_the_label_is_right(request: pytest.FixtureRequest, name: str) -> None:
    store = request.getfixturevalue(name)
    s, owners = matching_samples(store, 0.0), owners_of(store)
    assert len(s) == 10_000 and (s.input_rows >= 0).all()
    counts = np.bincount(s.columns["matching_label"], minlength=5)
    assert len(counts) == 5 and ((counts - 2000.0) ** 2 / 2000.0).sum() < 25.0
    assert all(
        MATCHING_LABELS[c] == true_label(store, owners, rows)
        for c, rows in zip(s.columns["matching_label"], s.input_rows, strict=True)
    )
    own = s.input_rows == s.source_rows
    kept = {"all": 3, "image_audio": 2, "text_audio": 2, "text_image": 2, "none": 1}
    assert all(own[i].sum() == kept[MATCHING_LABELS[c]] for i, c in enumerate(s.columns["matching_label"]))
    none = own[s.columns["matching_label"] == 4]
    assert np.abs(none.mean(0) - 1 / 3).max() < 0.05, "any of the three stays its own where nothing matches"


@pytest.mark.parametrize("name", ["complete", "grouped", "ragged"])
@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_negatives_are_of_other_groups_of_the_same_split(request: pytest.FixtureRequest, name: str, probability: float) -> None:
    store = request.getfixturevalue(name)
    s, owners = matching_samples(store, probability, 3000), owners_of(store)
    train = set(store.split_samples("train").tolist())
    for sample, source, rows in zip(s.sample, s.source_rows, s.input_rows, strict=True):
        negatives = [owners[m][int(rows[m])] for m in range(3) if rows[m] >= 0 and rows[m] != source[m]]
        groups = [int(store.groups[d]) for d in negatives]
        assert set(negatives) <= train
        assert int(store.groups[sample]) not in groups
        assert len(set(groups)) == len(groups) == len(set(negatives)), "two negatives are two samples of two groups"
        assert all(rows[m] < 0 for m in range(3) if source[m] < 0), "a negative gives no modality that the sample has not"


def test_pairs_are_labelled_with_their_case_or_none(complete: FeatureStore) -> None:
    s, owners = matching_samples(complete, 1.0), owners_of(complete)
    assert ((s.input_rows >= 0).sum(1) == 2).all()
    assert np.abs((s.input_rows < 0).mean(0) - 1 / 3).max() < 0.02
    assert all(
        MATCHING_LABELS[c] == true_label(complete, owners, rows)
        for c, rows in zip(s.columns["matching_label"], s.input_rows, strict=True)
    )
    assert not (s.columns["matching_label"] == 0).any()
    # `all` and one of the three pairs keep it unchanged
    assert (s.columns["matching_label"] == 4).mean() == pytest.approx(0.6, abs=0.02)


def test_half_of_the_draws_judge_a_pair(complete: FeatureStore, ragged: FeatureStore) -> None:
    s = matching_samples(complete, 0.5)
    assert ((s.input_rows >= 0).sum(1) == 2).mean() == pytest.approx(0.5, abs=0.02)
    r, owners = matching_samples(ragged, 0.0), owners_of(ragged)
    two = (r.source_rows >= 0).sum(1) == 2
    assert two.any() and ((r.input_rows[two] >= 0) == (r.source_rows[two] >= 0)).all()
    assert all(
        MATCHING_LABELS[c] == true_label(ragged, owners, rows)
        for c, rows in zip(r.columns["matching_label"], r.input_rows, strict=True)
    )


def test_validation_negatives_are_of_the_valid_split(complete: FeatureStore) -> None:
    valid, owners = set(complete.split_samples("valid").tolist()), owners_of(complete)
    for step in PretrainingPlan(make_config(), [complete]).validation():
        rows = step.samples.input_rows[step.samples.task == MATCHING]
        assert {owners[m][int(row)] for m in range(3) for row in rows[:, m] if row >= 0} <= valid


def test_the_fewest_groups_that_serve(tmp_path) -> None:
    three = make_store(tmp_path / "three", 12, samples_per_group=4, splits={"train": 1.0, "valid": 0.0})
    s, owners = matching_samples(three, 0.0, 500), owners_of(three)
    assert len(s) == 500
    assert all(
        MATCHING_LABELS[c] == true_label(three, owners, rows)
        for c, rows in zip(s.columns["matching_label"], s.input_rows, strict=True)
    )
    two = make_store(tmp_path / "two", 8, samples_per_group=4, splits={"train": 1.0, "valid": 0.0})
    assert "no negative" in PretrainingPlan(make_config(), [two]).disabled_tasks["matching"]


def pool_of(store: FeatureStore, groups: np.ndarray, rows: np.ndarray) -> NegativeSampler:
    """A pool of samples with all modalities, of these groups and rows."""
    index = index_with(store, np.stack([rows] * 3, axis=1))
    store.__dict__["index"] = dataclasses.replace(index, groups=groups)
    return NegativeSampler(store, np.arange(len(groups)))


def test_one_large_group_is_passed_in_a_step_and_the_negatives_are_those_behind_it(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = np.zeros(600, dtype=np.int64)
    groups[[5, 200, 201, 398, 599]] = (1, 2, 2, 1, 2)
    pool = pool_of(make_store(tmp_path / "s", 600), groups, np.arange(600) // 2)
    who, replaced = np.arange(600), np.tile([True, True, False], (600, 1))
    tries: list[int] = []
    real = NegativeSampler._refused
    monkeypatch.setattr(NegativeSampler, "_refused", lambda self, *given: (tries.append(1), real(self, *given))[1])
    sampled = pool.replace(pool._rows, replaced, who, who.astype(np.uint64))
    assert len(tries) < 60
    monkeypatch.setattr(NegativeSampler, "_next_place", lambda self, place, *_: (place + 1) % 600)
    assert (pool.replace(pool._rows, replaced, who, who.astype(np.uint64)) == sampled).all()
    assert len(tries) > 300, "one by one"


@pytest.mark.parametrize(
    ("groups", "rows", "usable"),
    [
        ([0, 1, 2], [0, 1, 2], True),
        ([0, 1, 2], [0, 0, 0], False),  # one image for all
        ([0, 0, 1, 2], [0, 1, 0, 0], False),  # a sample with the second as negative has no candidate for a third
        ([0, 0, 1, 2], [0, 1, 2, 3], True),
        ([0, 1, 2, 3], [0, 0, 1, 2], True),
        ([0, 1, 2, 2], [0, 0, 1, 2], False),
    ],
)
def test_a_pool_is_usable_if_every_sample_finds_two_negatives(tmp_path, groups: list, rows: list, usable: bool) -> None:
    pool = pool_of(make_store(tmp_path / "s", len(groups)), np.array(groups), np.array(rows))
    assert pool.usable == usable
    if usable:
        who = np.repeat(np.arange(len(groups)), 50)
        pool.replace(pool._rows[who], np.tile([True, True, False], (len(who), 1)), who, np.arange(len(who), dtype=np.uint64))


def test_hard_negatives_have_nearer_texts_and_keep_every_rule(grouped: FeatureStore) -> None:
    matching = {"pair_probability": 0.0, "hard_negative_fraction": 1.0}
    tasks = {"sampling_weights": {"matching": 1.0}}
    size = {"batch": {"size": 1000, "max_tokens": 8192}}
    owners, train = owners_of(grouped), grouped.split_samples("train")
    similarity, mean = TextSimilarity(grouped, train, []), {}
    for share in (0.0, 1.0):
        plan = PretrainingPlan(
            make_config(tasks=tasks | {"matching": matching | {"hard_negative_fraction": share}}, **size), [grouped]
        )
        s = plan.step(0).samples
        assert (s.task == MATCHING).all() and np.bincount(s.columns["matching_label"], minlength=5).min() > 100
        assert all(
            MATCHING_LABELS[c] == true_label(grouped, owners, rows)
            for c, rows in zip(s.columns["matching_label"], s.input_rows, strict=True)
        )
        given = [
            (sample, owners[m][int(rows[m])])
            for sample, source, rows in zip(s.sample, s.source_rows, s.input_rows, strict=True)
            for m in range(3)
            if rows[m] != source[m]
        ]
        sample, negative = np.array(given).T
        assert not similarity.same_content(sample, negative[:, None]).any()
        mean[share] = similarity.of(sample, negative[:, None]).mean()
    assert mean[1.0] > mean[0.0] + 0.1


def test_a_pool_of_a_large_split_looks_at_its_first_samples_only(complete: FeatureStore) -> None:
    """A start must not depend on the size of the store."""

    class Split:
        """More samples than are ever read."""

        blocks = 0

        def __len__(self) -> int:
            return 10**9

        def __getitem__(self, key: slice) -> np.ndarray:
            self.blocks += 1
            return np.arange(90)

    split: Any = Split()
    assert NegativeSampler(complete, np.arange(90))._suffices(split, 0)
    assert split.blocks <= 2
