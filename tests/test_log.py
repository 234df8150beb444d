"""What is logged reaches the user once: by level on stdout or stderr, by one rank, and only where a command runs."""

import ast
import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from tqdm import tqdm

from opt_ds import log
from opt_ds.cli.program import run_program
from opt_ds.errors import UserError
from opt_ds.log import EVERY_RANK, LEVEL_VARIABLE, ON_STDERR, LineFormatter
from opt_ds.store.files import exclusive_use

ROOT = Path(__file__).parent.parent
LOGGER = logging.getLogger("opt_ds.store.somewhere")
#: Every level, a message of every rank, and one next to a result.
SAMPLES = (
    (logging.DEBUG, "looked", None),
    (logging.INFO, "made 100% of {it}", None),
    (logging.INFO, "note: chosen", ON_STDERR),
    (logging.WARNING, "cut", None),
    (logging.WARNING, "no room", EVERY_RANK),
    (logging.ERROR, "lost", None),
)


def talk() -> None:
    """A command that logs all of them and prints a result."""
    for level, text, extra in SAMPLES:
        LOGGER.log(level, text, extra=extra)
    typer.echo("result")


def streams(capsys: pytest.CaptureFixture[str], rank: int = 0) -> tuple[list[str], list[str]]:
    assert run_program(talk, [], "talk", rank) == 0
    found = capsys.readouterr()
    return found.out.splitlines(), found.err.splitlines()


def test_information_is_on_stdout_as_it_is_and_the_rest_on_stderr_with_its_level(
    capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = streams(capsys)
    assert out == ["made 100% of {it}", "result"]
    assert err == ["note: chosen", "warning: cut", "warning: rank 0: no room", "error: lost"]


def test_other_ranks_print_errors_and_what_every_rank_prints(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = streams(capsys, rank=3)
    assert out == ["result"], "a result is the command's matter"
    assert err == ["warning: rank 3: no room", "error: rank 3: lost"]


@pytest.mark.parametrize(
    ("level", "out", "err"),
    [
        ("debug", 1, [f"debug: {LOGGER.name}: looked", "note: chosen", "warning: cut", "warning: rank 0: no room"]),
        ("", 1, ["note: chosen", "warning: cut", "warning: rank 0: no room"]),
        (" Warning ", 0, ["warning: cut", "warning: rank 0: no room"]),
        ("error", 0, []),
    ],
)
def test_the_environment_sets_the_level(
    level: str, out: int, err: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, level)
    assert streams(capsys) == ([*["made 100% of {it}"][:out], "result"], [*err, "error: lost"])


def test_an_unknown_level_is_a_mistake_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "debgu")
    assert run_program(talk, [], "talk") == 2
    assert capsys.readouterr().err == (
        'error: OPT_DS_LOG_LEVEL "debgu": choose debug, info, warning, error (did you mean "debug"?)\n'
    )


def test_afterwards_logging_is_as_before_and_nothing_is_printed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    logger, root = logging.getLogger("opt_ds"), logging.getLogger()
    own = logging.StreamHandler(io.StringIO())
    before = (list(logger.handlers), logger.level, logger.propagate)
    root.addHandler(own)  # as a library does that calls logging.basicConfig
    try:
        with pytest.raises(UserError), log.to_terminal():
            assert run_program(talk, [], "talk") == 0  # one command within another
            LOGGER.info("between")
            raise UserError("stop")
    finally:
        root.removeHandler(own)
    assert (list(logger.handlers), logger.level, logger.propagate) == before
    out, err = capsys.readouterr()
    assert out.splitlines() == ["made 100% of {it}", "result", "between"] and len(err.splitlines()) == 4
    assert own.stream.getvalue() == ""


def test_one_formatter_makes_every_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(LineFormatter, "format", lambda self, record: f"<{record.getMessage()}>")
    out, err = streams(capsys)
    assert out == ["<made 100% of {it}>", "result"]
    assert err == ["<note: chosen>", "<cut>", "<no room>", "<lost>"]


def test_one_module_configures_logging_and_only_commands_print() -> None:
    """Everything else logs to its own module's logger."""
    found = {"print": set(), "configure": set(), "getLogger": set()}
    for file in sorted((ROOT / "opt_ds").rglob("*.py")):
        name = str(file.relative_to(ROOT / "opt_ds"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name("print")):
                    found["print"].add(name)
                case ast.Call(func=ast.Attribute(attr="basicConfig" | "addHandler" | "addFilter" | "dictConfig")):
                    found["configure"].add(name)
                case ast.Call(func=ast.Attribute(attr="getLogger")) if ast.unparse(node) != "logging.getLogger(__name__)":
                    found["getLogger"].add(name)
    assert found == {
        # what ends a program, before logging is there and after it; an answer to the parent process; a page; the lines
        "print": {
            "cli/__init__.py", "pretrain.py", "cli/program.py", "ingest/importers/espeak_worker.py",
            "ingest/importers/piper_worker.py", "tools/config_reference.py", "log.py",
        },
        "configure": {"log.py"},
        "getLogger": {"log.py", "pretrain.py"},
    }


def test_importing_configures_nothing_and_a_program_without_logging_sees_warnings_once() -> None:
    """As a notebook does: no command runs. Python prints warnings itself, unless somebody attached a handler."""
    program = (
        "import json, logging, sys\n"
        "import opt_ds, opt_ds.cli, opt_ds.cli.data, opt_ds.store.files\n"
        "before = [logging.getLogger().handlers, logging.getLogger('opt_ds').handlers]\n"
        "logging.getLogger('opt_ds.store').info('progress')\n"
        "logging.getLogger('opt_ds.serving').warning('cut')\n"
        "print(json.dumps([len(handlers) for handlers in before]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=_environment(), capture_output=True, text=True)
    assert json.loads(done.stdout) == [0, 0], done.stderr
    assert [line for line in done.stderr.splitlines() if line in ("progress", "cut")] == ["cut"]


def test_two_ranks_print_a_runs_lines_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Each rank is a process that logs the same. The second one prints only its own messages."""
    for rank in range(2):
        in_a_child(lambda rank=rank: run_program(talk, [], "talk", rank))
    lines = [line for stream in capfd.readouterr() for line in stream.splitlines()]
    assert lines.count("made 100% of {it}") == lines.count("warning: cut") == lines.count("note: chosen") == 1, lines
    assert {"warning: rank 0: no room", "warning: rank 1: no room", "error: lost", "error: rank 1: lost"} <= set(lines)


def test_a_forked_process_and_a_thread_print_their_lines_once(capfd: pytest.CaptureFixture[str]) -> None:
    with log.to_terminal():
        LOGGER.info("parent")
        in_a_child(lambda: LOGGER.info("child"))
        thread = threading.Thread(target=LOGGER.info, args=("thread",))
        thread.start()
        thread.join()
    assert capfd.readouterr().out.splitlines() == ["parent", "child", "thread"]


def test_each_line_is_flushed_and_a_closed_pipe_is_no_logging_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()
            if "again" in self.flushed:
                raise BrokenPipeError(32, "Broken pipe")

    pipe = Pipe()
    monkeypatch.setattr(sys, "stdout", pipe)
    with log.to_terminal():
        LOGGER.info("made")
        assert pipe.flushed == "made\n"
        with pytest.raises(BrokenPipeError):
            LOGGER.info("again")


def test_a_name_that_the_terminal_cannot_show_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    with log.to_terminal():
        LOGGER.info("caf\xe9 \udcff")
    assert terminal.buffer.getvalue() == b"caf\\xe9 \\udcff\n"  # type: ignore[attr-defined]


def test_streams_that_were_closed_before_the_start_stop_nothing(tmp_path: Path) -> None:
    program = "import logging\nfrom opt_ds import log\nlogger = logging.getLogger('opt_ds.x')\nwith log.to_terminal():\n"
    program += f"    logger.info('a')\n    logger.warning('b')\nopen({str(tmp_path / 'end')!r}, 'w').close()\n"
    subprocess.run(["sh", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, program], env=_environment(), check=True)
    assert (tmp_path / "end").exists()


def test_a_server_that_configures_logging_leaves_our_lines(capsys: pytest.CaptureFixture[str]) -> None:
    import logging.config

    from uvicorn.config import LOGGING_CONFIG

    with log.to_terminal():
        logging.config.dictConfig({**LOGGING_CONFIG, "loggers": {}})  # opt-ds serve logs from within uvicorn
        LOGGER.info("made")
    assert capsys.readouterr().out == "made\n"


def test_a_line_does_not_tear_the_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with log.to_terminal(), tqdm(total=2, file=sys.stderr, ascii=True, mininterval=0) as bar:
        bar.update(1)
        LOGGER.info("step 1")
        LOGGER.warning("slow")
    out, err = capsys.readouterr()
    assert out == "step 1\n"
    assert "\rwarning: slow\n" in err and "1/2warning" not in err.replace(" ", "")


def test_a_traceback_follows_its_message(capsys: pytest.CaptureFixture[str]) -> None:
    with log.to_terminal():
        try:
            raise KeyError("gone")
        except KeyError as error:
            LOGGER.error("internal error %d", 7, exc_info=error)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["error: internal error 7", "Traceback (most recent call last):"] and lines[-1] == "KeyError: 'gone'"


def test_what_the_library_logs_is_printed_by_a_command_at_once(tmp_path: Path) -> None:
    """A second process waits for the first, and prints that it waits before it has the store."""
    store = tmp_path / "s"
    program = "from opt_ds import log\nfrom opt_ds.store.files import exclusive_use\nfrom pathlib import Path\n"
    program += f"with log.to_terminal(), exclusive_use(Path({str(store)!r})): pass\n"
    with exclusive_use(store):
        second = subprocess.Popen([sys.executable, "-c", program], env=_environment(), stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert second.stdout.readline() == f"{store}: another process is writing it: waiting\n"
    assert second.communicate(timeout=60)[0] == "" and second.returncode == 0


def in_a_child(work: Callable[[], object]) -> None:
    """Do `work` in a forked process, and wait for its end."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    os.waitpid(child, 0)


def _environment(**variables: str) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID", LEVEL_VARIABLE)}
    return {**own, "PYTHONPATH": str(ROOT), **variables}
