"""Test packing: `[CLS] text [SEP] regions frames` end to end, nothing dropped, every index at the correct position."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_ds.data.batch import PackedBatch, Packer
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.modalities.audio import AudioItems
from opt_ds.modalities.image import ImageItems
from opt_ds.modalities.text import TextItems
from opt_ds.store import FeatureStore
from opt_ds.store.schema import TokenizerDescription
from opt_ds.tasks.reconstruct import ReconstructionTargets
from tests.tiny import make_config, make_packer, read_samples, written

CLS, SEP = 2, 3
SUBSETS = [(bool(n & 1), bool(n & 2), bool(n & 4)) for n in range(1, 8)]
TOKENIZER = TokenizerDescription(pad_id=0, unk_id=1, cls_id=CLS, sep_id=SEP, mask_id=4, sha256="")


def packer() -> Packer:
    return Packer(make_config(), TOKENIZER)


def make_sample(subset: tuple[bool, bool, bool], seed: int, index: int = 0) -> Sample:
    """A sample of these modalities, masked somewhere, with every target that it can have."""
    rng = np.random.default_rng(seed)
    n, r, a = rng.integers(1, 9), rng.integers(1, 7), rng.integers(1, 9)
    sample = Sample(name=str(seed), index=index)
    if subset[0]:
        text = TextItems(rng.integers(5, 40, n), rng.integers(5, 40, n), masked=rng.random(n) < 0.4)
        sample.items[TEXT], sample.targets["mlm"] = text, text.original
    if subset[1]:
        features, boxes = rng.standard_normal((r, 8)).astype("float16"), rng.random((r, 7)).astype("float32")
        sample.items[IMAGE] = ImageItems(features, boxes, rng.integers(0, 7, r), masked=rng.random(r) < 0.4)
        if rng.random() < 0.7:
            sample.targets["mvm"] = sample.items[IMAGE].labels
    if subset[2]:
        frames = rng.standard_normal((a, 12)).astype("float16")
        sample.items[AUDIO] = AudioItems(frames, masked=rng.random(a) < 0.4)
        if rng.random() < 0.7:
            sample.targets["mam"] = True
    targets = ReconstructionTargets()
    if rng.random() < 0.5:
        targets.text = rng.integers(5, 40, rng.integers(0, 9))
        targets.text_ends = seed % 3 > 0 or not len(targets.text)
    if rng.random() < 0.5:
        targets.codes = rng.integers(0, 16, 64)
    if targets.text is not None or targets.codes is not None:
        sample.targets["modality"] = targets
    if (label := int(rng.integers(-1, 5))) >= 0:
        sample.targets["matching"] = label
    return sample


def expected_rows(sample: Sample) -> list[tuple[str, object]]:
    """Return the layout: one entry per packed position."""
    rows: list[tuple[str, object]] = [("token", CLS)]
    if TEXT in sample.items:
        rows += [("token", int(t)) for t in sample.items[TEXT].ids] + [("token", SEP)]
    if IMAGE in sample.items:
        rows += [("region", f.tolist()) for f in sample.items[IMAGE].features]
    if AUDIO in sample.items:
        rows += [("frame", f.tolist()) for f in sample.items[AUDIO].features]
    return rows


def packed_rows(batch: PackedBatch) -> list[tuple[str, object]]:
    inputs = batch.inputs
    rows = [("token", int(t)) for t in inputs.parts[TEXT].ids]
    rows += [("region", f.tolist()) for f in inputs.parts[IMAGE].features]
    rows += [("frame", f.tolist()) for f in inputs.parts[AUDIO].features]
    return [rows[i] for i in inputs.gather_index.tolist()]


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_layout_of_each_subset_of_modalities(subset: tuple[bool, bool, bool]) -> None:
    sample = make_sample(subset, seed=11)
    batch = packer().pack([sample])
    assert packed_rows(batch) == expected_rows(sample)
    assert batch.inputs.parts[TEXT].positions.tolist() == list(range(len(batch.inputs.parts[TEXT].ids)))
    assert batch.inputs.sequences.cu_seqlens.tolist() == [0, len(expected_rows(sample))]
    if AUDIO in sample.items:
        assert batch.inputs.parts[AUDIO].positions.tolist() == list(range(len(sample.items[AUDIO].features)))


@given(kinds=st.lists(st.tuples(st.sampled_from(SUBSETS), st.integers(0, 10_000)), max_size=8))
@settings(max_examples=80, deadline=None)
def test_unpacking_gives_back_the_samples(kinds: list[tuple[tuple[bool, bool, bool], int]]) -> None:
    samples = [make_sample(subset, seed, index=7 * i) for i, (subset, seed) in enumerate(kinds)]
    batch = packer().pack(samples)
    inputs, total = batch.inputs, batch.inputs.sequences.total
    assert sorted(inputs.gather_index.tolist()) == list(range(total))
    index = torch.cat([inputs.parts[TEXT].index, inputs.parts[IMAGE].index, inputs.parts[AUDIO].index])
    assert (inputs.gather_index[index] == torch.arange(total)).all()
    rows, bounds = packed_rows(batch), inputs.sequences.cu_seqlens.tolist()
    assert len(inputs.sequences) == len(samples) == batch.num_samples and bounds[-1] == total
    for i, sample in enumerate(samples):
        assert rows[bounds[i] : bounds[i + 1]] == expected_rows(sample)
        assert inputs.cls_index[i] == bounds[i] and inputs.sample_indices[i] == sample.index
    check_targets(batch, samples, bounds)
    parts = (batch.parts["mlm"].index, batch.parts["mvm"].index, batch.parts["mam"].index, batch.parts["matching"].index,
             batch.parts["modality"].text.memory_index, batch.parts["modality"].image.memory_index)  # fmt: skip
    read = sorted({position for part in parts for position in part.tolist()})
    assert batch.read.index.tolist() == read, "what some task reads, once"
    assert batch.read.sequences.lengths.tolist() == [
        sum(first <= position < end for position in read) for first, end in itertools.pairwise(bounds)
    ]


def check_targets(batch: PackedBatch, samples: list[Sample], bounds: list[int]) -> None:
    """Every index of every task points at the item that it names, sample by sample, in order."""
    inputs = batch.inputs
    tokens, regions, frames, sizes, examples = [], [], [], [], []
    for i, s in enumerate(samples):
        num_text = 1 if TEXT not in s.items else len(s.items[TEXT].ids) + 2
        num_regions = 0 if IMAGE not in s.items else len(s.items[IMAGE].features)
        if "mlm" in s.targets:
            tokens += [(bounds[i] + 1 + p, int(s.items[TEXT].original[p])) for p in np.flatnonzero(s.items[TEXT].masked)]
        if "mvm" in s.targets:
            regions += [(bounds[i] + num_text + p, s.items[IMAGE].features[p].tolist(), int(s.items[IMAGE].labels[p]))
                        for p in np.flatnonzero(s.items[IMAGE].masked)]  # fmt: skip
        if "mam" in s.targets:
            places = np.flatnonzero(s.items[AUDIO].masked)
            frames += [(bounds[i] + num_text + num_regions + p, s.items[AUDIO].features[p].tolist(), int(p)) for p in places]
            sizes.append((len(places), s.items[AUDIO].features.tolist()))
        if "matching" in s.targets:
            examples.append((bounds[i], s.targets["matching"]))
    t, r, f = batch.parts["mlm"], batch.parts["mvm"], batch.parts["mam"]
    assert list(zip(t.index.tolist(), t.targets.tolist(), strict=True)) == tokens
    assert list(zip(r.index.tolist(), inputs.parts[IMAGE].features[r.rows].tolist(), r.labels.tolist(), strict=True)) == regions
    assert inputs.parts[IMAGE].masked[r.rows].all() and inputs.parts[AUDIO].masked[f.rows].all()
    assert list(zip(f.index.tolist(), inputs.parts[AUDIO].features[f.rows].tolist(), f.places.tolist(), strict=True)) == frames
    assert f.sequences.lengths.tolist() == [count for count, _ in sizes]
    utterances = torch.split(inputs.parts[AUDIO].features[f.utterance_rows], f.utterances.lengths.tolist())
    assert [u.tolist() for u in utterances] == [whole for _, whole in sizes]
    assert (
        list(zip(batch.parts["matching"].index.tolist(), batch.parts["matching"].labels.tolist(), strict=True))
        == examples
    )
    part = batch.parts["modality"]
    for decoder, name, begin in ((part.text, "text", CLS), (part.image, "codes", -1)):
        who = [i for i, s in enumerate(samples) if getattr(written(s), name) is not None]
        assert len(decoder.sequences) == len(decoder.memory) == len(who)
        bounds_w, bounds_m = decoder.sequences.cu_seqlens.tolist(), decoder.memory.cu_seqlens.tolist()
        for k, i in enumerate(who):
            own = slice(bounds_w[k], bounds_w[k + 1])
            items = getattr(written(samples[i]), name).tolist()
            end = [SEP] if begin == CLS and written(samples[i]).text_ends else []
            assert decoder.target_ids[own].tolist() == items + end
            assert decoder.input_ids[own].tolist() == [begin, *items, *end][:-1]
            assert decoder.positions[own].tolist() == list(range(len(items + end)))
            memory = decoder.memory_index[bounds_m[k] : bounds_m[k + 1]].tolist()
            assert memory == list(range(bounds[i], bounds[i + 1])), "a decoder sees its own sample, all of it"


def test_a_micro_batch_of_no_samples() -> None:
    batch = packer().pack([])
    assert batch.num_samples == batch.num_tokens == 0
    assert batch.inputs.parts[IMAGE].features.shape == (0, 8) and batch.inputs.parts[AUDIO].features.shape == (0, 12)
    assert batch.inputs.parts[IMAGE].boxes.shape == (0, 7)


def test_features_lie_at_64_bytes_as_in_the_store() -> None:
    """Copies are slow where source and target are less than a cache line out of step."""
    inputs = packer().pack([make_sample((True, True, True), seed) for seed in range(5)]).inputs
    assert inputs.parts[IMAGE].features.data_ptr() % 64 == inputs.parts[AUDIO].features.data_ptr() % 64 == 0


def test_a_batch_moves_as_one(ragged: FeatureStore) -> None:
    config = make_config()
    batch = make_packer(config, [ragged]).pack(read_samples(config, [ragged]))
    moved = batch.to("meta")
    for part in (moved.inputs.parts[TEXT].ids, moved.inputs.sequences.cu_seqlens, moved.parts["mam"].utterances.cu_seqlens,
                 moved.parts["modality"].image.memory_index, moved.parts["matching"].labels):  # fmt: skip
        assert part.device.type == "meta"
    assert moved.inputs.sequences.total == batch.inputs.sequences.total and moved.sample_names == batch.sample_names
