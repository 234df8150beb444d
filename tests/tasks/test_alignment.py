"""Alignment: its views in the step plan, what is no negative, the validation pass and its baseline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from opt_ds.config import Config, load_config
from opt_ds.data.loader import MicroBatchLoader
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.data.shared_plans import read_plan, write_plan
from opt_ds.errors import UserError
from opt_ds.evaluation.ablation import rows_without
from opt_ds.model.opt import OPT
from opt_ds.store import FeatureStore
from opt_ds.tasks.alignment import Alignment
from opt_ds.tasks.baselines import baseline_result
from opt_ds.tasks.views import PAIRS, VIEWS
from opt_ds.training.validation import validate
from tests.tiny import ALIGNMENT, index_with, make_config, make_model

WEIGHTS = {"mlm": 0.3, "modality": 0.3, "alignment": 0.4}


def config_with(**alignment: Any) -> Config:
    return make_config(tasks={"sampling_weights": WEIGHTS, "alignment": alignment}, batch={"size": 40})


def with_equal_texts(store: FeatureStore, *pairs: tuple[int, int]) -> FeatureStore:
    """The same store, as if the second sample of each pair had the first one's text."""
    changed = FeatureStore(store.path)
    rows = changed.index.rows.copy()
    for first, second in pairs:
        rows[second, TEXT] = rows[first, TEXT]
    changed.__dict__["index"] = index_with(changed, rows)
    return changed


def views_by_sample(store: FeatureStore, config: Config) -> dict[int, set[tuple[int, ...]]]:
    samples = PretrainingPlan(config, [store]).step(0).samples
    found: dict[int, set[tuple[int, ...]]] = {}
    for index in np.flatnonzero(samples.task == ALIGNMENT):
        view = tuple(np.flatnonzero(samples.input_rows[index] >= 0).tolist())
        views = found.setdefault(int(samples.sample[index]), set())
        assert view not in views, "each view once"
        views.add(view)
    return found


def test_each_sample_has_every_view_of_the_pairs_that_it_allows(ragged: FeatureStore) -> None:
    pairs_of = {name: {VIEWS[view] for view in views} for name, views in PAIRS.items()}
    for pairs in (tuple(PAIRS), ("image_text",), ("audio_text", "text_audio_image")):
        found = views_by_sample(ragged, config_with(pairs=pairs))
        assert len({len(views) for views in found.values()}) > (len(pairs) > 1), "some samples lack a modality"
        for sample, views in found.items():
            there = {*np.flatnonzero(ragged.rows[sample] >= 0).tolist()}
            expected = {view for pair in pairs for view in pairs_of[pair] if all(there.issuperset(v) for v in pairs_of[pair])}
            assert views == expected and len(views) >= 2


def test_the_plan_counts_samples_and_puts_their_views_into_the_first_micro_batches(complete: FeatureStore) -> None:
    config = config_with()
    plan = PretrainingPlan(config, [complete])
    step_plan = plan.step(2, 2)
    samples = step_plan.samples
    own = np.flatnonzero(samples.task == ALIGNMENT)
    assert step_plan.num_samples == 40 and len(samples) == 40 + 3 * len(own) // 4 == 40 + step_plan.num_copies
    assert step_plan.counts["alignment"] == len(own) / 4
    for micro_batches in step_plan.micro_batches:
        assert 0 < step_plan.first_pass < len(micro_batches)
        for k, micro_batch in enumerate(micro_batches):
            assert ((samples.task[micro_batch.indices] == ALIGNMENT) == (k < step_plan.first_pass)).all()
    every = np.concatenate([m.indices for rank in step_plan.micro_batches for m in rank])
    assert sorted(every) == list(range(len(samples)))
    assert step_plan.order(0) == [*range(step_plan.first_pass), *range(len(step_plan.micro_batches[0]))]


def test_the_loader_repeats_the_first_pass(complete: FeatureStore) -> None:
    plan = PretrainingPlan(config_with(), [complete])
    loader = MicroBatchLoader(plan, 0, 1, torch.device("cpu"))
    for step_plan, batches in loader.steps(0, 2):
        names = [batch.sample_names for batch in batches]
        first = step_plan.first_pass
        assert first and names[:first] == names[first : 2 * first] and len(names) == first + len(step_plan.micro_batches[0])
    loader.close()


def test_a_shared_plan_keeps_its_two_passes(complete: FeatureStore, tmp_path: Path) -> None:
    step_plan = PretrainingPlan(config_with(), [complete]).step(0, 2)
    write_plan(tmp_path / "plan", step_plan, "key")
    read = read_plan(tmp_path / "plan", 0, "key")
    assert read is not None and read.order(1) == step_plan.order(1) and read.num_samples == step_plan.num_samples
    assert [m.indices.tolist() for m in read.micro_batches[1]] == [m.indices.tolist() for m in step_plan.micro_batches[1]]


def test_it_is_off_and_has_no_weights_unless_it_is_configured(complete: FeatureStore) -> None:
    for preset in ("opt-tiny", "opt-emoji", "opt-base", "opt-small", "opt-large"):
        tasks = load_config(preset).tasks
        assert tasks.alignment is None and not tasks.sampling_weights.get("alignment")
        assert "alignment" not in tasks.active_losses and "no-alignment" not in rows_without(tasks)
    config = make_config()
    assert not [name for name, _ in OPT(config.model, config.tasks).named_parameters() if name.startswith("alignment")]
    plan = PretrainingPlan(config, [complete])
    assert "alignment" not in plan.disabled_tasks and plan.step(0).first_pass == 0
    with pytest.raises(UserError, match="alignment"):
        load_config("opt-tiny", ["tasks.alignment={pairs: [image_txet]}"])


def test_pairs_of_the_same_views_have_the_same_head() -> None:
    """Fine-tuning keeps the weights of the same head, whatever the order of its pairs."""

    def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
        configs = [config_with(**options) for options in (one, other)]
        shapes = [{name: p.shape for name, p in OPT(c.model, c.tasks).alignment.named_parameters()} for c in configs]
        found = Alignment.same_head(*(c.tasks.alignment for c in configs))
        assert found == (shapes[0] == shapes[1])
        return found

    assert same({"pairs": ["image_text", "audio_text"]}, {"pairs": ["audio_text", "image_text"]})
    assert same({"pairs": ["image_text", "audio_text"]}, {"pairs": ["image_text", "audio_text", "image_audio"], "bias": -5})
    assert not same({"pairs": ["image_text"]}, {"pairs": ["image_text", "audio_text"]})
    assert not same({}, {"width": 8}) and not same({}, {"loss": "sigmoid"})
    assert not Alignment.same_head(None, config_with().tasks.alignment)


def test_it_is_an_ablation_row_where_it_is_on() -> None:
    rows = rows_without(config_with().tasks)
    assert rows["no-alignment"] == ("alignment",) and rows["no-sample-level"] == ("matching", "alignment")


def test_a_store_without_pairs_disables_it(complete: FeatureStore) -> None:
    lone = FeatureStore(complete.path)
    rows = lone.index.rows.copy()
    rows[:, [IMAGE, AUDIO]] = -1
    lone.__dict__["index"] = index_with(lone, rows)
    assert "no sample has both views" in PretrainingPlan(config_with(), [lone]).disabled_tasks["alignment"]


def embeddings(model: OPT, config: Config, store: FeatureStore, samples: np.ndarray, view: str) -> torch.Tensor:
    """Embeddings of the validation pass, one sample at a time."""
    from opt_ds.data.batch import Packer

    reader, packer = SampleReader(config, [store]), Packer(config, store.description.tokenizer)
    batches = [packer.pack([reader.read_unmasked(0, int(index), VIEWS[view])]) for index in samples]
    cls = torch.cat([model.encode(batch.inputs)[:1] for batch in batches]).double()
    projection = model.alignment.projections[view]
    return F.normalize(cls @ projection.weight.double().T + projection.bias.double(), dim=1)


@torch.no_grad()
def validation_reference(model: OPT, config: Config, store: FeatureStore) -> tuple[float, float, float, float]:
    """Loss, R@1, and loss and R@1 of equal scores, over all validation samples; texts in common are excluded."""
    valid = store.split_samples("valid")
    texts = [tuple(store.text(row).tolist()[: config.model.max_text_tokens]) if row >= 0 else None
             for row in store.rows[valid, TEXT]]  # fmt: skip
    sums = {int(sample): [] for sample in valid}
    for first, second in PAIRS.values():
        there = [i for i, sample in enumerate(valid) if (store.rows[sample][[*VIEWS[first], *VIEWS[second]]] >= 0).all()]
        vectors = [embeddings(model, config, store, valid[there], view) for view in (first, second)]
        scores = vectors[0] @ vectors[1].T * model.alignment.log_scale.double().exp()
        same = torch.tensor([[i != j and texts[i] is not None and texts[i] == texts[j] for j in there] for i in there])
        scores = scores.masked_fill(same, -torch.inf)
        right = torch.arange(len(there))
        losses = (F.cross_entropy(scores, right, reduction="none") + F.cross_entropy(scores.T, right, reduction="none")) / 2
        hits = ((scores.argmax(0) == right).double() + (scores.argmax(1) == right)) / 2
        candidates = (~same).sum(1).double()
        for place, i in enumerate(there):
            values = (losses[place], hits[place], candidates[place].log(), 1 / candidates[place])
            sums[int(valid[i])].append([float(value) for value in values])
    means = [np.mean(values, axis=0) for values in sums.values() if values]
    loss, hit, alike, chance = np.mean(means, axis=0).tolist()
    return loss, hit, alike, chance


@pytest.mark.parametrize("max_tokens", [256, 64])
def test_validation_compares_all_samples_and_stands_beside_chance(ragged: FeatureStore, max_tokens: int) -> None:
    valid = ragged.split_samples("valid")
    with_text = [int(sample) for sample in valid if ragged.rows[sample, TEXT] >= 0]
    store = with_equal_texts(ragged, (with_text[0], with_text[2]), (with_text[1], with_text[3]))
    # Alignment alone, so that the small budget holds the longest view but no decoder targets.
    tasks = {"sampling_weights": {"alignment": 1.0}, "alignment": {}}
    config = make_config(tasks=tasks, model={"num_image_codes": 16}, batch={"size": 40, "max_tokens": max_tokens})
    model = make_model(config).eval()
    loss, hit, alike, chance = validation_reference(model, config, store)
    found = validate(model, config, store)
    assert found.losses["alignment"] == pytest.approx(loss, rel=1e-5)
    assert found.accuracies["alignment"] == pytest.approx(hit, abs=1e-6)
    baseline = baseline_result(config, [store])
    assert baseline.losses["alignment"] == pytest.approx(alike, rel=1e-6)
    assert baseline.accuracies["alignment"] == pytest.approx(chance, rel=1e-6)
    assert chance < 0.3 and abs(loss / alike - 1) < 2, "an untrained model guesses"


def test_the_baseline_of_the_sigmoid_loss_is_its_best_constant(complete: FeatureStore) -> None:
    count = len(complete.split_samples("valid"))
    best = min(np.log1p(np.exp(-c)) + (count - 1) * np.log1p(np.exp(c)) for c in np.linspace(-6, 0, 2001))
    assert baseline_result(config_with(loss="sigmoid"), [complete]).losses["alignment"] == pytest.approx(best, rel=1e-5)
