"""Fine-tuning by the real engine: each task learns, resumes bit-exactly, and refuses what it cannot start from."""

import json
from pathlib import Path
from typing import Any

import pytest

from opt_ds.cli.finetune import finetune
from opt_ds.cli.program import run_program
from opt_ds.config import Config
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.experiments.vqa import open_untrained
from opt_ds.model.initial import initial_model
from opt_ds.store.reader import FeatureStore
from opt_ds.training import checkpoint, run_folder
from opt_ds.training.finetuning import JOBS, finetune_config
from tests.training.runs import hashes, losses, tensors, tiny_config, train

QUICK = ("batch.size=4", "optimizer.lr=0.01", "train.log_every=1", "model.dropout=0", "model.attention_dropout=0")

LOSSES = {"retrieval": "matching", "transcription": "dtr", "captioning": "dtr", "classification": "labels", "vqa": "labels"}


@pytest.fixture(scope="module")
def pretrained(learnable: Path, tmp_path_factory: pytest.TempPathFactory, group: Any) -> Path:
    output = tmp_path_factory.mktemp("pretrained") / "run"
    train(tiny_config(learnable, "train.max_steps=1"), output, group)
    return output


def tuned(task: str, start: Path, store: Path, steps: int, *settings: str, **options: Any) -> Config:
    more = (*QUICK, "schedule.total_steps=40", "schedule.warmup_steps=2", f"train.max_steps={steps}", *settings)
    return finetune_config(task, start, [str(store)], min_positives=1, settings=more, **options)


@pytest.mark.parametrize("task", JOBS)
def test_every_task_learns_from_the_checkpoint_and_leaves_a_whole_model(
    task: str, pretrained: Path, learnable: Path, tmp_path: Path, group: Any
) -> None:
    config = tuned(task, pretrained, learnable, 30)
    assert train(config, tmp_path, group) == 0
    found = losses(tmp_path)
    assert sum(found[step] for step in range(26, 31)) < 0.8 * sum(found[step] for step in range(1, 6))
    assert set(json.loads((tmp_path / "validation.json").read_text())["losses"]) == {LOSSES[task]}
    model, loaded = checkpoint.load_model(tmp_path)
    assert loaded.trained_losses[:3] == ("mlm", "mvfr", "mrc"), (
        "the other heads are still what pre-training made of them"
    )
    assert (model.head("labels") is not None) == (LOSSES[task] == "labels")


def test_the_weights_are_the_checkpoints(pretrained: Path, learnable: Path, tmp_path: Path, group: Any) -> None:
    train(tuned("captioning", pretrained, learnable, 1, "optimizer.lr=1e-30"), tmp_path, group)
    start, after = tensors(pretrained, 1, "model"), tensors(tmp_path, 1, "model")
    assert start.keys() == after.keys() and all(start[name].allclose(after[name], rtol=0, atol=1e-20) for name in start)


def test_the_control_starts_from_random_weights_and_is_trained_the_same_way(
    pretrained: Path, learnable: Path, tmp_path: Path, group: Any
) -> None:
    config = tuned("vqa", pretrained, learnable, 1, "optimizer.lr=1e-30", untrained=True)
    own = tuned("vqa", pretrained, learnable, 1, "optimizer.lr=1e-30")
    assert config.model_copy(update={"finetune": own.finetune}) == own and config.trained_losses == ("labels",)
    train(config, tmp_path / "control", group)
    train(own, tmp_path / "own", group)
    store = FeatureStore(learnable)
    expected, after = initial_model(config, [store]).state_dict(), tensors(tmp_path / "control", 1, "model")
    assert all(after[name].allclose(expected[name], rtol=0, atol=1e-20) for name in after)
    evaluator = Evaluator(*checkpoint.load_model(tmp_path / "own"), store)
    answers = open_untrained(evaluator, tmp_path / "control").label_names
    assert answers and answers == evaluator.label_names
    with pytest.raises(UserError, match=r"own: this run is no control: name one of opt-ds finetune vqa --untrained"):
        open_untrained(evaluator, tmp_path / "own")
    train(tuned("vqa", pretrained, learnable, 1, "batch.size=2", untrained=True), tmp_path / "other", group)
    with pytest.raises(UserError, match=r"not trained in the same way \(batch.size is 2, not 4\)"):
        open_untrained(evaluator, tmp_path / "other")


def test_a_run_that_began_before_there_were_controls_is_the_same_run(
    pretrained: Path, learnable: Path, tmp_path: Path
) -> None:
    config, stores = tuned("captioning", pretrained, learnable, 1), [FeatureStore(learnable)]
    recorded = run_folder.fixed_settings(config, stores)
    assert recorded.pop("finetune.untrained") is False
    (tmp_path / "run.json").write_text(json.dumps({"fixed_settings": recorded, "launches": [], "stores": []}))
    run_folder.check_same_run(tmp_path, config, stores)
    with pytest.raises(UserError, match=r"finetune\.untrained was false there and is true now"):
        run_folder.check_same_run(tmp_path, tuned("captioning", pretrained, learnable, 1, untrained=True), stores)


def test_resume_is_bit_exact(pretrained: Path, store: Path, tmp_path: Path, group: Any) -> None:
    for output, stops in ((tmp_path / "straight", (4,)), (tmp_path / "cut", (2, 4))):
        for stop in stops:
            train(tuned("retrieval", pretrained, store, stop, "model.dropout=0.1"), output, group)
    assert hashes(tmp_path / "cut", 4) == hashes(tmp_path / "straight", 4)


def test_fine_tuning_goes_on_from_a_fine_tuned_model_and_keeps_its_label_head(
    pretrained: Path, learnable: Path, tmp_path: Path, group: Any
) -> None:
    train(tuned("classification", pretrained, learnable, 3), tmp_path / "first", group)
    config = tuned("classification", tmp_path / "first", learnable, 1, "optimizer.lr=1e-30")
    train(config, tmp_path / "again", group)
    head = "labels.score.weight"
    found, before = tensors(tmp_path / "again", 1, "model")[head], tensors(tmp_path / "first", 3, "model")[head]
    assert found.allclose(before, rtol=0, atol=1e-20)


def test_steps_are_counted_in_epochs_and_settings_have_the_last_word(pretrained: Path, learnable: Path) -> None:
    config = finetune_config("captioning", pretrained, [str(learnable)], epochs=10, settings=["batch.size=2"])
    assert config.schedule.total_steps == 20 and config.schedule.warmup_steps == 2, "four training samples, two a step"
    assert config.train.validate_every == 2
    config = finetune_config("captioning", pretrained, [str(learnable)], epochs=10, settings=["schedule.total_steps=7"])
    assert config.max_steps == 7
    small = ["batch.size=2"]
    texts, judgements = (
        finetune_config(task, pretrained, [str(learnable)], settings=small) for task in ("captioning", "retrieval")
    )
    assert judgements.max_steps == 4 * texts.max_steps, "judgements take more passes than texts"
    assert judgements.optimizer.lr == texts.optimizer.lr / 2


@pytest.mark.parametrize(
    ("task", "inputs", "expected"),
    [
        ("captoining", (), 'unknown task "captoining" (did you mean "captioning"?)'),
        ("captioning", ("T+I",), "captioning generates the text, which cannot be an input"),
        ("transcription", ("I",), "transcription requires audio"),
        ("retrieval", ("I",), "retrieval compares modalities"),
        ("vqa", ("I",), "the question is the text"),
    ],
)
def test_what_does_not_fit_is_one_line(
    task: str, inputs: tuple[str, ...], expected: str, pretrained: Path, learnable: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chosen = [part for name in inputs for part in ("--inputs", name)]
    given = [task, "--checkpoint", str(pretrained), "--store", str(learnable), "--output", str(tmp_path / "run"), *chosen]
    assert run_program(finetune, given, "finetune") == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_validation_split_without_labels_is_refused_before_training(
    pretrained: Path, learnable: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, labels = tuned("classification", pretrained, learnable, 1), FeatureStore.labels
    unlabelled = set(FeatureStore(learnable).split_samples("valid").tolist())
    monkeypatch.setattr(FeatureStore, "labels", lambda self, index: () if index in unlabelled else labels(self, index))
    with pytest.raises(UserError, match='no sample of split "valid" has what the tasks need') as error:
        train(config, tmp_path, group)
    assert str(learnable) in str(error.value)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_checkpoint_that_never_learned_to_write_is_refused(learnable: Path, tmp_path: Path, group: Any) -> None:
    train(tiny_config(learnable, "train.max_steps=1", "tasks.dtr.weight=0"), tmp_path / "run", group)
    with pytest.raises(UserError, match=r"trained without dtr \(tasks.dtr.weight is 0\), which transcription fine-tunes"):
        finetune_config("transcription", tmp_path / "run", [str(learnable)])


def test_candidates_of_pre_training_are_not_those_of_fine_tuning(learnable: Path, tmp_path: Path, group: Any) -> None:
    train(tiny_config(learnable, "train.max_steps=1", "tasks.matching.candidates=2"), tmp_path / "run", group)
    assert tuned("retrieval", tmp_path / "run", learnable, 1).tasks.matching.candidates == 1
    with pytest.raises(UserError, match=r"tasks\.matching\.candidates is for pre-training: set it to 1"):
        tuned("retrieval", tmp_path / "run", learnable, 1, "tasks.matching.candidates=2")
