"""Test the step plan: a pure function of the step, every sample once per epoch, tasks by their weights, correct counts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opt_ds.data.flops import sample_and_step_flops
from opt_ds.data.lengths import stacked_length
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.step_samples import StepSamples, select
from opt_ds.data.task import tasks_of
from opt_ds.store import FeatureStore
from tests.tiny import (
    MATCHING,
    MODALITY,
    TASK_NAMES,
    index_with,
    make_batches,
    make_config,
    make_model,
    make_store,
    masked,
)


def equal(a: StepSamples, b: StepSamples) -> bool:
    return all((x == y).all() for x, y in zip(a.arrays().values(), b.arrays().values(), strict=True))


def taken(plan: PretrainingPlan, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = [plan.step(step).samples for step in range(steps)]
    return tuple(np.concatenate([getattr(p, name) for p in parts]) for name in ("epoch", "store", "sample"))


def test_a_step_is_a_pure_function_of_the_step(ragged: FeatureStore) -> None:
    config = make_config()
    plan, other = PretrainingPlan(config, [ragged]), PretrainingPlan(config, [FeatureStore(ragged.path)])
    later = plan.step(7)
    for step in (3, 7, 0):
        other.step(step)
    for world_size in (1, 2, 3):
        step_plan = other.step(7, world_size)
        assert equal(step_plan.samples, later.samples) and step_plan.counts == later.counts
        assert len(step_plan.micro_batches) == world_size
        indices = np.concatenate([m.indices for rank in step_plan.micro_batches for m in rank])
        assert sorted(indices) == np.flatnonzero(later.samples.task >= 0).tolist()
    assert not equal(plan.step(8).samples, later.samples)
    assert not equal(PretrainingPlan(make_config(seed=2), [ragged]).step(7).samples, later.samples)


@pytest.mark.parametrize("size", [1, 7, 33, 200])
def test_every_sample_once_an_epoch_and_batches_cross_epochs(complete: FeatureStore, size: int) -> None:
    plan = PretrainingPlan(make_config(batch={"size": size}), [complete])
    epoch, _, sample = taken(plan, -(-240 // size))
    own = complete.split_samples("train")
    for number in range(3):
        assert sorted(sample[epoch == number]) == own.tolist()
    assert (sample[:80] != sample[80:160]).any(), "each epoch has its own order"
    assert (np.diff(epoch) >= 0).all()
    if 80 % size:
        assert any(len(np.unique(plan.step(step).samples.epoch)) > 1 for step in range(-(-240 // size)))


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4])
def test_stores_of_few_samples(tmp_path, num_samples: int) -> None:
    store = make_store(tmp_path / "s", num_samples, splits={"train": 1.0, "valid": 0.0})
    plan = PretrainingPlan(make_config(batch={"size": 5}), [store])
    epoch, _, sample = taken(plan, 4)
    for number in range(20 // num_samples):
        assert sorted(sample[epoch == number]) == list(range(num_samples))
    assert ("matching" in plan.disabled_tasks) == (num_samples < 3)
    if num_samples < 3:
        assert not (plan.step(0).samples.task == MATCHING).any()


def test_two_stores_are_one_without_weights(complete: FeatureStore, ragged: FeatureStore) -> None:
    plan = PretrainingPlan(make_config(batch={"size": 80}), [complete, ragged])
    epoch, store, sample = taken(plan, 4)
    for number in range(2):
        for which, source in enumerate((complete, ragged)):
            assert sorted(sample[(epoch == number) & (store == which)]) == source.split_samples("train").tolist()


def test_weighted_stores_take_their_shares_and_pass_once_per_own_epoch(complete: FeatureStore, no_codes: FeatureStore) -> None:
    config = make_config(data={"stores": ["a", "b"], "store_weights": [0.7, 0.3]}, batch={"size": 4096})
    plan = PretrainingPlan(config, [complete, no_codes])
    epoch, store, sample = taken(plan, 2)
    for half in (store[:4096], store[4096:]):
        assert np.bincount(half).tolist() == [2867, 1229]
    for which, source in enumerate((complete, no_codes)):
        own = source.split_samples("train")
        epochs = epoch[store == which]
        whole = np.sum(store == which) // len(own)
        for number in range(whole):
            assert sorted(sample[(store == which) & (epoch == number)]) == own.tolist()
        assert epochs.max() == whole
    small = PretrainingPlan(
        make_config(data={"stores": ["a", "b"], "store_weights": [0.7, 0.3]}, batch={"size": 64}), [complete, no_codes]
    )
    assert (taken(small, 128)[2] == sample).all(), "the order does not depend on the batch"
    share = np.mean(store[:200] == 0)
    assert 0.5 < share < 0.9, "the stores alternate from the start"


def test_draws_come_in_the_mix(complete: FeatureStore) -> None:
    weights = {"mlm": 0.3, "mvm": 0.1, "mam": 0.1, "modality": 0.2, "matching": 0.3}
    plan = PretrainingPlan(
        make_config(tasks={"sampling_weights": weights}, batch={"size": 20_000, "max_tokens": 8192}), [complete]
    )
    draw = plan.step(0).samples.task
    # the weight of an impossible task (an utterance too short for MAM) goes to the others, so use samples that allow all
    long_enough = plan.step(0).samples.input_lengths
    allowed = (long_enough[:, AUDIO] >= 2) | (plan.step(0).samples.input_rows[:, AUDIO] < 0)
    shares = np.bincount(draw[allowed], minlength=5) / allowed.sum()
    assert np.abs(shares - list(weights.values())).max() < 0.03
    again = plan.step(1).samples
    assert (again.task >= 0).all()


def test_a_curriculum_changes_the_mix(complete: FeatureStore) -> None:
    tasks = {
        "sampling_weights": {"mlm": 1.0},
        "curriculum": [{"from_fraction": 0.5, "sampling_weights": {"matching": 1.0}}],
    }
    plan = PretrainingPlan(make_config(tasks=tasks), [complete])
    assert set(plan.step(49).samples.task) == {TASK_NAMES.index("mlm")}
    assert set(plan.step(50).samples.task) == {TASK_NAMES.index("matching")}


def test_a_loss_weight_of_0_switches_off(complete: FeatureStore) -> None:
    plan = PretrainingPlan(
        make_config(tasks={"mvm": {"weight": 0}, "dir": {"weight": 0}}, batch={"size": 500}), [complete]
    )
    step_plan = plan.step(0)
    assert not (step_plan.samples.task == TASK_NAMES.index("mvm")).any()
    assert (
        not step_plan.samples.columns["has_image_target"].any() and step_plan.samples.columns["has_text_target"].any()
    )
    assert set(step_plan.counts) == {"mlm", "mafr", "mac", "dtr", "matching"}
    assert plan.disabled_tasks == {"mvm": "its weight is 0"}


def test_samples_take_every_task_that_their_modalities_allow(ragged: FeatureStore) -> None:
    plan = PretrainingPlan(make_config(batch={"size": 20_000, "max_tokens": 8192}), [ragged])
    s = plan.step(0).samples
    assert plan.disabled_tasks == {}
    present = s.source_rows >= 0
    for subset in np.unique(present, axis=0):
        own = (present == subset).all(1)
        lengths = plan._input_lengths(s.store[own], s.source_rows[own])
        draws = {TASK_NAMES[d] for d in np.unique(s.task[own]) if d >= 0}
        text, image, audio = subset
        expected = {"modality"} if text or image else set()
        expected |= {"mlm"} if text else set()
        expected |= {"mvm"} if image else set()
        expected |= {"mam"} if audio and (lengths[:, AUDIO] >= 2).any() else set()
        expected |= {"matching"} if subset.sum() >= 2 else set()
        assert draws == expected, subset
        if expected - {"mam"}:
            assert (s.task[own] >= 0).all()


def test_off_says_what_no_sample_can_learn(tmp_path, no_codes: FeatureStore) -> None:
    assert set(PretrainingPlan(make_config(), [no_codes]).disabled_tasks) == {"dir"}
    assert (
        not PretrainingPlan(make_config(batch={"size": 500}), [no_codes])
        .step(0)
        .samples.columns["has_image_target"]
        .any()
    )
    text_only = make_store(tmp_path / "t", 20, num_codes_vocab=None)
    rows = text_only.rows.copy()
    rows[:, 1:] = -1
    text_only.__dict__["index"] = index_with(text_only, rows)
    assert set(PretrainingPlan(make_config(), [text_only]).disabled_tasks) == {"mvm", "mam", "matching", "dir"}
    rows = rows.copy()
    rows[:] = [-1, -1, 0]
    text_only.__dict__["index"] = index_with(text_only, rows)
    disabled = PretrainingPlan(make_config(), [text_only]).disabled_tasks
    assert set(disabled) == {"mlm", "mvm", "matching", "modality", "dtr", "dir"}


@pytest.mark.parametrize("missing", ["complete", "ragged"])
def test_counts_are_those_of_the_batches(request: pytest.FixtureRequest, missing: str) -> None:
    store = request.getfixturevalue(missing)
    config = make_config(batch={"size": 60})
    plan, model = PretrainingPlan(config, [store]), make_model(config)
    for step in range(3):
        step_plan = plan.step(step, world_size=2)
        terms = [model(batch) for rank in make_batches(config, [store], step_plan) for batch in rank]
        assert step_plan.counts == {loss: sum(t[loss].count for t in terms) for loss in step_plan.counts}
        assert all(count > 0 for count in step_plan.counts.values())


def test_planned_tokens_are_those_of_the_batches(ragged: FeatureStore) -> None:
    config = make_config(batch={"size": 60})
    step_plan = PretrainingPlan(config, [ragged]).step(0, world_size=3)
    batches = make_batches(config, [ragged], step_plan)
    assert [[m.num_tokens for m in rank] for rank in step_plan.micro_batches] == [
        [b.num_tokens for b in r] for r in batches
    ]
    total = sum(b.num_tokens for rank in batches for b in rank)
    assert step_plan.num_tokens == total
    assert (
        step_plan.packing_efficiency == pytest.approx(total / (3 * len(batches[0]) * 256))
        and step_plan.packing_efficiency <= 1
    )
    costs, _, _ = sample_and_step_flops(config, tasks_of(config).values(), step_plan.samples)
    ranks = [sum(costs[m.indices].sum() for m in rank) for rank in step_plan.micro_batches]
    assert step_plan.load_imbalance == pytest.approx(max(ranks) / (sum(ranks) / 3))
    assert step_plan.load_imbalance < 1.1


def test_a_batch_in_tokens(complete: FeatureStore) -> None:
    config = make_config(batch={"size": 2000, "unit": "tokens"})
    plan = PretrainingPlan(config, [complete])
    seen = [int(plan.step(step).samples.source_rows.shape[0]) for step in range(3)]
    assert len(set(seen)) == 1 and seen[0] == plan.batch_samples
    lengths = plan._input_lengths(np.zeros(80, int), complete.rows[complete.split_samples("train")]).sum(1) + 2
    assert plan.batch_samples == round(2000 / lengths.mean())


def test_validation_has_every_task_on_every_sample_and_stays_fixed(ragged: FeatureStore) -> None:
    config = make_config()
    plan = PretrainingPlan(config, [ragged])
    steps = plan.validation(chunk=16)
    assert all(step.num_samples == 16 for step in steps[:-1])
    again = PretrainingPlan(config, [ragged]).validation(world_size=2, chunk=16)
    assert all(equal(a.samples, b.samples) for a, b in zip(steps, again, strict=True))
    pairs = [(int(s), int(d)) for step in steps for s, d in zip(step.samples.sample, step.samples.task, strict=True)]
    assert len(pairs) == len(set(pairs))
    for sample in ragged.split_samples("valid"):
        rows = ragged.rows[sample]
        text, image, audio = rows >= 0
        frames = stacked_length(ragged.frame_counts[rows[AUDIO]], 2) if audio else 0
        expected = {0} if text else set()
        expected |= {1} if image else set()
        expected |= {2} if frames >= 2 else set()
        expected |= {MODALITY} if text or image else set()
        expected |= {MATCHING} if (rows >= 0).sum() >= 2 else set()
        assert {d for s, d in pairs if s == sample} == expected


def validated(plan: PretrainingPlan, max_samples: int) -> set[tuple[int, int]]:
    """(store, sample) of a validation pass."""
    steps = plan.validation(max_samples=max_samples)
    return {(int(n), int(s)) for step in steps for n, s in zip(step.samples.store, step.samples.sample, strict=True)}


def test_fewer_validation_samples_are_a_seeded_choice_of_all_stores(complete: FeatureStore, grouped: FeatureStore) -> None:
    stores = [complete, grouped]
    plan = PretrainingPlan(make_config(), stores)
    total = sum(len(store.split_samples("valid")) for store in stores)
    few, more, every = (validated(plan, n) for n in (6, 9, total))
    assert len(few) == 6 and len(more) == 9 and len(every) == total and few < more < every
    assert {number for number, _ in few} == {0, 1}, "no store is left out, none is taken in full"
    firsts = {(number, int(s)) for number, store in enumerate(stores) for s in store.split_samples("valid")[:3]}
    assert few != firsts and few == validated(PretrainingPlan(make_config(seed=1), stores), 6)
    assert few != validated(PretrainingPlan(make_config(seed=2), stores), 6)


@pytest.mark.parametrize(("later", "judged"), [({}, False), ({"matching": 1.0}, True)])
def test_a_task_whose_share_is_0_is_not_validated(later: dict[str, float], judged: bool, complete: FeatureStore) -> None:
    tasks = {
        "sampling_weights": {"mlm": 1.0, "modality": 0.5},
        "curriculum": [{"from_fraction": 0.5, "sampling_weights": later}] if later else [],
    }
    config = make_config(tasks=tasks)
    plan = PretrainingPlan(config, [complete])
    found = {TASK_NAMES[draw] for step in plan.validation() for draw in step.samples.task}
    assert found == {"mlm", "modality"} | ({"matching"} if judged else set())
    assert (
        plan.disabled_tasks["mvm"] == "its weight in tasks.sampling_weights is 0"
        and ("matching" in plan.disabled_tasks) != judged
    )
    assert set(config.trained_losses) == {"mlm", "dtr", "dir"} | ({"matching"} if judged else set())



def test_validation_writes_text_and_image_of_every_sample_when_the_target_is_dropped(complete: FeatureStore) -> None:
    config = make_config(tasks={"modality": {"always_drop_target": True}})
    (step,) = PretrainingPlan(config, [complete]).validation()
    s = step.samples
    own = set(complete.split_samples("valid"))
    assert set(s.sample[s.columns["has_text_target"]]) == own == set(s.sample[s.columns["has_image_target"]])
    assert (s.input_rows[s.columns["has_text_target"], TEXT] == -1).all()
    assert (s.input_rows[s.columns["has_image_target"], IMAGE] == -1).all()


# ---- modality dropping


def modality_samples(store: FeatureStore, **options) -> StepSamples:
    config = make_config(
        tasks={"sampling_weights": {"modality": 1.0}, "modality": options}, batch={"size": 40_000, "max_tokens": 8192}
    )
    samples = PretrainingPlan(config, [store]).step(0).samples
    keep = samples.task == MODALITY
    return select(samples, keep)


def test_each_modality_is_dropped_with_its_probability_and_never_all(complete: FeatureStore) -> None:
    s = modality_samples(complete)
    dropped = s.input_rows < 0
    assert not dropped.all(1).any()
    p, all_go = 0.3, 0.3**3
    marginal = (p - all_go) / (1 - all_go)  # 0.2806: what is left of 0.3 after the redraw
    assert marginal == pytest.approx(0.28, abs=0.001)
    assert np.abs(dropped.mean(0) - marginal).max() < 0.01
    for first, second in ((0, 1), (0, 2), (1, 2)):
        both = (dropped[:, first] & dropped[:, second]).mean()
        assert both == pytest.approx((p**2 - all_go) / (1 - all_go), abs=0.008)
    assert s.columns["has_text_target"].all() and s.columns["has_image_target"].all(), (
        "both decoders work whatever is dropped"
    )
    lengths = complete.text_lengths[s.source_rows[:, TEXT]]
    assert (s.columns["text_ends"] == (lengths <= 8)).all(), "what the model truncates has no end"
    assert 0 < s.columns["text_ends"].mean() < 1
    assert (s.columns["text_target_length"] == np.minimum(lengths + 1, np.where(lengths <= 8, 9, 8))).all()
    kept = ~dropped
    assert (s.input_rows[kept] == s.source_rows[kept]).all(), "what stays is the sample's own"


def test_two_modalities_and_one(ragged: FeatureStore) -> None:
    s = modality_samples(ragged)
    present, dropped = s.source_rows >= 0, (s.input_rows < 0) & (s.source_rows >= 0)
    two = (present.sum(1) == 2) & present[:, :2].any(1)
    marginal = (0.3 - 0.09) / (1 - 0.09)
    assert dropped[two].sum() / present[two].sum() == pytest.approx(marginal, abs=0.01)
    assert not ((s.input_rows < 0).all(1)).any()
    one = present.sum(1) == 1
    assert one.any() and not dropped[one].any()
    assert (s.columns["has_text_target"] == present[:, TEXT]).all() and (
        s.columns["has_image_target"] == present[:, IMAGE]
    ).all()


def test_the_target_is_always_dropped_on_request(complete: FeatureStore, ragged: FeatureStore) -> None:
    s = modality_samples(complete, always_drop_target=True, text_target_fraction=0.7)
    dropped = s.input_rows < 0
    assert (s.columns["has_text_target"] == dropped[:, TEXT]).all() and (
        s.columns["has_image_target"] == dropped[:, IMAGE]
    ).all()
    assert (s.columns["has_text_target"] | s.columns["has_image_target"]).all() and not dropped.all(1).any()
    by_chance = (0.3 - 0.09) / (1 - 0.09)  # of the two others, never both
    expected = [0.7 + 0.3 * by_chance, 0.3 + 0.7 * by_chance, by_chance]
    assert dropped.mean(0) == pytest.approx(expected, abs=0.01)
    written = masked(complete, AUDIO)  # with one input left, each sample has one target
    s = modality_samples(written, always_drop_target=True, text_target_fraction=0.7)
    assert s.columns["has_image_target"].mean() == pytest.approx(0.3, abs=0.01)
    assert (s.columns["has_image_target"] != s.columns["has_text_target"]).all()
    r = modality_samples(ragged, always_drop_target=True)
    present, left = r.source_rows >= 0, r.input_rows >= 0
    assert (present.sum(1) >= 2).all() and left.any(1).all(), "something must be left to write from"
    assert (r.columns["has_text_target"] == present[:, TEXT] & ~left[:, TEXT]).all()
    assert (r.columns["has_image_target"] == present[:, IMAGE] & ~left[:, IMAGE]).all()
    assert (r.columns["has_text_target"] | r.columns["has_image_target"]).all()


def test_a_fraction_of_the_image_targets_has_no_input_and_the_others_stay_as_they_are(complete: FeatureStore) -> None:
    options = {"always_drop_target": True, "text_target_fraction": 0.4}
    before, after = modality_samples(complete, **options), modality_samples(complete, **options, condition_dropout=0.2)
    nothing = (after.input_rows < 0).all(1)
    image = before.columns["has_image_target"]
    assert nothing.sum() / image.sum() == pytest.approx(0.2, abs=0.01) and not nothing[~image].any()
    assert (after.columns["has_image_target"] == image).all() and not after.columns["has_text_target"][nothing].any()
    assert (after.columns["text_target_length"][nothing] == 0).all()
    assert (after.input_rows[~nothing] == before.input_rows[~nothing]).all()
    assert (after.columns["has_text_target"] == before.columns["has_text_target"])[~nothing].all()
    assert (after.input_positions()[nothing] == 1).all(), "[CLS] alone"
    both = modality_samples(complete, condition_dropout=0.2)
    nothing = (both.input_rows < 0).all(1)
    assert nothing.mean() == pytest.approx(0.2, abs=0.01)
    assert (both.columns["has_text_target"] == ~nothing).all(), "the text decoder never writes from nothing"


def test_which_samples_have_no_input_depends_on_epoch_and_sample_alone(complete: FeatureStore) -> None:
    def without_input(step: int, size: int) -> dict[tuple[int, int], bool]:
        tasks = {"sampling_weights": {"modality": 1.0}, "modality": {"condition_dropout": 0.3}}
        plan = PretrainingPlan(make_config(tasks=tasks, batch={"size": size}), [complete])
        s = plan.step(step).samples
        return {(int(s.epoch[i]), int(s.sample[i])): bool((s.input_rows[i] < 0).all()) for i in range(len(s))}

    large = without_input(0, 400)
    small = {key: value for step in range(16) for key, value in without_input(step, 25).items()}
    assert large == small and 60 < sum(large.values()) < 180
    assert any(large[0, number] != large[1, number] for _, number in large), "another choice in every epoch"
    tasks = {"sampling_weights": {"modality": 1.0}, "modality": {"condition_dropout": 0.9}}
    for step_plan in PretrainingPlan(make_config(tasks=tasks), [complete]).validation():
        assert (step_plan.samples.input_rows >= 0).any(1).all(), "validation losses stay comparable"


def test_without_codes_only_text_is_written(no_codes: FeatureStore) -> None:
    for options in ({}, {"always_drop_target": True}):
        s = modality_samples(no_codes, **options)
        assert s.columns["has_text_target"].all() and not s.columns["has_image_target"].any()


# ---- truncated texts


def test_without_truncated_texts_both_versions_are_the_same_and_with_them_only_the_end_differs(complete: FeatureStore) -> None:
    tasks = {"sampling_weights": {"modality": 1.0}}
    longest = int(complete.text_lengths.max())
    for limit, differs in ((longest, False), (8, True)):
        config = make_config(tasks=tasks, model={"max_text_tokens": limit})
        plans = [PretrainingPlan(config, [complete], version) for version in (1, None)]
        assert [plan.version for plan in plans] == [1, 3]
        old, new = (plan.step(3) for plan in plans)
        before, after = old.samples.arrays(), new.samples.arrays()
        for name in set(before) - ({"columns/text_target_length", "columns/text_ends"} if differs else set()):
            np.testing.assert_array_equal(before[name], after[name], err_msg=name)
        truncated = int(
            (complete.text_lengths[new.samples.source_rows[new.samples.columns["has_text_target"], TEXT]] > limit).sum()
        )
        assert old.counts["dtr"] - new.counts["dtr"] == truncated
        assert (truncated > 0) == differs


@pytest.mark.parametrize("version", [1, 2])
def test_the_planned_counts_are_those_of_the_batches(complete: FeatureStore, version: int) -> None:
    config = make_config(tasks={"sampling_weights": {"modality": 1.0}})
    step_plan = PretrainingPlan(config, [complete], version).step(0)
    batches = [batch for rank in make_batches(config, [complete], step_plan) for batch in rank]
    sep = complete.description.tokenizer.sep_id
    written = [batch.parts["modality"].text for batch in batches]
    targets = [ids for part in written for ids in torch.split(part.target_ids, part.sequences.lengths.tolist())]
    assert sum(map(len, targets)) == step_plan.counts["dtr"]
    ended = sum(int(ids[-1]) == sep for ids in targets)
    lengths = complete.text_lengths[step_plan.samples.source_rows[step_plan.samples.columns["has_text_target"], TEXT]]
    assert ended == (len(lengths) if version == 1 else (lengths <= config.model.max_text_tokens).sum())
    assert sum(batch.num_tokens for batch in batches) == step_plan.num_tokens


# ---- tokens as the batch's unit


def test_a_batch_in_tokens_follows_the_mix_of_the_stores(tmp_path: Path) -> None:
    short = make_store(tmp_path / "short", 90, text_len=(1, 1), regions=(1, 1), frames=(1, 2))
    long = make_store(tmp_path / "long", 60, text_len=(8, 8), regions=(6, 6), frames=(15, 16))

    def plan(weights: tuple[float, ...] | None, version: int | None = None) -> PretrainingPlan:
        config = make_config(
            batch={"size": 4000, "unit": "tokens"}, data={"store_weights": weights, "stores": ["a", "b"]}
        )
        return PretrainingPlan(config, [short, long], version)

    for weights in ((0.9, 0.1), (0.1, 0.9), None):
        found = plan(weights)
        positions = found.batch_samples * 2 + sum(  # [CLS], [SEP] and the items of the samples that the first steps read
            found._input_lengths(s.store, s.source_rows).sum() / 20 for s in (found.step(step).samples for step in range(20))
        )
        assert positions == pytest.approx(4000, rel=0.03), weights
    assert plan((0.9, 0.1)).batch_samples > 2 * plan((0.1, 0.9)).batch_samples
    assert plan((0.9, 0.1), version=2).batch_samples == plan(None).batch_samples, "an older run continues as it began"
