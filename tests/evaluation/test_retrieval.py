import numpy as np
import pytest

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.retrieval import DIRECTIONS, chance, recall, retrieval, retrieval_lines, same_pairs
from opt_ds.store import FeatureStore
from tests.tiny import index_with, masked


def test_recall_counts_the_rank_of_the_best_right_candidate() -> None:
    scores = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    found = recall(scores, np.eye(3, dtype=bool))
    assert found == {"R@1": pytest.approx(1 / 3), "R@5": 1.0, "R@10": 1.0}


def test_equal_targets_count_as_right() -> None:
    scores = np.array([[0.1, 0.9], [0.2, 0.8]])
    same = np.ones((2, 2), dtype=bool)
    assert recall(scores, same)["R@1"] == 1.0


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


def test_constant_scores_are_no_better_thanchance() -> None:
    same = np.eye(100, dtype=bool)
    assert recall(np.zeros((100, 100)), same) == {"R@1": 0.0, "R@5": 0.0, "R@10": 0.0}


def testchance_is_the_recall_of_random_orders() -> None:
    same = np.eye(20, dtype=bool)
    same[0, 1] = same[1, 0] = True
    random = np.random.default_rng(0)
    mean = np.mean([recall(random.random((20, 20)), same)["R@5"] for _ in range(800)])
    assert chance(same)["R@5"] == pytest.approx(mean, abs=0.01)


def test_five_directions_by_both_scores(evaluator: Evaluator) -> None:
    found = retrieval(evaluator, "train", candidates=6, matching_candidates=4, triple_candidates=3)
    for direction in DIRECTIONS:
        gallery = 3 if direction == "text_audio_to_image" else 4
        assert found[direction]["matching"]["candidates"] == gallery
        assert found[direction]["matching"]["chance"]["R@1"] == pytest.approx(1 / gallery)
        if direction != "text_audio_to_image":
            assert found[direction]["likelihood"]["candidates"] == 6


def test_a_model_that_knows_the_answer_has_full_recall(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices have the correct orientation: likelihood of text j given sample i is 0 on the diagonal only."""
    monkeypatch.setattr(Evaluator, "text_log_likelihood", lambda self, samples, texts: np.eye(len(samples)) * 50.0 - 60.0)
    found = retrieval(evaluator, "train", candidates=5, matching_candidates=2)
    for direction in ("image_to_text", "text_to_image", "text_to_audio", "audio_to_text"):
        assert found[direction]["likelihood"]["R@1"] == 1.0


def test_a_store_without_audio_files_has_the_directions_that_need_none(
    evaluator: Evaluator, without_audio: Evaluator
) -> None:
    found = retrieval(without_audio, "valid", candidates=4, matching_candidates=3)
    assert set(found) == {"split", "seed", "image_to_text", "text_to_image"}
    assert found["image_to_text"]["likelihood"]["candidates"] == 4
    assert not any("audio" in line for line in retrieval_lines(found))
    with pytest.raises(UserError, match='no sample of split "valid" has text and an image or audio'):
        retrieval(Evaluator(evaluator.model, evaluator.config, masked(evaluator.store, TEXT)), "valid")


def test_scores_that_are_nan_are_never_right() -> None:
    same = np.eye(4, dtype=bool)
    scores = np.full((4, 4), np.nan)
    assert recall(scores, same)["R@1"] == 0
    scores[0] = [3, 1, 1, 1]
    assert recall(scores, same)["R@1"] == 0.25
