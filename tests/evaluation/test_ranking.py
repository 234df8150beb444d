"""Test recall: ties are at chance, NaN is never right, and a shortlist of equal scores is random."""

import numpy as np
import pytest

from opt_ds.evaluation.figures import read_figure
from opt_ds.evaluation.ranking import chance, chance_among, recall, recall_figures, recall_row, shortlisted


def test_recall_counts_the_rank_of_the_best_right_candidate() -> None:
    scores = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    found = recall(scores, np.eye(3, dtype=bool))
    assert found == {"R@1": pytest.approx(1 / 3), "R@5": 1.0, "R@10": 1.0}


def test_equal_targets_count_as_right() -> None:
    scores = np.array([[0.1, 0.9], [0.2, 0.8]])
    same = np.ones((2, 2), dtype=bool)
    assert recall(scores, same)["R@1"] == 1.0


def test_a_gallery_sorted_by_truth_is_at_chance_if_all_scores_are_tied() -> None:
    same = np.eye(100, dtype=bool)  # the correct candidate of each query comes first among its equals, or last
    for tied in (np.zeros((100, 100)), np.full((100, 100), -np.inf), np.full((100, 100), 1e30)):
        assert recall(tied, same) == pytest.approx({"R@1": 0.01, "R@5": 0.05, "R@10": 0.1})
    groups = np.arange(100) // 4
    same = groups[:, None] == groups[None, :]
    assert recall(np.zeros((100, 100)), same) == pytest.approx(chance(same))


def test_ties_have_the_recall_of_a_random_order() -> None:
    same, random = np.eye(20, dtype=bool), np.random.default_rng(0)
    same[0, 1] = same[1, 0] = True
    scores = random.integers(0, 4, (20, 20)).astype(float)
    orders = [recall(scores + 1e-6 * random.random((20, 20)), same) for _ in range(800)]
    for name, value in recall(scores, same).items():
        assert value == pytest.approx(np.mean([order[name] for order in orders]), abs=0.01)


def test_chance_is_the_recall_of_random_orders() -> None:
    same = np.eye(20, dtype=bool)
    same[0, 1] = same[1, 0] = True
    random = np.random.default_rng(0)
    mean = np.mean([recall(random.random((20, 20)), same)["R@5"] for _ in range(800)])
    assert chance(same)["R@5"] == pytest.approx(mean, abs=0.01)


def test_scores_that_are_nan_are_never_right() -> None:
    same = np.eye(4, dtype=bool)
    scores = np.full((4, 4), np.nan)
    assert recall(scores, same)["R@1"] == 0
    scores[0] = [3, 1, 1, 1]
    assert recall(scores, same)["R@1"] == 0.25


def test_a_shortlist_of_equal_scores_is_not_the_start_of_the_gallery() -> None:
    queries, candidates = 200, 1000
    same = np.eye(queries, candidates, dtype=bool)  # the correct ones are the first of the gallery
    best = shortlisted(np.zeros((queries, candidates)), 200)
    assert np.take_along_axis(same, best, 1).any(1).mean() == pytest.approx(0.2, abs=0.1)
    assert chance_among(same, 200) == pytest.approx(np.full(queries, 0.2))
    assert (np.diff(best, axis=1) > 0).all()


def test_recall_stands_beside_chance_and_other_scores_of_the_same_pairs() -> None:
    random, same = np.random.default_rng(0), np.eye(60, dtype=bool)
    own, other = random.random((60, 60)) + 0.5 * same, random.random((60, 60)) + 0.3 * same
    row = recall_row(own, same, {"untrained_projection": other})
    figure = read_figure(row, "R@1")
    assert figure.value == row["R@1"] and set(figure.controls) == {"chance", "untrained_projection"}
    assert figure.controls["chance"].value == pytest.approx(1 / 60) == pytest.approx(row["chance"]["R@1"])
    assert figure.controls["untrained_projection"].value == recall(other, same)["R@1"]
    tied = recall_figures(np.zeros((60, 60)), same)["R@1"]
    assert tied.controls["chance"].advantage == 0 and tied.verdicts == ["no better than chance"]
