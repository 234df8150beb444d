"""Test `opt-ds corpus`, `prepare` and `inspect` from the command line: exit codes and output."""

from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from opt_ds import log
from opt_ds.cli import data, imports, stores
from opt_ds.cli.program import run_program
from opt_ds.errors import UserError
from opt_ds.store import FeatureStore
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.store.update import rewrite_shards


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command("corpus")(data.corpus)
    app.command("prepare")(data.prepare)
    app.command("inspect")(stores.inspect_store)
    for name in ("split", "update", "convert"):
        app.command(name)(getattr(stores, name))
    with log.to_terminal():
        return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_inspect_prints_a_summary_and_fails_by_name(tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "s", 5)
    result = run("inspect", tmp_path / "s")
    assert result.exit_code == 0
    assert "all checks passed" in result.output
    shard = tmp_path / "s" / "shard-00000.h5"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run("inspect", tmp_path / "s")
    assert result.exit_code == 2
    assert "FAILED shard-00000.h5: shard is truncated" in result.output


def test_near_duplicates_are_noted_and_split_keeps_them_together_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_synthetic_store(path, 40, splits={"train": 0.5, "valid": 0.5})

    def copy(_: int, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        pixels = arrays["image/pixels"].copy()
        pixels[30:35] = pixels[:5]
        return {**arrays, "image/pixels": pixels}

    rewrite_shards(FeatureStore(path), copy, dict)
    result = run("inspect", path)
    assert result.exit_code == 0
    assert "note: near-duplicates between train and valid (identical pixels at 64 x 64): 5 of 20 images in train" in result.output
    without = run("inspect", path, "--no-near-duplicates").output
    assert "note: near-duplicates were not looked for" in without and "near-duplicates between" not in without
    ratios = ("--ratio", "train=0.5", "--ratio", "valid=0.5")
    assert "10 samples of 10 groups are kept together in 5" in run("split", path, *ratios).output
    assert "near-duplicates between" not in run("inspect", path).output
    assert "near-duplicate" not in run("split", path, *ratios, "--ignore-near-duplicates").output
    assert "near-duplicates between" in run("inspect", path).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus", "emojis", "--output", "x"], 'did you mean "emoji"'),
        (["prepare", "--manifest", "none.jsonl", "--output", "x"], "none.jsonl: no such manifest"),
        (["inspect", "nowhere"], "nowhere: no feature store there"),
        (["split", "nowhere"], "give one of --ratio, --ids and --groups"),
        (["split", "nowhere", "--ratio", "train=1"], "nowhere: no feature store there"),
        (["update", "nowhere", "--modality", "imgae"], 'did you mean "image"'),
        (["update", "nowhere", "--modality", "audio"], "name the manifest"),
        (["update", "nowhere", "--modality", "codes"], "--weights"),
        (["convert", "nowhere", "--output", "y"], "nowhere: no feature store there"),
        (["prepare", "--manifest", ".", "--output", "x"], "no image, audio or .txt file there"),
    ],
)
def test_mistakes_are_user_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


def test_the_tools_change_a_store_and_say_what_it_is_now(tmp_path: Path) -> None:
    store = tmp_path / "s"
    write_synthetic_store(store, 60)
    result = run("split", store, "--ratio", "train=0.5", "--ratio", "test=0.5")
    assert result.exit_code == 0, result.output
    assert "train 3" in result.output or "train 2" in result.output
    result = run("convert", store, "--output", tmp_path / "packed", "--compress")
    assert "60 samples" in result.output and "compression gzip" in result.output
    result = run("inspect", tmp_path / "packed", "--sample", "sample7", "--images", tmp_path / "look")
    assert result.exit_code == 0, result.output
    assert "caption" in result.output
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == ["lengths.png", "sample-7.png"]


@pytest.mark.parametrize("command", ["corpus", "prepare", "inspect", "split", "update", "convert"])
def test_every_option_is_explained(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--" in result.output


def test_a_path_that_cannot_be_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    write_synthetic_store(tmp_path / "s", 4)
    (tmp_path / "captions.csv").write_text("text\na cat\n")
    for function, arguments in [
        (stores.convert, [tmp_path / "s", "--output", tmp_path / "file" / "x"]),
        (stores.inspect_store, [tmp_path / "s", "--images", tmp_path / "file"]),
        (data.merge, [tmp_path / "file" / "x"]),
        (imports.table, [tmp_path / "captions.csv", "--output", tmp_path / "s"]),
    ]:
        assert run_program(function, [str(argument) for argument in arguments], "opt-ds") == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path}") and error.count("\n") == 1


def test_a_sample_without_a_readable_image_is_one_line(tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "s", 1)
    (tmp_path / "m.jsonl").write_text('{"id": "sample0", "image": "regions.npz"}')
    (tmp_path / "regions.npz").write_bytes(b"features")
    arguments = ("inspect", tmp_path / "s", "--sample", "#0", "--manifest", tmp_path / "m.jsonl", "--images", tmp_path)
    with pytest.raises(UserError, match=r"regions\.npz: not readable as an image"):
        raise run(*arguments).exception or AssertionError


def test_a_store_may_be_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic_store(tmp_path / "s", 40)
    monkeypatch.chdir(tmp_path / "s")
    assert "train" in run("split", ".", "--ratio", "train=0.5", "--ratio", "test=0.5").output
    assert [path.name for path in tmp_path.iterdir()] == ["s"], "nor is a lock left"


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_synthetic_store(tmp_path / "s", 4)

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("opt_ds.store.files.fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"its file system has no file locks \(Function not implemented\)"):
        raise run("split", tmp_path / "s", "--ratio", "train=1").exception or AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_full_disk_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> None:
        raise OSError(28, "No space left on device", "shard-00000.h5")

    assert run_program(write, [], "opt-ds convert") == 2
    assert capsys.readouterr().err.startswith("error: the disk is full ([Errno 28] No space left on device")
