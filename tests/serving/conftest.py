"""A run like a user's: raw files, prepared, codes written, two steps trained with the real program."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from opt_ds.dvae.training import train_dvae
from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.serving.limits import Limits
from opt_ds.serving.server import build_server, listen
from opt_ds.serving.session import Session
from opt_ds.store import FeatureStore
from tests.training.runs import rank_environment

_QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required", "--window-size=1000,1300",
)  # fmt: skip
COLOURS = {"red": (220, 20, 20), "green": (20, 180, 20), "blue": (30, 30, 220), "yellow": (230, 220, 40)}


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a manifest of twelve samples with all three modalities: a coloured square, its name, a tone."""
    folder = tmp_path_factory.mktemp("raw")
    random = np.random.default_rng(1)
    lines = []
    for number in range(12):
        name = list(COLOURS)[number % len(COLOURS)]
        pixels = np.clip(np.array(COLOURS[name]) + random.integers(-20, 20, (32, 32, 3)), 0, 255).astype("uint8")
        Image.fromarray(pixels).save(folder / f"{number}.png")
        time_s = np.arange(16000) / 16000
        soundfile.write(folder / f"{number}.wav", 0.2 * np.sin(2 * np.pi * (200 + 100 * (number % 4)) * time_s), 16000)
        lines.append(
            {"id": str(number), "image": f"{number}.png", "text": f"a {name} square", "audio": f"{number}.wav",
             "labels": [name], "split": "valid" if number >= 8 else "train"}
        )  # fmt: skip
    (folder / "manifest.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return folder


@pytest.fixture(scope="session")
def raw_store(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of `raw`, with image codes."""
    folder = tmp_path_factory.mktemp("store")
    prepare(raw / "manifest.jsonl", folder / "s", PrepareSettings(vocab_size=60), workers=1, device="cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    train_dvae(folder / "s", folder / "dvae", preset="dvae-tiny", device="cpu", precision="fp32", steps=4)
    return folder / "s"


def start_run(store: Path, output: Path, *settings: str) -> None:
    """Two steps of pretrain.py on the store."""
    dims = FeatureStore(store).description.dims
    given = (
        f"model.vocab_size={dims.vocab_size}", f"model.image_codebook_size={dims.num_codes}", "train.max_steps=2",
        "batch.size=8", "train.image_grid=0", *settings,
    )  # fmt: skip
    options = [part for setting in given for part in ("--set", setting)]
    script = Path(__file__).parents[2] / "opt_ds" / "pretrain.py"
    command = [sys.executable, str(script), "--config", "opt-tiny", "--store", str(store), "--output", str(output), *options]
    done = subprocess.run(command, env=rank_environment(0, 1, 0), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def run(raw_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a finished run."""
    output = tmp_path_factory.mktemp("run") / "run"
    start_run(raw_store, output)
    return output


@pytest.fixture(scope="session")
def session(run: Path) -> Session:
    return Session.load(run)


def without(session: Session, *losses: str) -> Session:
    """The same model as if it had been trained without these losses."""
    tasks = session.config.tasks
    update = {loss: getattr(tasks, loss).model_copy(update={"weight": 0.0}) for loss in losses}
    config = session.config.model_copy(update={"tasks": tasks.model_copy(update=update)})
    return Session(session.model, config, session.processor)


def with_condition_dropout(session: Session) -> Session:
    """The same model as if it had been trained with dropped conditions."""
    tasks = session.config.tasks
    modality = tasks.modality.model_copy(update={"condition_dropout": 0.1})
    config = session.config.model_copy(update={"tasks": tasks.model_copy(update={"modality": modality})})
    return Session(session.model, config, session.processor)


@pytest.fixture(scope="session")
def address(session: Session, raw_store: Path) -> Iterator[str]:
    """A real server on a free port of this machine."""
    from opt_ds.serving.app import build_app
    from opt_ds.serving.neighbours import Neighbours, evaluator_of

    with serving(build_app(session, Neighbours(evaluator_of(session, raw_store), "train"))) as port:
        yield f"http://127.0.0.1:{port}"


@contextmanager
def serving(app: Any, limits: Limits | None = None) -> Iterator[int]:
    """The server that `opt-ds serve` starts, in a thread; its port on 127.0.0.1."""
    listening = listen("127.0.0.1", 0)
    server = build_server(app, limits)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join(timeout=30)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium; it and its driver are installed from Debian's packages where they are missing."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.skip("no chromium and chromedriver here, and no right to install them")
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], check=True, env=environment)
        packages = ["chromium", "chromium-driver"]
        subprocess.run(["apt-get", "install", "-yqq", "--no-install-recommends", *packages], check=True, env=environment)
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in (*_QUIET, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()
