"""One bit flipped in every file of a run, a store and an exported model: every command that reads the file refuses it.

A command either ends with exit code 2 and one line, or, where the flipped file is not read or is made again, with the result
that it has without the flip. `FREE` names the files that nobody computes from. The default suite flips one bit per file, the
campaign several.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.config.dvae import DVAE_PRESETS
from opt_ds.dvae.codes import CodeExtractor, write_missing_codes
from opt_ds.dvae.model import DiscreteVAE
from opt_ds.serving.export import export
from opt_ds.serving.exported import load_exported
from opt_ds.store import FeatureStore, inspect_store, open_store
from opt_ds.store.synthetic import write_synthetic_store
from tests.logs import logged_lines
from tests.training.runs import FITTED, train

#: Files that are not used in computations: notes or plots for people, or files that are made again.
FREE = {
    "store": {"verified.json", "lengths.png", "report.json"},
    "exported": {"README.md"},
    "run": {"config.yaml", "metrics.jsonl", "validation.json", ".lock"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, group: Any) -> Path:
    """A folder with a store that has codes and their dVAE, a run of two steps on it, and the run's exported model."""
    folder = tmp_path_factory.mktemp("flips")
    store = folder / "store"
    write_synthetic_store(store, 40, seed=3, regions=(4, 8), frames=(16, 40), num_codes_vocab=None, samples_per_shard=20)
    write_missing_codes(store, CodeExtractor(DiscreteVAE(DVAE_PRESETS["dvae-tiny"])))
    config = run_config(folder)
    train(config, folder / "run", group)
    export(folder / "run", folder / "exported")
    open_store(store)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def files_of(made: Path, part: str) -> list[str]:
    everything = sorted(str(f.relative_to(made / part)) for f in (made / part).rglob("*") if f.is_file())
    return [name for name in everything if name not in FREE[part] and "tensorboard" not in name and "tfevents" not in name]


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def positions(name: str, size: int, count: int) -> list[int]:
    """Return the middle of the file, then seeded positions over all of it."""
    chosen = random.Random(name)
    return [size // 2 * 8, *(chosen.randrange(size * 8) for _ in range(count - 1))]


def opt_ds(*arguments: object) -> int:
    return run_command(_build(), [str(argument) for argument in arguments], "opt-ds")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> None:
    """The command ends with code 2 and one line on stderr that names the folder."""
    capsys.readouterr()
    code, said = opt_ds(*arguments), capsys.readouterr()
    lines = [line for line in said.err.splitlines() if not line.startswith(("note:", "warning:", "FAILED"))]
    assert code == 2, (arguments, said)
    assert "Traceback" not in said.err and (len(lines) == 1 or "FAILED" in said.err), said.err


def each_flip(folder: Path, part: str, name: str, count: int) -> Iterator[int]:
    file = folder / part / name
    whole, stat = file.read_bytes(), file.stat()
    for bit in positions(name, len(whole), count):
        flip(file, bit)
        yield bit
        file.write_bytes(whole)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def check_store(folder: Path, name: str, count: int, capsys: pytest.CaptureFixture[str], *, all_commands: bool) -> None:
    store, out = folder / "store", folder / "out"
    expected = {index: FeatureStore(store).caption(index) for index in range(4)}
    for _ in each_flip(folder, "store", name, count):
        halves = ("--ratio", "train=0.5", "--ratio", "valid=0.5")
        commands: list[tuple[object, ...]] = [("inspect", store), ("split", store, *halves)]
        if all_commands:
            commands += [
                ("convert", store, "--output", out),
                ("plan", "--config", "opt-tiny", "--store", store),
                (*evaluation(folder), "--output", out),
                ("finetune", "captioning", "--checkpoint", folder / "run", "--store", store, "--output", out),
                ("train-dvae", "--store", store, "--output", out, "--preset", "dvae-tiny", "--device", "cpu"),
                ("update", store, "--modality", "text"),
            ]
        if name == "index.h5" and not inspect_store(store).failures:  # unreadable or of another store: it is made again
            opened = open_store(store)
            assert {index: opened.caption(index) for index in range(4)} == expected and np.array_equal(
                opened.rows, FeatureStore(folder / "pristine").rows
            )
            continue
        if name == "store.json" and is_only_a_remark(store, folder / "pristine"):
            open_store(store)
            continue
        for command in commands:
            if name.startswith("dvae/") and command[0] in ("train-dvae", "plan"):
                continue  # about to replace it; reads no codes
            refused(capsys, *command)
        assert not out.exists()


def is_only_a_remark(store: Path, pristine: Path) -> bool:
    """Whether the flip changed what nobody computes from: white space, `info`, `preparation_key`, a statistic's last digits."""
    try:
        ours, theirs = FeatureStore(store).description, FeatureStore(pristine).description
    except ValueError:
        return False
    remarks = {"info": {}, "preparation_key": ""}
    same = ours.model_copy(update={**remarks, "statistics": {}}) == theirs.model_copy(update={**remarks, "statistics": {}})
    return same and all(
        ours.statistics[name].count == theirs.statistics[name].count
        and np.allclose(ours.statistics[name].mean, theirs.statistics[name].mean, rtol=1e-5, atol=1e-6)
        and np.allclose(ours.statistics[name].std, theirs.statistics[name].std, rtol=1e-5)
        for name in ours.statistics.keys() & theirs.statistics.keys()
    )


def check_run(folder: Path, name: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    run, store, out = folder / "run", folder / "store", folder / "out"
    newest = name.startswith("checkpoints/step-00000002") or name in ("checkpoints/best", "checkpoints/latest")
    loads = not name.endswith("moments.safetensors")
    evaluate = (*evaluation(folder), "--output", out)
    for _ in each_flip(folder, "run", name, count):
        if name == "run.json":
            from opt_ds.training import run_folder

            try:
                run_folder.check_same_run(run, run_config(folder), [FeatureStore(store)])
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                own = json.loads((run / name).read_bytes())["fixed_settings"]
                assert own == json.loads((folder / "pristine.json").read_bytes())
        elif name.startswith("processor/"):
            refused(capsys, "export", "--checkpoint", run, "--output", out)
            refused(capsys, "generate", "--checkpoint", run, "--text", "w1", "--to", "text", "--output", out)
            refused(capsys, *evaluate)
        elif newest and loads and name != "checkpoints/latest":
            refused(capsys, "export", "--checkpoint", run, "--output", out)
            refused(capsys, "generate", "--checkpoint", run, "--text", "w1", "--to", "text", "--output", out)
            refused(capsys, *evaluate)
            refused(capsys, "finetune", "captioning", "--checkpoint", run, "--store", store, "--output", out)
        elif name == "checkpoints/latest":
            refused(capsys, "report", run, "--output", out)
        if name.startswith("checkpoints/step-"):
            assert_resume_takes_the_other(run, name)
        assert not out.exists()


def run_config(folder: Path) -> Any:
    from opt_ds.config import load_config

    settings = [*FITTED, f"data.stores=[{folder / 'store'}]", "model.image_codebook_size=32", "train.max_steps=2"]
    return load_config("opt-tiny", [*settings, "checkpoint.every_steps=1"])


def assert_resume_takes_the_other(run: Path, name: str) -> None:
    from opt_ds.training import checkpoint

    with logged_lines() as logged:
        found = checkpoint.find_resumable(run)
    other = "step-00000001" if "step-00000002" in name else "step-00000002"
    assert found is not None and found.name == other
    assert len(logged) == (1 if other == "step-00000001" else 0)


def check_exported(folder: Path, name: str, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in each_flip(folder, "exported", name, count):
        given = ("--checkpoint", folder / "exported", "--text", "w1", "--to", "text", "--output", folder / "out")
        refused(capsys, "generate", *given)
        refused(capsys, "serve", "--checkpoint", folder / "exported", "--port", 0)


def evaluation(folder: Path) -> tuple[object, ...]:
    given = ("--checkpoint", folder / "run", "--store", folder / "store", "--split", "valid")
    return ("evaluate", "retrieval", *given, "--candidates", 2, "--matching-candidates", 2)


def check_that_all_work(folder: Path) -> None:
    """Without a flip the commands do their work: their refusals are those of the flip."""
    store, run, out = folder / "store", folder / "run", folder / "works"
    text = ("--text", "w1", "--to", "text")
    for command in [
        ("inspect", store),
        ("export", "--checkpoint", run, "--output", out / "exported"),
        ("generate", "--checkpoint", run, *text, "--output", out / "a.txt"),
        ("generate", "--checkpoint", folder / "exported", *text, "--output", out / "b.txt"),
        (*evaluation(folder), "--output", out / "figures.json"),
        ("report", run, "--output", out / "report.html"),
        ("convert", store, "--output", out / "converted"),
    ]:
        assert opt_ds(*command) == 0, command


def campaign(made: Path, folder: Path, count: int, capsys: pytest.CaptureFixture[str], *, all_commands: bool) -> int:
    shutil.copytree(made / "store", folder / "pristine")
    (folder / "pristine.json").write_text(json.dumps(json.loads((made / "run" / "run.json").read_text())["fixed_settings"]))
    checks: dict[str, Callable[[str], None]] = {
        "store": lambda name: check_store(folder, name, count, capsys, all_commands=all_commands),
        "run": lambda name: check_run(folder, name, count, capsys),
        "exported": lambda name: check_exported(folder, name, count, capsys),
    }
    total = 0
    for part, check in checks.items():
        for name in files_of(made, part):
            check(name)
            total += count
    return total


@pytest.mark.timeout(900)
def test_one_bit_of_every_file(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert campaign(made, folder, 1, capsys, all_commands=False) > 30
    load_exported(folder / "exported")  # everything was put back


@pytest.mark.faults
@pytest.mark.timeout(3600)
def test_many_bits_of_every_file_for_every_command(made: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_that_all_work(folder)
    campaign(made, folder, 12, capsys, all_commands=True)
