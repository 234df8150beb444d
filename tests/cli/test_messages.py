"""Every command with every kind of bad input: one line that names the user's option or file, in plain words, exit code 2."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from opt_ds.cli import COMMANDS, _build
from opt_ds.cli.program import run_command, run_program
from opt_ds.store.synthetic import write_synthetic_store

#: Words of libraries and of Python, and terminal colours, that no user should read.
FOREIGN = re.compile(
    r"PosixPath|pydantic|Traceback|torch\.|h5py|Errno|npickl|\x1b|should be a valid|\.tmp\b|Error\(|<class|NoneType"
)


class Run(NamedTuple):
    code: int
    out: str
    err: str


class Option(NamedTuple):
    """One option of one command, and the other arguments that the command needs."""

    command: tuple[str, ...]
    param: Any
    others: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.param.opts[0] if self.param.param_type_name == "option" else self.param.name.upper()

    def arguments(self, *values: str) -> list[str]:
        own = [part for value in values for part in ((self.name, value) if self.name.startswith("--") else (value,))]
        return [*self.command, *self.others, *own]


def leaf_commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    root = _build()
    for name in COMMANDS:
        command = root.get_command(None, name)
        inner = getattr(command, "commands", None)
        if inner:
            yield from (((name, own), each) for own, each in inner.items())
        else:
            yield (name,), command


def options() -> Iterator[Option]:
    """Return every option and argument of every command. The other required ones name things that do not exist."""
    for names, command in leaf_commands():
        for param in command.params:
            if param.hidden or param.name == "help":
                continue
            others: list[str] = []
            for other in command.params:
                if other.required and other is not param:
                    option = other.param_type_name == "option"
                    others += [*([other.opts[0]] if option else []), f"absent-{other.name}"]
            yield Option(names, param, tuple(others))


OPTIONS = list(options())
VALUED = [option for option in OPTIONS if not getattr(option.param, "is_flag", False)]
IDS = [f"{'-'.join(option.command)}{option.name}" for option in VALUED]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Run:
        capsys.readouterr()
        code = run_command(_build(), arguments, "opt-ds")
        return Run(code, *capsys.readouterr())

    return call


def one_line(result: Run, *named: str) -> None:
    """Check the form of a refusal, which names one of these."""
    lines = result.err.splitlines()
    assert result.code == 2, result
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert not FOREIGN.search(result.err), result.err
    assert any(name in result.err for name in named), (named, result.err)


def _is_text(option: Option) -> bool:
    return option.param.type_descriptor.annotation in (str, Path, list[str], list[Path])


TEXTS = [option for option in VALUED if _is_text(option)]
PATHS = [o for o in TEXTS if o.param.type_descriptor.annotation in (Path, list[Path]) or o.param.name in ("store", "config")]


def names(options: list[Option]) -> list[str]:
    return ["-".join((*option.command, option.name.strip("-"))) for option in options]


@pytest.mark.parametrize("option", [o for o in VALUED if o.param.param_type_name == "option"], ids=lambda o: names([o])[0])
def test_an_option_of_one_value_is_given_once(option: Option, run: Any) -> None:
    if option.name == "--set":
        result = run(*option.arguments("a.b=1", "a.b=2"))
        assert result.err.startswith("note: --set a.b=2 overrides 1, specified before it\n"), result.err
    elif not option.param.multiple:
        one_line(run(*option.arguments("3", "4")), f"{option.name} is given twice (3, 4): give it once")


@pytest.mark.parametrize("option", TEXTS, ids=names(TEXTS))
def test_an_empty_value_is_refused(option: Option, run: Any) -> None:
    if option.param.name != "ignore_words":
        one_line(run(*option.arguments("")), f"{option.name} is empty")


@pytest.mark.parametrize("option", PATHS, ids=names(PATHS))
def test_a_path_that_cannot_be_one_is_refused(option: Option, run: Any) -> None:
    one_line(run(*option.arguments("a" * 300)), f"{option.name}: a name in ")
    one_line(run(*option.arguments("a\0b")), f"{option.name}: a path cannot hold a zero byte")
    one_line(run(*option.arguments("~nobody-of-this-name/a")), "no such user")
    one_line(run(*option.arguments("a\udcff")), "not UTF-8")
    if (option.command[-1], option.param.name) not in {("generate", "output"), ("plan", "json_file")}:
        one_line(run(*option.arguments("-")), f"{option.name} -:")


INPUTS = [o for o in PATHS if o.param.required and o.param.name != "output"]
#: What commands say that need one of several optional inputs.
MISSING = ("opt-ds split: give one of", "no questions: give --questions")


@pytest.mark.parametrize("option", INPUTS, ids=names(INPUTS))
def test_what_is_not_there_or_is_something_else_is_refused(option: Option, run: Any, tmp_path: Path) -> None:
    """An input that is not there, a folder, and a file of bytes; the first thing that is wrong may be another of them."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\0abc")
    for value in ("not/there", "folder", "bytes"):
        one_line(run(*option.arguments(value)), value, "absent", option.name, *MISSING)


@pytest.mark.parametrize("names", [names for names, _ in leaf_commands()], ids="-".join)
def test_an_unknown_option_is_refused(names: tuple[str, ...], run: Any) -> None:
    one_line(run(*names, "--no-such-option", "1"), "--no-such-option")


def test_an_option_that_swallows_the_next_is_refused(run: Any) -> None:
    one_line(run("prepare", "--manifest", "--output", "store"), "--manifest is followed by --output, which is an option")


def test_flags_that_contradict_each_other_are_refused(run: Any) -> None:
    one_line(run("prepare", "--manifest", "a", "--output", "b", "--pixels", "--no-pixels"), "--pixels and --no-pixels contradict")
    result = run("doctor", "--set", "tasks.sampling_weights.mlm=1", "--set", "tasks.sampling_weights={mvm: 1}")
    one_line(result, "--set tasks.sampling_weights replaces --set tasks.sampling_weights.mlm")


def test_a_point_and_a_tilde_are_paths(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a red heart")
    (tmp_path / "in" / "b.txt").write_text("a blue heart")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("import", "folder", "~/in", "--output", "~/in/manifest.jsonl").code == 0
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path / "store")
    one_line(run("import", "folder", "../in", "--output", "."), str(tmp_path / "store"))
    result = run("prepare", "--manifest", "../in/manifest.jsonl", "--output", ".", "--workers", "1")
    assert result.code == 0 and (tmp_path / "store" / "store.json").is_file(), result.err
    assert run("inspect", ".").code == 0


class TestAdvice:
    """The advice of a message works."""

    def test_a_store_without_a_valid_split(self, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from opt_ds.pretrain import pretrain

        write_synthetic_store(tmp_path / "s", 40, vocab_size=40, image_feature_dim=8, audio_feature_dim=6, text_len=(1, 5))
        assert run("split", "s", "--ratio", "train=0.8", "--ratio", "test=0.2").code == 0
        noted = run("inspect", "s")
        assert noted.code == 0 and 'note: training would refuse: s: no split "valid"' in noted.out
        code = run_program(pretrain, ["--config", "opt-tiny", "--store", "s", "--output", "r"], "pretrain.py")
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and "opt-ds split s --from train" in error
        advice = re.search(r"opt-ds (split s --from \S+( --ratio \S+=[0-9.]+)+)", error)
        assert advice is not None
        before = run("inspect", "s").out
        assert run(*advice[1].split()).code == 0
        after = run("inspect", "s").out
        assert "would refuse" not in after
        tests = [re.search(r"test\D+(\d+)", text)[1] for text in (before, after)]  # type: ignore[index]
        assert tests[0] == tests[1], "the test split stays as it was"

    def test_a_size_that_disagrees(self, run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_synthetic_store(tmp_path / "s", 40, vocab_size=40, image_feature_dim=8, audio_feature_dim=6)
        wrong = ("plan", "--config", "opt-tiny", "--num-gpus", "1", "--store", "s", "--set", "model.vocab_size=99")
        refused = run(*wrong)
        one_line(refused, "model.vocab_size is 99 but the store has 40")
        assert run(*wrong[:-2]).code == 0, "omitted, the size is the store's"
