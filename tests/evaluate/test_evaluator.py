import numpy as np
import pytest
import torch

from opt_ds.data.planned import AUDIO, IMAGE, TEXT
from opt_ds.evaluate.evaluator import SUBSETS, Evaluator
from opt_ds.model.generation import DecodingConfig


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


def test_text_log_likelihood_is_the_sum_of_the_decoder_s_log_probabilities(evaluator: Evaluator) -> None:
    gallery = evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 4)
    samples = [evaluator.read(index, (AUDIO,)) for index in gallery]
    texts = [evaluator.read(index, (TEXT,)).token_ids for index in gallery]
    likelihood = evaluator.text_log_likelihood(samples, texts)
    for i, sample in enumerate(samples):
        for j, text in enumerate(texts):
            sample.written_text = text
            batch = evaluator.packer.pack([sample])
            with torch.inference_mode():
                scores = evaluator.model.text_decoder.scores(batch.written_text, evaluator.model.encode(batch.inputs)).double()
            expected = torch.log_softmax(scores, -1).gather(1, batch.written_text.target_ids[:, None]).sum()
            assert likelihood[i, j] == pytest.approx(float(expected), abs=1e-4)


def test_a_seeded_gallery_is_a_choice_of_the_split(evaluator: Evaluator) -> None:
    chosen = evaluator.samples_with("train", (TEXT,), 10, seed=3)
    assert len(set(chosen)) == 10
    assert set(chosen) <= set(evaluator.store.split_samples("train"))
    assert chosen.tolist() == evaluator.samples_with("train", (TEXT,), 10, seed=3).tolist()
    assert chosen.tolist() != evaluator.samples_with("train", (TEXT,), 10, seed=4).tolist()
