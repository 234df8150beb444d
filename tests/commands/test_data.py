"""`opt-ds corpus`, `prepare` and `inspect` as a person types them: exit codes and what is said."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from opt_ds.commands import data, stores
from opt_ds.errors import UserError
from opt_ds.store.synthetic import write_synthetic_store


def run(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command("corpus")(data.corpus)
    app.command("prepare")(data.prepare)
    app.command("inspect")(stores.inspect_store)
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
    assert "FAILED shard-00000.h5: shard is cut off" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus", "emojis", "--output", "x"], 'did you mean "emoji"'),
        (["prepare", "--manifest", "none.jsonl", "--output", "x"], "none.jsonl: no such manifest"),
        (["inspect", "nowhere"], "nowhere: no feature store there"),
    ],
)
def test_mistakes_are_user_errors(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)


@pytest.mark.parametrize("command", ["corpus", "prepare", "inspect"])
def test_every_option_is_explained(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--" in result.output
