"""Test guesses from neighbours: the mean of the others, and interpolation between visible frames."""

import numpy as np
import pytest

from opt_ds.tasks.neighbours import FARTHEST, interpolated, mean_at_distance, mean_of_others, mean_of_visible


def test_the_mean_of_the_others_leaves_the_vector_itself_out() -> None:
    vectors = np.array([[0.0], [3.0], [6.0]])
    assert mean_of_others(vectors).tolist() == [[4.5], [3.0], [1.5]]
    assert mean_of_others(vectors[:1]).tolist() == [[0.0]]
    assert mean_of_visible(vectors, np.array([True, False, False])).tolist() == [4.5]
    assert mean_of_visible(vectors, np.ones(3, bool)).tolist() == [0.0]


def test_a_line_is_interpolated_exactly_and_ends_are_copied() -> None:
    line = np.arange(12.0)[:, None]
    masked = np.zeros(12, bool)
    masked[[0, 4, 5, 6, 11]] = True
    guesses, distances = interpolated(line, masked)
    assert guesses[:, 0] == pytest.approx([1, 4, 5, 6, 10])
    assert distances.tolist() == [1, 1, 2, 1, 1]
    far, distances = interpolated(np.zeros((30, 1)), np.arange(30) > 0)
    assert distances.max() == FARTHEST and not far.any()
    nothing, distances = interpolated(line, np.ones(12, bool))
    assert not nothing.any() and (distances == FARTHEST).all()


def test_the_mean_at_a_distance_is_of_both_sides_where_both_are() -> None:
    vectors = np.array([[0.0], [1.0], [4.0], [9.0]])
    assert mean_at_distance(1)(vectors)[:, 0].tolist() == [1.0, 2.0, 5.0, 4.0]
    assert mean_at_distance(3)(vectors)[:, 0].tolist() == [9.0, 0.0, 0.0, 0.0]
