"""Every command and file that the documentation of the benchmarks names exists, and its options are accepted."""

import argparse
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("benchmarks/README.md", "docs/scale.md", "docs/cluster.md", "docs/results.md", "README.md", "csrc/README.md")
SCRIPT = re.compile(r"python (benchmarks/\w+\.py)((?:\\\n|[^`\n])*)")


class AcceptedError(Exception):
    """The options were parsed."""


def documented() -> Iterator[tuple[str, str, list[str]]]:
    """Yield page, script and options of every command."""
    for page in PAGES:
        for script, options in SCRIPT.findall((ROOT / page).read_text(encoding="utf-8")):
            yield page, script, shlex.split(options.replace("\\\n", " "))


COMMANDS = list(documented())


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 15
    assert any(options for _, _, options in COMMANDS)


@pytest.mark.parametrize(("page", "script", "options"), COMMANDS)
def test_a_documented_command_is_accepted(
    page: str, script: str, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (ROOT / script).is_file(), f"{page} names {script}"
    parse = argparse.ArgumentParser.parse_args

    def accept(parser: argparse.ArgumentParser, arguments: list[str] | None = None) -> None:
        parse(parser, arguments)
        raise AcceptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", accept)
    monkeypatch.setattr("sys.argv", [script, *options])
    with pytest.raises(AcceptedError):
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()


@pytest.mark.parametrize("page", ["benchmarks/README.md", "csrc/README.md"])
def test_files_and_targets_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = "benchmarks|csrc|docs|opt_ds|ops|training|tests|kernels|verify"
    names = set(re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]+\.\w+)", text))
    bases = ("", "opt_ds", "csrc")
    assert len(names) > 8
    assert [name for name in names if not any((ROOT / base / name).exists() for base in bases)] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`make ([\w-]+)`", text))
    assert "test-gpu" in targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
