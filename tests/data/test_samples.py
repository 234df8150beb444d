"""Planned samples made concrete: the store's own values, masked as the plan counted, targets untouched."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opt_ds.data.lengths import stacked_length
from opt_ds.data.masking import num_masked
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.modalities.audio import Audio, stack_frames
from opt_ds.store import FeatureStore, set_codes
from opt_ds.store.writer import StoreWriter
from tests.tiny import MAM, MLM, MODALITY, MVM, TASK_NAMES, make_config, make_packer, make_store, written


@given(num_frames=st.integers(0, 40), stack=st.integers(1, 9), data=st.data())
def test_stacked_frames_hold_every_frame_in_order_whatever_the_offset(num_frames: int, stack: int, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, stack - 1))
    frames = np.arange(num_frames * 3, dtype="float16").reshape(num_frames, 3)
    stacked = stack_frames(frames, stack, offset)
    assert stacked.shape == (int(stacked_length(num_frames, stack)), 3 * stack)
    assert stacked.shape == stack_frames(frames, stack, 0).shape, "the count does not depend on the offset"
    if num_frames:
        flat = stacked.reshape(-1, 3)
        assert (flat[offset : offset + num_frames] == frames).all()
        assert (flat[:offset] == frames[0]).all() and (flat[offset + num_frames :] == frames[-1]).all()
        assert stacked_length(num_frames, stack) * stack < num_frames + 2 * stack, "no whole frame of repetition too many"


def test_an_empty_audio_file_has_no_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of another program may hold this. The writer of opt_ds refuses it."""
    monkeypatch.setattr(StoreWriter, "_problem", lambda *_: None)
    store = make_store(tmp_path / "s", 10, frames=(0, 2))
    config = make_config(batch={"size": 40})
    step_plan, reader = PretrainingPlan(config, [store]).step(0), SampleReader(config, [store])
    with_audio = [index for index in range(40) if step_plan.samples.input_rows[index, AUDIO] >= 0]
    shapes = {reader.read(step_plan.samples, index).of(AUDIO).features.shape for index in with_audio}
    assert (0, 12) in shapes and all(width == 12 for _, width in shapes)


def test_masks_are_as_many_as_planned_and_only_where_the_draw_says(ragged: FeatureStore) -> None:
    config = make_config(batch={"size": 400})
    step_plan, reader = PretrainingPlan(config, [ragged]).step(0), SampleReader(config, [ragged])
    s, special = step_plan.samples, set(range(5))
    for index in range(400):
        sample, draw, lengths = reader.read(s, index), s.task[index], s.input_lengths[index]
        assert [len(sample.items.get(modality, ())) for modality in (TEXT, IMAGE, AUDIO)] == lengths.tolist()
        frames = Audio(config.model, AUDIO).count_masked(lengths[2], 0.15)
        counts = (num_masked(lengths[0], 0.15), num_masked(lengths[1], 0.15), frames)
        for modality in sample.items.keys() & {IMAGE, AUDIO}:
            expected = draw == (MLM, MVM, MAM)[modality] or draw == MODALITY
            assert sample.items[modality].is_masked.sum() == (counts[modality] if expected else 0)
        if TEXT in sample.items:
            original = ragged.text(s.input_rows[index, TEXT])[:8]
            changed = sample.items[TEXT].ids != original
            assert changed.sum() <= (counts[TEXT] if draw in (MLM, MODALITY) else 0)
            assert not set(original.tolist()) & special
            assert set(sample.items[TEXT].ids[changed].tolist()) <= {4, *range(5, 40)}
            if draw == MLM:
                assert sample.items[TEXT].masked.sum() == counts[TEXT] and not changed[~sample.items[TEXT].masked].any()
                assert (sample.targets["mlm"] == original).all()
        assert list(sample.targets) == [TASK_NAMES[draw]], "it has the targets of its task and of no other"
        if IMAGE in sample.items:
            stored = ragged.regions(s.input_rows[index, IMAGE])
            read = sample.items[IMAGE]
            assert (read.features == stored.features[:6]).all() and (read.boxes == stored.boxes[:6]).all()
            assert (read.labels == stored.labels[:6]).all()
        if AUDIO in sample.items:
            assert (
                sample.items[AUDIO].features == stack_frames(ragged.frames(s.input_rows[index, AUDIO]), 2, 0)[:8]
            ).all()


def test_a_sample_is_read_alike_in_any_step_that_plans_it(ragged: FeatureStore) -> None:
    """Masks depend on (seed, epoch, sample), not on the batch size or the global sample index."""
    large, small = make_config(batch={"size": 60}), make_config(batch={"size": 20})
    big = PretrainingPlan(large, [ragged]).step(0).samples
    for step in range(3):
        part = PretrainingPlan(small, [ragged]).step(step).samples
        for index in range(20):
            a = SampleReader(large, [ragged]).read(big, 20 * step + index)
            b = SampleReader(small, [ragged]).read(part, index)
            assert a.items.keys() == b.items.keys()
            parts = [(a.items[m].masked, b.items[m].masked) for m in a.items]
            parts += [(a.items[m].ids, b.items[m].ids) for m in a.items if m == TEXT]
            parts += [(getattr(written(a), name), getattr(written(b), name)) for name in ("text", "codes")]
            for left, right in parts:
                assert (left is None and right is None) or (left == right).all()
            assert (a.name, a.targets.get("matching")) == (b.name, b.targets.get("matching"))


def test_the_frame_offset_varies_in_training_and_not_in_validation(complete: FeatureStore) -> None:
    config = make_config(data={"frame_offset": True}, batch={"size": 200}, tasks={"sampling_weights": {"mlm": 1.0}})
    plan, reader = PretrainingPlan(config, [complete]), SampleReader(config, [complete])
    step_plan = plan.step(0).samples
    offsets = []
    for index in range(200):
        frames = complete.frames(step_plan.input_rows[index, AUDIO])
        found = [
            o
            for o in (0, 1)
            if (reader.read(step_plan, index).items[AUDIO].features == stack_frames(frames, 2, o)[:8]).all()
        ]
        assert found
        offsets += found if len(found) == 1 else []
    assert 0.3 < np.mean(offsets) < 0.7
    for step in plan.validation():
        for index in range(step.num_samples):
            row = step.samples.input_rows[index, AUDIO]
            if row >= 0:
                read = reader.read(step.samples, index).items[AUDIO].features
                assert (read == stack_frames(complete.frames(row), 2, 0)[:8]).all()


def test_every_image_code_and_all_64_positions_reach_the_decoder(tmp_path) -> None:
    store = make_store(tmp_path / "s", 128, splits={"train": 1.0, "valid": 0.0}, num_codes_vocab=None, regions=(1, 2))
    codes = np.random.default_rng(0).permutation(8192).reshape(128, 64)
    set_codes(store.path, codes, {"name": "dvae", "num_codes": 8192})
    store = FeatureStore(store.path)
    config = make_config(model={"image_codebook_size": 8192}, tasks={"sampling_weights": {"modality": 1.0}}, batch={"size": 128})
    step_plan, reader = PretrainingPlan(config, [store]).step(0), SampleReader(config, [store])
    batch = make_packer(config, [store]).pack([reader.read(step_plan.samples, index) for index in range(128)])
    decoder = batch.parts["modality"].image
    targets = decoder.target_ids.reshape(128, 64).numpy()
    assert (targets == codes[step_plan.samples.source_rows[:, IMAGE]]).all()
    assert sorted(targets.reshape(-1)) == list(range(8192)), "code 0 and code 8191 are there, none is shifted"
    inputs = decoder.input_ids.reshape(128, 64).numpy()
    assert (inputs[:, 0] == -1).all() and (inputs[:, 1:] == targets[:, :-1]).all()
    assert (decoder.positions.reshape(128, 64).numpy() == np.arange(64)).all()


@pytest.mark.parametrize("modalities", [(TEXT,), (IMAGE, AUDIO), (TEXT, IMAGE, AUDIO)])
def test_whole_samples_are_uncorrupted(complete: FeatureStore, modalities: tuple[int, ...]) -> None:
    sample = SampleReader(make_config(), [complete]).read_unmasked(0, 5, modalities)
    assert tuple(sample.items) == modalities
    if TEXT in modalities:
        assert (sample.items[TEXT].ids == complete.text(complete.rows[5, TEXT])[:8]).all()
    assert not sample.targets
    assert all(items.masked is None for items in sample.items.values())


def test_random_replacements_are_ordinary_tokens_of_the_vocabulary(complete: FeatureStore) -> None:
    config = make_config(tasks={"sampling_weights": {"mlm": 1.0}}, batch={"size": 3000, "max_tokens": 8192})
    step_plan, reader = PretrainingPlan(config, [complete]).step(0).samples, SampleReader(config, [complete])
    samples = [reader.read(step_plan, index) for index in range(3000)]
    shown = np.concatenate([s.items[TEXT].ids[s.items[TEXT].masked] for s in samples])
    original = np.concatenate([s.items[TEXT].original[s.items[TEXT].masked] for s in samples])
    assert len(shown) >= 3000 and np.mean(shown == 4) == pytest.approx(0.8, abs=0.03), "id 4 is [MASK]"
    random = shown[(shown != 4) & (shown != original)]
    assert len(random) / len(shown) == pytest.approx(0.1, abs=0.02)
    assert set(random.tolist()) == set(range(5, 40)), "every ordinary token, no [PAD], [UNK], [CLS], [SEP] or [MASK]"
