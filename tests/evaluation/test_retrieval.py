import numpy as np
import pytest

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.projections import DIRECTIONS, ProjectionControls
from opt_ds.evaluation.ranking import likeliest, log_mean_exp
from opt_ds.evaluation.retrieval import over_prior, retrieval, retrieval_lines, same_pairs
from opt_ds.store import FeatureStore
from tests.tiny import index_with, masked


def test_all_captions_of_an_image_are_right_for_it(evaluator: Evaluator) -> None:
    store = FeatureStore(evaluator.store.path)
    gallery = evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 6)
    rows = store.index.rows.copy()
    rows[gallery[1], IMAGE] = rows[gallery[0], IMAGE]
    rows[gallery[3], TEXT] = rows[gallery[2], TEXT]
    store.__dict__["index"] = index_with(store, rows)
    shared = Evaluator(evaluator.model, evaluator.config, store)
    alone, images, captions = np.eye(6, dtype=bool), np.eye(6, dtype=bool), np.eye(6, dtype=bool)
    images[[0, 1], [1, 0]] = captions[[2, 3], [3, 2]] = True
    for query, target, expected in (
        ((IMAGE,), TEXT, images | captions), ((TEXT,), IMAGE, images | captions), ((AUDIO,), TEXT, captions),
        ((IMAGE,), AUDIO, images), ((TEXT, AUDIO), IMAGE, images), ((TEXT, IMAGE), AUDIO, alone),
    ):  # fmt: skip
        assert (same_pairs(shared, gallery, gallery, query, target) == expected).all()
        assert (same_pairs(shared, gallery[:2], gallery, query, target) == expected[:2]).all()


def test_five_directions_by_both_scores(evaluator: Evaluator) -> None:
    controls = ProjectionControls(evaluator)
    found = retrieval(evaluator, "train", 6, 4, 3, controls=controls, transductive=True)
    assert found["untrained_seed"] == evaluator.config.seed
    for direction in DIRECTIONS:
        gallery = 3 if direction == "text_audio_to_image" else 4
        assert found[direction]["matching"]["candidates"] == gallery
        assert found[direction]["matching"]["chance"]["R@1"] == pytest.approx(1 / gallery)
        if direction != "text_audio_to_image":
            assert found[direction]["likelihood"]["candidates"] == 6
        texts = {"likelihood_raw", "likelihood_transductive"} if direction.endswith("to_text") else set()
        likelihood = {"likelihood"} if direction != "text_audio_to_image" else set()
        assert set(found[direction]) == {"matching", "projection"} | likelihood | texts
        for score, row in found[direction].items():
            others = {"untrained_projection"} | ({"trained_projection"} if score != "projection" else set())
            assert set(row["figures"]["R@1"]["controls"]) == {"chance", *others}


def test_a_model_that_knows_the_answer_has_full_recall(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices have the correct orientation: likelihood of text j given sample i is 0 on the diagonal only."""
    monkeypatch.setattr(Evaluator, "text_log_likelihood", lambda self, samples, texts: np.eye(len(samples)) * 50.0 - 60.0)
    found = retrieval(evaluator, "train", candidates=5, matching_candidates=2, controls=ProjectionControls(evaluator))
    for direction in ("image_to_text", "text_to_image", "text_to_audio", "audio_to_text"):
        assert found[direction]["likelihood"]["R@1"] == 1.0


def test_a_store_without_audio_files_has_the_directions_that_need_none(
    evaluator: Evaluator, without_audio: Evaluator
) -> None:
    found = retrieval(without_audio, "valid", candidates=4, matching_candidates=3)
    assert set(found) == {"split", "seed", "image_to_text", "text_to_image"}
    assert found["image_to_text"]["likelihood_raw"]["candidates"] == 4
    assert "likelihood" not in found["image_to_text"], "without projections there is no prior of training inputs"
    assert not any("audio" in line for line in retrieval_lines(found))
    with pytest.raises(UserError, match='no sample of split "valid" has text and an image or audio'):
        retrieval(Evaluator(evaluator.model, evaluator.config, masked(evaluator.store, TEXT)), "valid")


def test_a_prior_of_training_inputs_does_not_see_the_test_queries_and_a_transductive_one_does(evaluator: Evaluator) -> None:
    """Further queries with the same texts: the order of the texts of the first ones must not change."""
    valid = evaluator.samples_with("valid", (TEXT, IMAGE, AUDIO))
    texts, few = valid[:5], valid[:5]
    ids = [evaluator.read(index, (TEXT,)).of(TEXT).ids for index in texts]

    def likelihood(queries: np.ndarray) -> np.ndarray:
        return evaluator.text_log_likelihood([evaluator.read(index, (IMAGE,)) for index in queries], ids)

    prior = ProjectionControls(evaluator).trained.log_priors("image_to_text", texts).values
    again = ProjectionControls(evaluator).trained.log_priors("image_to_text", valid).values[:5]
    np.testing.assert_allclose(prior, again, atol=1e-4)
    alone, together = likelihood(few), likelihood(valid)
    inductive, transductive = over_prior(alone, prior), alone - log_mean_exp(alone, axis=0)
    assert likeliest(alone).all()
    np.testing.assert_allclose(inductive, over_prior(together, prior)[:5], atol=1e-4)
    leaked = (together - log_mean_exp(together, axis=0))[:5]
    assert np.abs((leaked - leaked.mean(1, keepdims=True)) - (transductive - transductive.mean(1, keepdims=True))).max() > 1e-3


def test_a_row_without_a_prior_is_of_a_version_whose_prior_was_the_test_queries() -> None:
    old = {"candidates": 4, "R@1": 0.5, "R@5": 1.0, "R@10": 1.0, "chance": {"R@1": 0.25, "R@5": 1.0, "R@10": 1.0}}
    lines = "\n".join(retrieval_lines({"image_to_text": {"likelihood": old}, "text_to_image": {"likelihood": old}}))
    assert "image→text, text likelihood, transductive of 4" in lines and "text→image, text likelihood of 4" in lines
    assert "50.0%" in lines and "chance" in lines and "25.0%" in lines
