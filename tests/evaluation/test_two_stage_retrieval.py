"""Test two-stage retrieval: the projection learns, re-ranking scores only the shortlist, and its reported cost is right."""

import json
from pathlib import Path

import numpy as np
import pytest

import opt_ds.evaluation.runner as runner
import opt_ds.evaluation.two_stage_retrieval as two_stage_retrieval_module
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.dual_projection import Pairs, fit_dual_projection
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.retrieval import DIRECTIONS, _likelihood_matrix, _matching_matrix, recall
from opt_ds.evaluation.two_stage_retrieval import (
    TwoStages,
    _likeliest,
    _likeliest_first,
    reranked,
    shortlisted,
    table,
    two_stage_retrieval,
)
from tests.tiny import make_config, make_model


def related(n: int, seed: int, noise: float = 0.05) -> Pairs:
    """Queries and targets that a linear map relates, every target twice."""
    random, relation = np.random.default_rng(seed), np.random.default_rng(0).normal(size=(12, 12))
    query = random.normal(size=(n, 12))
    query[1::2] = query[::2]
    target = query @ relation + noise * random.normal(size=(n, 12))
    return Pairs(query.astype("f4"), target.astype("f4"), np.arange(n) // 2)


def test_a_projection_finds_a_linear_relation_and_is_chance_where_there_is_none() -> None:
    held_out = related(200, 3)
    same = held_out.target_names[:, None] == held_out.target_names[None, :]
    learned = fit_dual_projection(related(400, 1), related(100, 2), width=16, steps=300)
    assert recall(learned.scores(held_out.query_ne, held_out.target_ne), same)["R@1"] > 0.95
    unrelated = fit_dual_projection(related(400, 1, noise=1e3), related(100, 2, noise=1e3), width=16, steps=300)
    assert recall(unrelated.scores(held_out.query_ne, held_out.target_ne), same)["R@1"] < 0.1
    again = fit_dual_projection(related(400, 1), related(100, 2), width=16, steps=300)
    assert (again.scores(held_out.query_ne, held_out.target_ne) == learned.scores(held_out.query_ne, held_out.target_ne)).all()


def test_the_shortlist_comes_first_in_the_second_order_and_the_rest_stays_in_the_first() -> None:
    first = np.array([[0.1, 0.9, 0.5, 0.7]])
    best = shortlisted(first, 2)
    assert best.tolist() == [[1, 3]]
    assert np.argsort(-reranked(first, best, np.array([[-5.0, 2.0]]))).tolist() == [[3, 1, 2, 0]]
    assert np.argsort(-reranked(first, best, np.array([[2.0, -5.0]]))).tolist() == [[1, 3, 2, 0]]


def test_chosen_pairs_have_the_likelihood_that_all_pairs_have(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = evaluator.samples_with("train", (TEXT, AUDIO), 7)
    samples = [evaluator.read(index, (AUDIO,)) for index in gallery]
    texts = [evaluator.read(index, (TEXT,)).of(TEXT).ids for index in gallery]
    everything = evaluator.text_log_likelihood(samples, texts)
    wanted = [np.array(places, dtype=int) for places in ([1, 4], [], [0], [6, 2, 3], [5], [], [0, 1, 2, 3, 4, 5, 6])]
    for limit in (1 << 24, 500):  # the second: a few texts at a time
        monkeypatch.setattr(runner, "_SCORES_AT_ONCE", limit)
        found = evaluator.text_log_likelihood_of(samples, texts, wanted)
        for row, places in enumerate(wanted):
            assert found[row] == pytest.approx(everything[row, places], abs=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_re_ranking_scores_are_those_of_all_pairs(evaluator: Evaluator, direction: str) -> None:
    query, target = DIRECTIONS[direction]
    gallery = evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 6)
    stages = TwoStages(evaluator)
    best = shortlisted(stages.first_stage(direction, gallery, gallery), 3)
    found = stages.matching(direction, gallery, gallery, best).values
    assert found == pytest.approx(np.take_along_axis(_matching_matrix(evaluator, gallery, query, target), best, 1), abs=1e-4)
    if direction in ("text_to_image", "text_to_audio"):
        everything = _likelihood_matrix(evaluator, gallery, target).T
        found_likelihood = stages.likelihood(direction, gallery, gallery, best).values
        assert found_likelihood == pytest.approx(np.take_along_axis(everything, best, 1), abs=1e-4)
    if direction == "image_to_text":
        everything = _likelihood_matrix(evaluator, gallery, IMAGE)
        over_prior = everything - stages._log_priors(direction, gallery).values
        found_likelihood = stages.likelihood(direction, gallery, gallery, best).values
        assert found_likelihood == pytest.approx(np.take_along_axis(over_prior, best, 1), abs=1e-4)


def test_a_prior_is_the_mean_over_the_nearest_training_inputs(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_stage_retrieval_module, "PRIOR_INPUTS", 3)
    stages = TwoStages(evaluator)
    gallery = evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 6)
    train = evaluator.samples_with("train", (IMAGE, TEXT))
    scores = stages.first_stage("image_to_text", train, gallery)
    texts = [evaluator.read(index, (TEXT,)).of(TEXT).ids for index in gallery]
    for place, text in enumerate(texts):
        nearest = train[np.argsort(-scores[:, place])[:3]]
        samples = [evaluator.read(index, (IMAGE,)) for index in nearest]
        expected = np.log(np.exp(evaluator.text_log_likelihood(samples, [text])[:, 0]).mean())
        assert stages._log_priors("image_to_text", gallery).values[place] == pytest.approx(expected, abs=1e-4)


def test_only_a_querys_likeliest_texts_are_judged_over_their_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_stage_retrieval_module, "LIKELIEST", 2)
    log_likelihood = np.array([[-3.0, -90.0, -4.0, -5.0]])
    log_prior = np.array([-3.0, -200.0, -9.0, -30.0])  # the second is next to impossible whatever goes in
    likely = _likeliest(log_likelihood)
    assert likely.tolist() == [[True, False, True, False]]
    scores = _likeliest_first(log_likelihood, log_likelihood - log_prior, likely)
    assert np.argsort(-scores).tolist() == [[2, 0, 3, 1]]


def test_the_runs_reported_are_those_made(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = evaluator.samples_with("train", (TEXT, IMAGE, AUDIO), 20)
    encoded: list[int] = []
    packed = Evaluator._packed
    monkeypatch.setattr(Evaluator, "_packed", lambda self, samples: (encoded.append(len(samples)), packed(self, samples))[1])
    monkeypatch.setattr(two_stage_retrieval_module, "LIKELIEST", 2)
    for direction in ("image_to_text", "text_to_audio", "text_audio_to_image"):
        stages = TwoStages(evaluator)
        stages.first_stage(direction, gallery[:1], gallery[:1])  # fits the projection, once for all galleries
        stages._cls.clear()
        encoded.clear()
        found = stages.figures(direction, gallery, gallery, 4)
        matching, likelihood = found["matching"], found.get("likelihood")
        assert matching["encoder_runs"] == 2 * 20 + 4 * 20 and matching["all_pairs"] == 400
        assert matching["encoder_fraction"] == pytest.approx(0.3)
        second = 0 if likelihood is None else likelihood["encoder_runs"] - 2 * 20
        assert sum(encoded) == matching["encoder_runs"] + second


def test_figures_are_plain_and_a_long_shortlist_is_refused(evaluator: Evaluator, tmp_path: Path) -> None:
    result = two_stage_retrieval(evaluator, "valid", 3, directions=("text_to_image", "text_audio_to_image"))
    assert json.loads(json.dumps(result)) == result
    assert result["text_to_image"]["likelihood"]["R@1"] <= result["text_to_image"]["shortlist_recall"] <= 1
    assert "text+audio→image" in table(result) and "likelihood" in table(result)
    with pytest.raises(UserError, match="--shortlist 12: the gallery has 12 samples"):
        two_stage_retrieval(evaluator, "valid", 12)


def test_a_store_without_audio_files_has_the_directions_that_need_none(without_audio: Evaluator) -> None:
    result = two_stage_retrieval(without_audio, "valid", 3)
    assert {"image_to_text", "text_to_image"} == set(result) & set(DIRECTIONS) and result["candidates"] > 3


def test_a_score_that_was_never_trained_is_left_out(evaluator: Evaluator) -> None:
    def without(*losses: str) -> Evaluator:
        tasks = {loss: {"weight": 0} for loss in losses}
        config = make_config(data={"stores": [str(evaluator.store.path)]}, model={"num_image_codes": 64}, tasks=tasks)
        return Evaluator(make_model(config), config, evaluator.store)

    for loss, score in (("dtr", "matching"), ("matching", "likelihood")):
        found = two_stage_retrieval(without(loss), "valid", 3, directions=("text_to_image",))["text_to_image"]
        assert {"matching", "likelihood"} & set(found) == {score}
    with pytest.raises(UserError, match="trained without matching"):
        two_stage_retrieval(without("dtr", "matching"), "valid", 3)
