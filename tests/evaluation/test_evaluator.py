from copy import copy, deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator, held_out_splits
from opt_ds.features.text import train_wordpiece
from opt_ds.model.generation import DecodingConfig
from opt_ds.store.tokenizer import load_tokenizer
from opt_ds.tasks.reconstruct import ReconstructionTargets
from tests.tiny import make_config


@pytest.mark.parametrize("name", list(SUBSETS))
def test_every_modality_subset_goes_in(evaluator: Evaluator, name: str) -> None:
    samples = [evaluator.read(index, SUBSETS[name]) for index in evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 3)]
    codes = evaluator.write_codes(samples, DecodingConfig())
    assert codes.shape == (3, 64)
    assert len(evaluator.write_text(samples, DecodingConfig())) == 3
    assert np.isfinite(evaluator.matching_scores(samples)).all()


def test_results_do_not_depend_on_what_else_is_in_the_batch(evaluator: Evaluator) -> None:
    gallery = evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 9)
    samples = [evaluator.read(index, (IMAGE, AUDIO)) for index in gallery]
    together = evaluator.matching_scores(samples)
    alone = np.concatenate([evaluator.matching_scores([sample]) for sample in samples])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    texts = evaluator.write_text(samples, DecodingConfig())
    assert texts == [evaluator.write_text([sample], DecodingConfig())[0] for sample in samples]


def test_matching_scores_of_a_softmax_head_compare_between_samples(evaluator: Evaluator) -> None:
    gallery = evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 4)
    samples = [evaluator.read(index, (TEXT, IMAGE)) for index in gallery]
    raw = evaluator.matching_scores(samples)
    config = make_config(tasks={"matching": {"loss": "ce"}}, model={"num_image_codes": 64})
    model = deepcopy(evaluator.model)
    model.matching.loss = "ce"
    scores = Evaluator(model, config, evaluator.store).matching_scores(samples)
    np.testing.assert_allclose(np.exp(scores).sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(scores - raw, np.broadcast_to((scores - raw)[:, :1], raw.shape), atol=1e-5)
    assert np.ptp((scores - raw)[:, 0]) > 1e-3, "or raw scores would rank alike"


def test_text_log_likelihood_is_the_sum_of_the_decoder_s_log_probabilities(evaluator: Evaluator) -> None:
    gallery = evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 4)
    samples = [evaluator.read(index, (AUDIO,)) for index in gallery]
    texts = [evaluator.read(index, (TEXT,)).items[TEXT].ids for index in gallery]
    likelihood = evaluator.text_log_likelihood(samples, texts)
    for i, sample in enumerate(samples):
        for j, text in enumerate(texts):
            ends = len(text) < evaluator.config.model.max_text_tokens
            sample.targets["modality"] = ReconstructionTargets(text=text, text_ends=ends)
            batch = evaluator.packer.pack([sample])
            written = batch.parts["modality"].text
            with torch.inference_mode():
                scores = evaluator.model.text_decoder.scores(written, evaluator.model.encode(batch.inputs)).double()
            expected = torch.log_softmax(scores, -1).gather(1, written.target_ids[:, None]).sum()
            assert likelihood[i, j] == pytest.approx(float(expected), abs=1e-4)


def test_an_apostrophe_is_written_within_its_word(evaluator: Evaluator, tmp_path: Path) -> None:
    train_wordpiece(["man's shoe"], 100, tmp_path)
    writer = copy(evaluator)
    writer.tokenizer = load_tokenizer(tmp_path)
    assert writer.decode_text(writer.tokenizer("man's shoe")["input_ids"]) == "man's shoe"


def test_a_seeded_gallery_is_a_choice_of_the_split(evaluator: Evaluator) -> None:
    chosen = evaluator.samples_with("train", (TEXT,), 10, seed=3)
    assert len(set(chosen)) == 10
    assert set(chosen) <= set(evaluator.store.split_samples("train"))
    assert chosen.tolist() == evaluator.samples_with("train", (TEXT,), 10, seed=3).tolist()
    assert chosen.tolist() != evaluator.samples_with("train", (TEXT,), 10, seed=4).tolist()


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (["train", "test_concept", "test_variant", "valid"], ["test_variant", "test_concept"]),
        (["train", "valid", "testB", "test"], ["test", "testB"]),
        (["train", "valid"], ["valid"]),
        (["train", "valid", "test_empty"], ["valid"]),
    ],
)
def test_held_out_splits_are_the_test_splits_else_valid(splits: list[str], expected: list[str]) -> None:
    assert held_out_splits(store_with(splits)) == expected


def test_a_store_with_nothing_held_out_needs_a_choice() -> None:
    with pytest.raises(UserError, match="choose one with --split: all"):
        held_out_splits(store_with(["all"]))


def store_with(splits: list[str]) -> Any:
    """A store with these splits, of a sample each unless they are called empty."""
    return SimpleNamespace(
        path=Path("store"), description=SimpleNamespace(split_names=splits),
        split_samples=lambda name: np.arange("empty" not in name),
    )  # fmt: skip
