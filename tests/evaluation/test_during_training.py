"""Experiments during training: refused before the run where they cannot work, figures by name otherwise."""

import numpy as np
import pytest

from opt_ds.config import Config
from opt_ds.errors import UserError
from opt_ds.evaluation.during_training import check_experiments, figures_during_training
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.store import FeatureStore
from tests.tiny import make_config


def with_experiments(*names: str, **sections: object) -> Config:
    return make_config(evaluate={"every_steps": 5, "experiments": names, "limit": 4}, **sections)


def test_every_experiment_gives_figures_by_name(evaluator: Evaluator) -> None:
    options = with_experiments("retrieval", "transcription", "captioning", "image-generation").evaluate
    figures = figures_during_training(evaluator, options, seed=1)
    assert {
        "evaluate/retrieval/text_to_image/likelihood/R@1", "evaluate/retrieval/text_audio_to_image/matching/R@10",
        "evaluate/transcription/A/wer", "evaluate/transcription/A+I/wer_shuffled_audio", "evaluate/captioning/bleu_4",
        "evaluate/image-generation/T+A/bits_per_code",
    } <= set(figures)  # fmt: skip
    assert all(np.isfinite(value) for value in figures.values())
    assert not any("chance" in name or "samples" in name for name in figures)


def test_a_store_without_audio_files_has_all_experiments_of_text_and_images(without_audio: Evaluator) -> None:
    config = with_experiments("retrieval", "transcription", "captioning", "image-generation")
    check_experiments(config, without_audio.store)
    figures = figures_during_training(without_audio, config.evaluate, seed=1)
    assert {"evaluate/retrieval/text_to_image/likelihood/R@1", "evaluate/transcription/I/wer",
            "evaluate/image-generation/T/bits_per_code"} <= set(figures)  # fmt: skip
    assert not any("audio" in name or "/A" in name for name in figures)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (with_experiments("vqa"), "the model is not trained with labels"),
        (with_experiments("captioning", tasks={"dtr": {"weight": 0}}), "the model is not trained with dtr"),
        (with_experiments("image-generation"), "has no image codes"),
        (make_config(evaluate={"every_steps": 1, "split": "vaild"}), 'did you mean "valid"'),
    ],
)
def test_what_cannot_be_run_is_refused_before_training(config: Config, expected: str, no_codes: FeatureStore) -> None:
    with pytest.raises(UserError, match=expected):
        check_experiments(config, no_codes)


def test_experiments_that_are_off_are_not_checked(no_codes: FeatureStore) -> None:
    check_experiments(make_config(evaluate={"experiments": ["vqa"]}), no_codes)


def test_stage_3_is_refused() -> None:
    with pytest.raises(UserError, match=r"zero.stage 3 does not allow"):
        with_experiments("captioning", zero={"stage": 3})
