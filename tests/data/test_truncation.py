"""What the model's limits drop is counted rightly; weights of stores are taken or refused."""

from pathlib import Path

import numpy as np
import pytest

from opt_ds.data.lengths import stacked_length
from opt_ds.data.mixing import SAMPLING_BLOCK, store_quotas, store_weights_note
from opt_ds.data.truncation import truncation_lines
from opt_ds.errors import UserError
from opt_ds.store import FeatureStore
from opt_ds.training.preflight import settle, store_problems
from tests.tiny import make_config, make_store


def test_truncated_items_are_counted_over_all_stores(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / name, 30, seed=seed) for seed, name in enumerate(("a", "b"))]
    model = make_config().model
    lengths = np.concatenate([stacked_length(store.frame_counts, model.audio_stack) for store in stores])
    longer = lengths[lengths > model.max_frames]
    assert 0 < len(longer) < len(lengths)
    text, image, audio = truncation_lines(model, stores)
    assert text.startswith("model.max_text_tokens=8 truncates ") and image.startswith("model.max_regions=6 truncates ")
    assert f"truncates {len(longer)} of {len(lengths)} audio clips ({100 * len(longer) / len(lengths):.1f} %" in audio
    assert f"on average {100 * np.mean(1 - model.max_frames / longer):.1f} % of their frames are dropped" in audio
    assert f"the longest needs model.max_frames={lengths.max()}" in audio
    run = [FeatureStore(store.path, tmp_path / "run") for store in stores]
    assert truncation_lines(model, run) == [text, image, audio]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureStore, "lengths", None)
        assert truncation_lines(model, [FeatureStore(store.path, tmp_path / "run") for store in stores]) == [text, image, audio]
    enough = make_config(model={"max_text_tokens": 10, "max_regions": 8, "max_frames": int(lengths.max())}).model
    assert truncation_lines(enough, stores) == []


def test_weights_of_stores() -> None:
    assert store_quotas((1.0, 3.0)).tolist() == [SAMPLING_BLOCK // 4, SAMPLING_BLOCK * 3 // 4]
    assert store_weights_note((1.0, 3.0)) is None
    with pytest.raises(UserError, match=r"weight 1e-05 .store number 2 of 2. is less than one sample in 4,096") as error:
        store_quotas((1.0, 1e-5))
    smallest = float(str(error.value).split("raise it to ")[1].split()[0])
    assert store_quotas((1.0, smallest)).min() == 1, "the weight that the message names is taken"
    assert "instead of" in (store_weights_note((1.0, 0.00037)) or "")


def test_sizes_come_from_the_store_unless_they_are_given(tmp_path: Path) -> None:
    store = str(make_store(tmp_path / "s").path)
    config, _, taken = settle("opt-tiny", [], [store])
    dims = FeatureStore(store).description.dims
    assert (config.model.vocab_size, config.model.image_feature_dim, config.model.audio_feature_dim) == (40, 8, 6)
    assert (config.model.image_num_classes, config.model.image_codebook_size) == (7, dims.num_codes)
    assert taken is not None and "model.vocab_size=40 (opt-tiny: 1200)" in taken
    assert store_problems(config, [FeatureStore(store)]) == []
    given, _, _ = settle("opt-tiny", ["model.vocab_size=99"], [store])
    assert given.model.vocab_size == 99
    (problem,) = store_problems(given, [FeatureStore(store)])
    assert "model.vocab_size is 99 but the store has 40: add --set model.vocab_size=40, or omit" in problem
    file = tmp_path / "mine.yaml"
    file.write_text("preset: opt-tiny\nmodel: {vocab_size: 77}\n")
    of_file, _, _ = settle(str(file), [], [store])
    assert (of_file.model.vocab_size, of_file.model.image_feature_dim) == (77, 8)
    again, _, nothing = settle(str(file), ["model.vocab_size=40", "data.store_weights=[1, 2]"], [store, store])
    assert again.data.store_weights == (1, 2) and nothing is not None
