"""Test checkpoints: complete or absent; damage is named and the previous one used; the last few and the best are kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ds.errors import UserError
from opt_ds.training import checkpoint, checkpoint_writer
from opt_ds.training.checkpoint_writer import CheckpointError, check_space
from tests.training.runs import hashes, tensors, tiny_config, train

EVERY_TWO = ("checkpoint.every_steps=2", "checkpoint.keep=3")


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory, group: Any) -> Path:
    """A run of 6 steps with checkpoints after 2, 4 and 6."""
    output = tmp_path_factory.mktemp("finished")
    train(tiny_config(store, *EVERY_TWO, "train.max_steps=6"), output, group)
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def folders(output: Path) -> list[str]:
    return [folder.name for folder in checkpoint.all_checkpoints(output)]


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "is damaged (its SHA-256 differs)": lambda folder: flip_byte(folder / "model.safetensors"),
    "is truncated": lambda folder: (folder / "moments.safetensors").write_bytes(b"short"),
    "is missing": lambda folder: (folder / "state.json").unlink(),
    "no readable COMPLETE.json": lambda folder: (folder / "COMPLETE.json").unlink(),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_damaged_newest_is_named_and_the_one_before_it_taken(problem: str, run: Path, logged: list[str]) -> None:
    DAMAGES[problem](run / "checkpoints" / "step-00000006")
    found = checkpoint.find_resumable(run)
    assert found is not None and found.name == "step-00000004"
    assert len(logged) == 1 and "step-00000006" in logged[0] and problem in logged[0]


def test_resuming_past_a_damaged_checkpoint_writes_it_anew(run: Path, store: Path, finished: Path, group: Any) -> None:
    flip_byte(run / "checkpoints" / "step-00000006" / "model.safetensors")
    train(tiny_config(store, *EVERY_TWO, "train.max_steps=6"), run, group)
    assert hashes(run, 6) == hashes(finished, 6)
    assert checkpoint.problem_with(run / "checkpoints" / "step-00000006") is None


def test_all_damaged_is_an_error_and_never_a_silent_restart(run: Path) -> None:
    for folder in checkpoint.all_checkpoints(run):
        flip_byte(folder / "model.safetensors")
    with pytest.raises(UserError, match="no checkpoint is usable") as error:
        checkpoint.find_resumable(run)
    assert all(name in str(error.value) for name in folders(run))


def test_a_removed_pointer_and_a_broken_off_save_do_not_matter(run: Path, logged: list[str]) -> None:
    (run / "checkpoints" / "latest").unlink()
    (run / "checkpoints" / ".step-00000008.tmp").mkdir()
    found = checkpoint.find_resumable(run)
    assert found is not None and found.name == "step-00000006"
    assert len(logged) == 1 and '"latest"' in logged[0]


def test_the_last_and_the_best_are_kept(store: Path, tmp_path: Path, group: Any) -> None:
    # At this learning rate the first validation stays the best.
    settings = ("checkpoint.every_steps=1", "checkpoint.keep=2", "train.validate_every=2", "optimizer.lr=10.0")
    train(tiny_config(store, *settings, "train.max_steps=6"), tmp_path, group)
    state = checkpoint.read_state(tmp_path / "checkpoints" / "step-00000006")
    assert state["best_step"] == 2
    assert folders(tmp_path) == ["step-00000006", "step-00000005", "step-00000002"]
    assert checkpoint.resolve_checkpoint(tmp_path).name == "step-00000002"
    assert checkpoint.resolve_checkpoint(tmp_path / "checkpoints" / "step-00000005").name == "step-00000005"


def test_damaged_checkpoints_do_not_crowd_out_the_one_written_after_them(run: Path, store: Path, group: Any) -> None:
    for step in (4, 6):
        flip_byte(run / "checkpoints" / checkpoint.folder_name(step) / "model.safetensors")
    train(tiny_config(store, "checkpoint.every_steps=2", "checkpoint.keep=1", "train.max_steps=3"), run, group)
    assert folders(run) == ["step-00000003"]
    for pointer in ("latest", "best"):
        assert checkpoint.pointed(run, pointer) == run / "checkpoints" / "step-00000003"


@pytest.mark.parametrize(("best_step", "expected"), [(2, 2), (1, None), (None, None)])
def test_best_names_no_removed_checkpoint(best_step: int | None, expected: int | None, tmp_path: Path) -> None:
    folder = {step: tmp_path / "checkpoints" / checkpoint.folder_name(step) for step in (2, 4, 6)}
    for path in folder.values():
        path.mkdir(parents=True)
    checkpoint_writer.point_to(tmp_path, "best", folder[6])
    checkpoint_writer._prune(tmp_path, 1, folder[4], best_step)
    assert checkpoint.pointed(tmp_path, "best") == folder.get(expected or 0)
    assert (tmp_path / "checkpoints" / "best").exists() == bool(expected), "rather none than one that names nothing"
    assert folders(tmp_path) == [folder[4].name, *([folder[2].name] if expected else [])]


def test_what_holds_no_checkpoint_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="neither a checkpoint nor a run's output directory"):
            checkpoint.resolve_checkpoint(path)


def test_a_failed_save_is_said_and_leaves_the_last_one_usable(run: Path, store: Path, group: Any) -> None:
    # A file stands where the temporary folder would be made: as with a full disk, the operating system refuses.
    blocker = run / "checkpoints" / ".step-00000008.tmp"
    blocker.write_text("in the way")
    with pytest.raises(CheckpointError, match=r"step-00000008 could not be written \(File exists\)"):
        train(tiny_config(store, *EVERY_TWO, "train.max_steps=8"), run, group)
    blocker.unlink()
    found = checkpoint.find_resumable(run)
    assert found is not None and found.name == "step-00000006"


def test_too_little_space_is_refused_before_training(tmp_path: Path) -> None:
    check_space(tmp_path, 1000)
    with pytest.raises(UserError, match="GiB free, one checkpoint takes"):
        check_space(tmp_path, 10**15)


def test_the_model_comes_back_from_a_checkpoint_alone(finished: Path, store: Path) -> None:
    model, config = checkpoint.load_model(finished)
    assert config == tiny_config(store, *EVERY_TWO, "train.max_steps=6")
    saved = tensors(finished, 6, "model")
    assert {name for name, _ in model.named_parameters()} <= set(saved)
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    assert any(name not in dict(model.named_parameters()) for name in saved), "the features' statistics are in it too"
    assert not model.training


def test_a_checkpoint_of_another_model_is_refused(finished: Path) -> None:
    from opt_ds.model.opt import OPT

    _, config = checkpoint.load_model(finished)
    other = OPT(config.model.model_copy(update={"ffn_size": 96}), config.tasks)
    with pytest.raises(UserError, match="it belongs to another model"):
        checkpoint.load_weights(other, checkpoint.resolve_checkpoint(finished))


def test_state_says_what_the_run_was(finished: Path, store: Path) -> None:
    state = checkpoint.read_state(finished / "checkpoints" / "step-00000006")
    assert state["step"] == state["adam_steps"] == 6
    assert state["stores"] == [json.loads((store / "store.json").read_text())["fingerprint"]]
    assert {"torch", "deepspeed", "opt_ds", "git"} <= set(state["versions"])
