"""`opt-ds generate`, `export` and `evaluate image-generation`, as typed."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.serving.limits import Limits


def opt_ds(*arguments: object) -> int:
    return run_command(_build(), [str(argument) for argument in arguments], "opt-ds")


def test_text_and_image_are_written(run: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "out" / "a.txt"
    assert opt_ds("generate", "--checkpoint", run, "--image", raw / "0.png", "--to", "text", "--output", text) == 0
    assert text.read_text().strip() == capsys.readouterr().out.strip()
    image = tmp_path / "a.png"
    given = ("--text", "a red square", "--to", "image", "--candidates", 2, "--output", image)
    assert opt_ds("generate", "--checkpoint", run, *given) == 0
    assert Image.open(image).size == (64, 64) and "the best of 2" in capsys.readouterr().out


def test_a_dash_is_standard_output(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("generate", "--checkpoint", run, "--text", "a red square", "--output", "-", "--to")
    assert opt_ds(*given, "text") == 0
    assert capfdbinary.readouterr().out.decode().count("\n") == 1
    assert opt_ds(*given, "image") == 0
    assert Image.open(io.BytesIO(capfdbinary.readouterr().out)).size == (64, 64), "nothing but the PNG"
    assert not list(tmp_path.iterdir()), 'no file of the name "-"'


@pytest.mark.parametrize("output", ["-", "a.txt"])
def test_text_that_is_not_utf8_is_one_line(output: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = os.fsdecode("ein schöner Tag".encode("latin-1"))
    assert opt_ds("generate", "--checkpoint", tmp_path, "--to", "text", "--text", text, "--output", tmp_path / output) == 2
    assert capsys.readouterr().err == (
        "error: --text: is not UTF-8 (byte 0xf6 at character 8): convert it, as with iconv -t UTF-8\n"
    )


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("opt.example.org", True), ("localhost", True), ("10.0.0.5", True), ("::1", True), ("[2001:db8::1]", True),
        ("http://opt.example.org", False), ("opt.example.org:8080", False), ("*", False), ("a b", False), ("", False),
    ],
)  # fmt: skip
def test_an_allowed_host_is_a_name_alone(name: str, accepted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert opt_ds("serve", "--checkpoint", tmp_path / "none", "--allow-host", "a.example", "--allow-host", name) == 2
    error = capsys.readouterr().err
    assert ("--allow-host" not in error) == accepted and error.count("\n") == 1, error


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--to", "img", "--text", "a"), 'choose text or image (did you mean "image"?)'),
        (("--to", "text"), "no input"),
        (("--to", "text", "--image", "/nowhere.png"), "no such file"),
        (("--to", "image", "--text", "a", "--guidance", "3"), "trained without dropped conditions"),
        (("--to", "image", "--text", "a", "--guidance", "nan"), "--guidance"),
    ],
)
def test_mistakes_are_one_line(
    given: tuple[str, ...], expected: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opt_ds("generate", "--checkpoint", run, "--output", tmp_path / "x", *given) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1 and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--set", "plases=3"), 'unknown key "plases" (did you mean "places"?)'),
        (("--set", "places=0"), "places: must be at least 1 (found 0)"),
        (("--set", "places"), "write it as key.path=value"),
        (("--config", "gone.yaml"), '--config "gone.yaml" is not a file'),
    ],
)
def test_a_bad_limit_of_the_server_is_one_line(
    given: tuple[str, ...], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opt_ds("serve", "--checkpoint", tmp_path / "none", *given) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_the_server_keeps_to_the_limits_of_a_file_and_of_set(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "limits.yaml").write_text("places: 3\nimages: 2\n")
    kept: list[Limits] = []

    class Ready(BaseException):
        pass

    def build(app: object, limits: Limits) -> None:
        kept.append(limits)
        raise Ready

    monkeypatch.setattr("opt_ds.serving.server.build_server", build)
    with pytest.raises(Ready):
        opt_ds("serve", "--checkpoint", run, "--port", "0", "--config", tmp_path / "limits.yaml", "--set", "images=1")
    assert kept == [Limits(places=3, images=1)]


def test_export_then_generate(run: Path, raw_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert opt_ds("export", "--checkpoint", run, "--output", tmp_path / "model") == 0
    given = ("--text", "a red square", "--to", "text", "--output", tmp_path / "a.txt")
    assert opt_ds("generate", "--checkpoint", tmp_path / "model", *given) == 0
    given = ("--checkpoint", tmp_path / "model", "--store", raw_store, "--output", tmp_path / "a.json")
    assert opt_ds("evaluate", "transcription", *given) == 2
    assert "an exported model works with generate and serve only" in capsys.readouterr().err


def test_images_are_generated_and_judged_by_the_models_own_extractor(
    run: Path, raw_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "images.json"
    given = (
        "--checkpoint",
        run,
        "--store",
        raw_store,
        "--split",
        "valid",
        "--output",
        output,
        "--generate",
        3,
        "--candidates",
        2,
    )
    assert opt_ds("evaluate", "image-generation", *given, "--images", 2, "--top-p", 0.9, "--temperature", 1.2) == 0
    figures = json.loads(output.read_text())
    for name in ("T", "A", "T+A"):
        generated = figures[name]["generated"]
        assert generated["samples"] == 3 and generated["sampling"]["top_p"] == 0.9
        assert generated["matching"]["kept"] >= generated["matching"]["first"] and 0 <= generated["nearest"]["R@1"] <= 1
    assert "best of 2" in capsys.readouterr().out and Image.open(output.with_suffix(".png")).width > 500
    assert opt_ds("evaluate", "image-generation", *given, "--inception", tmp_path / "none.pth") == 2
    assert "no such file" in capsys.readouterr().err


def test_retrieval_and_transcription_print_what_they_found(
    run: Path, raw_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--checkpoint", run, "--store", raw_store, "--split", "valid", "--output", tmp_path / "figures.json")
    assert opt_ds("evaluate", "retrieval", *given, "--candidates", 4, "--matching-candidates", 4) == 0
    shown = capsys.readouterr().out
    recall = json.loads((tmp_path / "figures.json").read_text())["text_to_image"]["matching"]["R@1"]
    assert "text→image" in shown and f"{recall:.1%}" in shown and "chance" in shown
    assert opt_ds("evaluate", "transcription", *given, "--limit", 4, "--ignore-words", "a red") == 0
    shown = capsys.readouterr().out
    row = json.loads((tmp_path / "figures.json").read_text())["A"]
    assert f"{row['wer']:.1%}" in shown and f"other words {row['wer_of_other_words']:.1%}" in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.faults)])
def test_serve_finishes_what_it_computes_and_ends(number: int, run: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with open(log, "wb") as output:
        command = [sys.executable, "-m", "opt_ds", "serve", "--checkpoint", str(run), "--port", "0", "--device", "cpu"]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    while not (match := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
        assert server.poll() is None, log.read_text()
        time.sleep(0.05)
    body = b"text=a+red+square&count=4"
    head = (
        f"POST /api/generate_image HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(match[1])), timeout=60) as client:
        client.sendall(f"{head}Content-Type: application/x-www-form-urlencoded\r\n\r\n".encode() + body)
        time.sleep(0.15)
        os.killpg(server.pid, number)
        received = b"".join(iter(lambda: client.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200"), received[:200]
    assert server.wait(30) == 128 + number
    assert log.read_text().splitlines()[1:] == ["stopped"]
