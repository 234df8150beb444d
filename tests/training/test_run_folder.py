"""The output directory: what cannot be one is refused in a line; it is locked where the file system can."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from opt_ds.errors import UserError
from opt_ds.store.reader import FeatureStore
from opt_ds.training import run_folder
from opt_ds.training.metrics import _drop_later_lines
from tests.training.runs import tiny_config


def test_a_directory_that_cannot_be_made_is_one_line(store: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, reason in ((tmp_path / "file" / "run", "Not a directory"), (Path("/proc/run"), "No such file or directory")):
        run_folder.check_same_run(output, tiny_config(store), [FeatureStore(store)])
        with pytest.raises(UserError) as error:
            run_folder.lock(output)
        assert str(error.value).startswith(f"--output {output}: cannot be used ({reason}): ")


def test_a_directory_that_must_not_be_read_is_one_line(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    config, stores = tiny_config(store), [FeatureStore(store)]
    monkeypatch.setattr(Path, "exists", refuse)  # tests may run as root, whom nothing is refused
    with pytest.raises(UserError, match=r"cannot be used \(Permission denied\)"):
        run_folder.check_same_run(tmp_path, config, stores)


def test_a_run_that_began_before_a_setting_existed_is_the_same_run(store: Path, tmp_path: Path) -> None:
    config, stores = tiny_config(store), [FeatureStore(store)]
    fixed_settings = run_folder.fixed_settings(config, stores)
    added = [key for key in run_folder._ADDED if not key.startswith("finetune.")]
    assert {key: fixed_settings.pop(key) for key in added} == {key: run_folder._ADDED[key] for key in added}
    (tmp_path / "run.json").write_text(json.dumps({"fixed_settings": fixed_settings, "launches": [], "stores": []}))
    run_folder.check_same_run(tmp_path, config, stores)
    other = tiny_config(store, "tasks.plugins=[tests.extending.counting:RegionCounting]")
    with pytest.raises(UserError, match="holds another run"):
        run_folder.check_same_run(tmp_path, other, stores)


def test_a_section_that_is_new_is_named(store: Path, tmp_path: Path) -> None:
    stores, without = [FeatureStore(store)], tiny_config(store)
    aligned = tiny_config(store, "tasks.alignment.width=16")
    for own, other, reason in (
        (without, aligned, "tasks.alignment was null there and is a section now"),
        (aligned, without, r"tasks\.alignment\.bias was -10\.0 there and is null now"),
    ):
        run_folder.record_launch(tmp_path, own, stores, {})
        run_folder.check_same_run(tmp_path, own, stores)
        with pytest.raises(UserError, match=rf"holds another run \({reason}\)"):
            run_folder.check_same_run(tmp_path, other, stores)


def test_a_damaged_key_is_noticed_even_if_its_value_is_none(store: Path, tmp_path: Path) -> None:
    config, stores = tiny_config(store), [FeatureStore(store)]
    fixed_settings = run_folder.fixed_settings(config, stores)
    assert fixed_settings.pop("tasks.labels") is None
    fixed_settings["tasks.labdls"] = None
    (tmp_path / "run.json").write_text(json.dumps({"fixed_settings": fixed_settings, "launches": [], "stores": []}))
    with pytest.raises(UserError, match=r"holds another run \(tasks\.labdls is none of this run's settings\)"):
        run_folder.check_same_run(tmp_path, config, stores)


def test_two_runs_in_one_directory_are_refused(tmp_path: Path, logged: list[str]) -> None:
    with run_folder.lock(tmp_path), pytest.raises(UserError, match="another process is training there"):
        run_folder.lock(tmp_path)
    run_folder.lock(tmp_path).close()
    assert logged == []


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    token = "0123456789abcdef"
    left = [tmp_path / folder / f".{name}.{token}.tmp" for folder, name in (("", "run.json"), ("checkpoints", "latest"))]
    others = [tmp_path / name for name in (f".result.json.{token}.tmp", "checkpoints/latest", "metrics.jsonl")]
    for file in (*left, *others):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    run_folder.lock(tmp_path).close()
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in others), "another command, evaluate say, may be writing its result"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_used(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    run_folder.lock(tmp_path).close()
    assert len(logged) == 1 and f"{tmp_path}: no file locks there" in logged[0]


@pytest.mark.parametrize("content", [b'{"identity": 3}', b'{"identity": {}, "launches": [1]}', b"[]", b"\xff", b"[" * 3000, b""])
def test_a_damaged_record_is_one_line_in_our_words(store: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / run_folder.RUN_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"run\.json: damaged, it does not hold a run's settings and launches") as error:
        run_folder.check_same_run(tmp_path, tiny_config(store), [FeatureStore(store)])
    assert "\n" not in str(error.value) and "codec" not in str(error.value)


def test_a_damaged_line_of_the_log_does_not_stop_a_run_that_resumes(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(b'{"step": 1}\n\xff\xfe\n[]\n{"step": "x"}\n{"step": 2}\n{"step": 3}\n')
    _drop_later_lines(log, 2)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'
