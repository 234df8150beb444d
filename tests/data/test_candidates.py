"""Test samples with candidates: one true caption and negatives per group, each group in one micro-batch, exact sums."""

from typing import Any

import numpy as np
import pytest
import torch

from opt_ds.config import Config
from opt_ds.data.micro_batches import distribute
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.data.step_plan import StepPlan, _chunks
from opt_ds.data.step_samples import GROUP
from opt_ds.errors import UserError
from opt_ds.store import FeatureStore
from opt_ds.tasks.base import total_loss
from opt_ds.tasks.baselines import trivial_baselines
from opt_ds.tasks.caption_negatives import CaptionCandidate
from opt_ds.tasks.matching_captions import candidates_term
from tests.tiny import MATCHING, make_batches, make_config, make_model, make_packer, positions_of

KINDS = ("swap", "replace", "caption")


def config_of(candidates: int = 4, weights: dict[str, float] | None = None, **matching: Any) -> Config:
    tasks = {"sampling_weights": weights or {"matching": 1.0}, "matching": {"candidates": candidates, **matching}}
    return make_config(tasks=tasks, batch={"size": 60, "max_tokens": 400})


def groups_of(step_plan: StepPlan) -> dict[int, list[int]]:
    """Group -> its samples by the number of the candidate."""
    found: dict[int, list[int]] = {}
    for index, group in enumerate(step_plan.samples.columns[GROUP].tolist()):
        if group >= 0:
            found.setdefault(group, []).append(index)
    return found


@pytest.mark.parametrize("name", ["complete", "ragged", "grouped"])
def test_a_group_is_a_caption_and_negatives_with_the_same_other_inputs(request: pytest.FixtureRequest, name: str) -> None:
    store, config = request.getfixturevalue(name), config_of(5)
    step_plan, reader = PretrainingPlan(config, [store]).step(2), SampleReader(config, [store])
    s, kinds, groups = step_plan.samples, [], groups_of(step_plan)
    assert len(groups) > 10
    true = {}  # group of the store -> its captions, as the model reads them
    for sample, row in enumerate(store.rows[:, TEXT].tolist()):
        if row >= 0:
            true.setdefault(int(store.groups[sample]), set()).add(tuple(store.text(row)[:8].tolist()))
    for members in groups.values():
        assert s.columns["matching_candidate"][members].tolist() == [0, 1, 2, 3, 4]
        assert members[0] < 60 and min(members[1:]) >= 60, "copies follow the step's own samples"
        assert len({(s.epoch[i], s.store[i], s.sample[i], s.columns["matching_label"][i]) for i in members}) == 1
        assert len({tuple(s.input_rows[i, IMAGE:]) for i in members}) == 1 and (s.input_rows[members, TEXT] >= 0).all()
        samples = [reader.read(s, i) for i in members]
        texts = [tuple(sample.items[TEXT].ids.tolist()) for sample in samples]
        own = true[int(store.groups[s.sample[members[0]]])]
        assert texts[0] in own and not own & set(texts[1:])
        assert [len(text) for text in texts] == s.input_lengths[members, TEXT].tolist()
        assert [len(sample.items) for sample in samples] == [len(samples[0].items)] * 5
        targets = [sample.targets["matching"] for sample in samples]
        assert [target.number for target in targets] == [0, 1, 2, 3, 4] and len({target.group for target in targets}) == 1
        present = {TEXT, IMAGE, AUDIO} & set(samples[0].items)
        assert targets[0].label == {frozenset({0, 2}): 2, frozenset({0, 1}): 3}.get(frozenset(present), 0)
        kinds += [s.columns["matching_exchange"][i] for i in members]
    assert np.array(kinds).reshape(-1, 5)[:, :3].tolist() == [[-1, 0, 1]] * len(groups)
    others = [i for i in range(60) if s.columns[GROUP][i] < 0 and s.task[i] == MATCHING]
    for i in others:  # pairs of image and audio, and texts of no tokens
        assert s.input_rows[i, TEXT] < 0 and isinstance(reader.read(s, i).targets["matching"], int)
    assert step_plan.counts["matching"] == len(groups) + len(others)
    assert step_plan.num_copies == 4 * len(groups) == len(s) - 60


def test_swapped_captions_have_the_same_words(complete: FeatureStore) -> None:
    config = config_of(2, candidate_kinds=["swap"])
    step_plan, reader = PretrainingPlan(config, [complete]).step(0), SampleReader(config, [complete])
    same = []
    for members in groups_of(step_plan).values():
        one, other = (reader.read(step_plan.samples, i).items[TEXT].ids for i in members)
        assert (one != other).any()
        if len(set(one.tolist())) > 1:
            same.append(sorted(one) == sorted(other))
    assert len(same) > 20 and all(same)


def test_the_fraction_of_samples_with_candidates(complete: FeatureStore) -> None:
    config = config_of(2, candidate_fraction=0.5, pair_probability=0.0)
    columns = [PretrainingPlan(config, [complete]).step(step).samples.columns for step in range(20)]
    grouped = np.concatenate([own[GROUP][:60] >= 0 for own in columns])
    labels = np.concatenate([own["matching_label"][:60] for own in columns])
    assert grouped.mean() == pytest.approx(0.5, abs=0.05)
    assert set(labels[grouped]) == {0} and set(labels[~grouped]) == {0, 1, 2, 3, 4}, "the others are classified alone"


def test_hard_negatives_are_captions_of_other_groups(grouped: FeatureStore) -> None:
    config = config_of(3, candidate_kinds=["caption"], hard_negative_fraction=1.0)
    s = PretrainingPlan(config, [grouped]).step(0).samples
    negative = np.flatnonzero(s.columns["matching_candidate"] > 0)
    owner = {int(row): sample for sample, row in enumerate(grouped.rows[:, TEXT])}
    others = [grouped.groups[owner[int(row)]] for row in s.input_rows[negative, TEXT]]
    assert len(negative) > 20 and (s.input_rows[negative, TEXT] != s.source_rows[negative, TEXT]).all()
    assert (np.array(others) != grouped.groups[s.sample[negative]]).all()


def test_the_other_samples_of_a_step_are_those_without_candidates(complete: FeatureStore) -> None:
    weights = {"matching": 1.0, "mlm": 1.0, "modality": 1.0}
    without, with_them = (
        PretrainingPlan(config_of(count, weights), [complete]).step(1).samples for count in (1, 4)
    )
    assert GROUP not in without.columns and set(without.columns) < set(with_them.columns)
    alone = np.flatnonzero(with_them.columns[GROUP][:60] < 0)
    assert 60 > len(alone) > 20
    for name, array in without.arrays().items():
        assert np.array_equal(array[alone], with_them.arrays()[name][alone]), name
    assert np.array_equal(without.sample, with_them.sample[:60]) and np.array_equal(without.task, with_them.task[:60])


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_group_is_in_one_micro_batch_within_the_budget(complete: FeatureStore, world_size: int) -> None:
    config = config_of(4, {"matching": 1.0, "mlm": 1.0, "modality": 1.0})
    plan = PretrainingPlan(config, [complete])
    for step_plan in (plan.step(0, world_size), *plan.validation(world_size, chunk=16)):
        groups = step_plan.samples.columns[GROUP]
        place: dict[int, set] = {}
        taken = []
        for rank, micro_batches in enumerate(step_plan.micro_batches):
            for k, micro_batch in enumerate(micro_batches):
                assert micro_batch.num_tokens <= 400 and (np.diff(micro_batch.indices) > 0).all()
                taken += micro_batch.indices.tolist()
                for group in groups[micro_batch.indices].tolist():
                    place.setdefault(group, set()).add((rank, k))
        assert sorted(taken) == list(range(len(step_plan.samples)))
        assert all(len(where) == 1 for group, where in place.items() if group >= 0)
        for members in groups_of(step_plan).values():
            assert sorted(step_plan.samples.columns["matching_candidate"][members]) == [0, 1, 2, 3]
    validated = [step_plan.samples for step_plan in plan.validation(1, chunk=16)]
    assert max(map(len, validated)) <= 16 and sum((s.columns["matching_candidate"] == 0).sum() for s in validated) > 5


def test_groups_are_distributed_as_samples_of_their_size() -> None:
    rng = np.random.default_rng(0)
    lengths, groups = rng.integers(5, 40, 400), np.where(rng.random(400) < 0.5, rng.integers(0, 60, 400), -1)
    found = distribute(3 * np.arange(400), lengths, 2, 600, None, groups)
    assert sorted(found.indices.tolist()) == (3 * np.arange(400)).tolist()
    for rank in found:
        for m in rank:
            assert m.num_tokens == lengths[m.indices // 3].sum() == m.cost <= 600
            inside = set(groups[m.indices // 3].tolist()) - {-1}
            outside = set(np.delete(groups, m.indices // 3).tolist())
            assert not inside & outside
    assert found.loads.max() / found.loads.mean() < 1.05
    none = distribute(np.arange(400), lengths, 2, 600, None, np.full(400, -1))
    assert none.indices.tolist() == distribute(np.arange(400), lengths, 2, 600).indices.tolist()


def test_chunks_do_not_divide_groups() -> None:
    groups = np.array([7, -1, 3, -1, 3, 7, 3, 7, -1])
    parts = [part.tolist() for part in _chunks(np.array([0, 1, 2, 4, 5, 6, 7, 8]), 4, groups)]
    assert parts == [[0, 5, 7, 1], [2, 4, 6, 8]]
    assert [part.tolist() for part in _chunks(np.arange(5), 2, None)] == [[0, 1], [2, 3], [4]]
    assert _chunks(np.arange(0), 2, groups) == []


@pytest.mark.parametrize("loss", ["bce", "ce"])
def test_loss_and_gradient_do_not_depend_on_ranks_and_micro_batches(complete: FeatureStore, loss: str) -> None:
    """With dropout of 0 the sum over ranks and micro-batches is that of one batch, and equals plain PyTorch's."""
    found = []
    for world_size, max_tokens in ((1, 100_000), (1, 260), (2, 400)):
        tasks = {"sampling_weights": {"matching": 0.7, "mlm": 0.3},
                 "matching": {"candidates": 4, "loss": loss, "candidate_fraction": 0.7}}  # fmt: skip
        config = make_config(tasks=tasks, batch={"size": 40, "max_tokens": max_tokens})
        model, step_plan = make_model(config).double(), PretrainingPlan(config, [complete]).step(0, world_size)
        ranks = make_batches(config, [complete], step_plan)
        assert len(ranks) == world_size and (len(ranks[0]) > 1) == (max_tokens < 1000)
        total = 0.0
        for rank in ranks:
            for batch in rank:
                part = total_loss(model(batch), step_plan.counts, config.tasks, 1)
                part.backward()
                total += part.item()
        found.append((total, torch.cat([p.grad.flatten() for p in model.parameters()])))
        if world_size * max_tokens == 100_000:
            reference = _plain_loss(config, model, ranks[0][0], complete, loss)
            terms = model(ranks[0][0])["matching"]
            assert terms.count == step_plan.counts["matching"]
            assert terms.sum.item() == pytest.approx(reference, rel=1e-5)
    for total, gradient in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-6)
        assert (gradient - found[0][1]).norm() <= 1e-5 * found[0][1].norm()


def _plain_loss(config: Config, model: Any, batch: Any, store: FeatureStore, loss: str) -> float:
    """The sum of the matching loss from scores of single samples, in plain PyTorch."""
    step_plan, reader = PretrainingPlan(config, [store]).step(0, 1), SampleReader(config, [store])
    with torch.no_grad():
        cls = model.encode_cls(batch.inputs)
        scores = (cls @ model.matching.score.weight.T + model.matching.score.bias).float()
    groups: dict[int, list[torch.Tensor]] = {}
    total = 0.0
    for place, index in enumerate(step_plan.micro_batches[0][0].indices.tolist()):
        target = reader.read(step_plan.samples, index).targets.get("matching")
        if isinstance(target, CaptionCandidate):
            own = scores[place].log_softmax(0) if loss == "ce" else scores[place]
            groups.setdefault(target.group, []).append(own[target.label])
        elif target is not None and loss == "ce":
            total -= float(scores[place].log_softmax(0)[target])
        elif target is not None:
            wanted = torch.nn.functional.one_hot(torch.tensor(target), 5).float()
            total += float(torch.nn.functional.binary_cross_entropy_with_logits(scores[place], wanted))
    assert len(groups) > 5 and {len(own) for own in groups.values()} == {4}
    return total - sum(float(torch.stack(own).log_softmax(0)[0]) for own in groups.values())


def test_a_scorer_of_words_alone_is_at_chance_on_swapped_captions(complete: FeatureStore) -> None:
    """Equal scores are right by chance, not always, though the true caption comes first."""
    config = config_of(4, candidate_kinds=["swap"])
    step_plan, reader = PretrainingPlan(config, [complete]).step(0), SampleReader(config, [complete])
    members = [group for group in groups_of(step_plan).values() if len(set(_ids(reader, step_plan, group[0]))) > 2]
    samples = [reader.read(step_plan.samples, i) for group in members for i in group]
    batch = make_packer(config, [complete]).pack(samples).parts["matching"].candidates
    weight = torch.from_numpy(np.random.default_rng(0).integers(-50, 50, 40)).float()
    by_position = {
        cls: float(weight[sample.items[TEXT].ids].sum())
        for sample, (cls, *_) in zip(samples, positions_of(samples), strict=True)
    }
    scores = torch.tensor([by_position[position] for position in batch.index.tolist()])
    term = candidates_term(scores, batch)
    assert term.count == len(members) and term.metrics["correct"].item() == pytest.approx(len(members) / 4)
    assert term.sum.item() == pytest.approx(len(members) * np.log(4), rel=1e-6)
    told = candidates_term(scores + (batch.columns == 0) * 1e-3, batch)
    assert told.metrics["correct"].item() == len(members)


def _ids(reader: SampleReader, step_plan: StepPlan, index: int) -> list[int]:
    return reader.read(step_plan.samples, index).items[TEXT].ids.tolist()


def test_the_baseline_chooses_a_candidate_at_random(complete: FeatureStore) -> None:
    config = config_of(4, pair_probability=0.0)
    assert trivial_baselines(config, [complete])["matching"] == pytest.approx(np.log(4))


def test_settings_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(UserError, match=r"batch\.max_tokens 256 cannot hold .* lower tasks\.matching\.candidates"):
        make_config(tasks={"matching": {"candidates": 64}})
    with pytest.raises(UserError, match=r"tasks\.matching\.candidates: must be at least 1"):
        config_of(0)
    with pytest.raises(UserError, match=r"candidate_kinds\.0: choose 'swap', 'replace' or 'caption'"):
        config_of(2, candidate_kinds=["swop"])
