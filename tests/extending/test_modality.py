"""A fourth modality in files of its own, `touch.py` and `extractor.py`: prepared, trained with its task on two ranks, killed and
resumed, evaluated, exported, served."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.config import load_config
from opt_ds.data.modalities import IMAGE
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.errors import UserError
from opt_ds.model.initial import initial_model
from opt_ds.registry import PLUGINS_VARIABLE
from opt_ds.store import FeatureStore
from opt_ds.tools.assumed_store import AssumedStore
from opt_ds.training import checkpoint
from opt_ds.training.preflight import training_notes
from tests.extending.touch import TOUCH, Touch
from tests.training.runs import free_port, hashes, rank_environment
from tests.training.test_pretrain import SCRIPT
from tests.warm import WarmProcess

if TYPE_CHECKING:
    from opt_ds.serving.session import Session

ROOT = Path(__file__).parents[2]
MODALITY, TASK = "tests.extending.touch:Touch", "tests.extending.touch:MaskedTouchModeling"
EXTRACTOR = "tests.extending.extractor:Touch"
WITH_TOUCH = (f"model.plugins=[{MODALITY}]", f"tasks.plugins=[{TASK}]", "model.touch.max_readings=6")
STEPS = 12


def command(*words: object) -> int:
    return run_command(_build(), [str(word) for word in words], "opt-ds")


@pytest.fixture(scope="module", autouse=True)
def allowed() -> None:
    """The user names the plugins of checkpoints and exported models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PLUGINS_VARIABLE, ",".join((MODALITY, TASK, EXTRACTOR)))
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture(scope="module")
def files(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples of `raw`; all but every third one has touch too, of 1 to 8 readings."""
    folder = Path(shutil.copytree(raw, tmp_path_factory.mktemp("touch") / "files"))
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    for number, line in enumerate(lines):
        if number % 3:
            rows = (f"{10 * row},{row},{number},{row % 2}" for row in range(1 + number % 8))
            (folder / f"{number}.csv").write_text("\n".join(rows))
            line["touch"] = f"{number}.csv"
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def touched(files: Path) -> Path:
    options = ("--extractor", f"touch={EXTRACTOR}", "--vocab-size", 60, "--workers", 1, "--device", "cpu")
    assert command("prepare", "--manifest", files / "manifest.jsonl", "--output", files / "store", *options) == 0
    return files / "store"


def ranks(store: Path, output: Path, *settings: str) -> list[WarmProcess]:
    given = (
        *WITH_TOUCH, f"train.max_steps={STEPS}", "schedule.total_steps=200", "schedule.warmup_steps=2", "batch.size=8",
        "train.image_grid=0", "train.validate_every=6", "train.log_every=1", "checkpoint.every_steps=4", *settings,
    )  # fmt: skip
    options = [part for setting in given for part in ("--set", setting)]
    line = [str(SCRIPT), "--config", "opt-tiny", "--store", str(store), "--output", str(output), *options]
    port = free_port()
    return [WarmProcess(line, rank_environment(rank, 2, port) | {"PYTHONPATH": str(ROOT)}, cwd="/") for rank in range(2)]


def finish(started: list[WarmProcess]) -> None:
    for process in started:
        _, error = process.communicate(240)
        assert process.returncode == 0, error


@pytest.fixture(scope="module")
def whole(touched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing interrupts."""
    output = tmp_path_factory.mktemp("run") / "whole"
    finish(ranks(touched, output))
    return output


def test_every_sample_is_read_with_its_readings_and_masked_by_the_modalitys_own_rule(touched: Path) -> None:
    store = FeatureStore(touched)
    config = load_config("opt-tiny", [*WITH_TOUCH, "model.touch.feature_dim=3", "batch.size=64", "model.vocab_size=60"])
    step_plan, reader = PretrainingPlan(config, [store]).step(0).samples, SampleReader(config, [store])
    seen = set()
    for index in range(64):
        sample, row = reader.read(step_plan, index), step_plan.input_rows[index, TOUCH]
        assert (TOUCH in sample.items) == (row >= 0)
        if row >= 0:
            touch = sample.of(TOUCH)
            assert (touch.features == store.columns("touch", row)["features"][:6]).all()
            hidden = int(np.ceil(0.15 * len(touch))) if "mtm" in sample.targets else 0
            assert touch.is_masked.tolist() == [False] * (len(touch) - hidden) + [True] * hidden
            seen.add(hidden > 0)
    assert seen == {False, True}
    assert step_plan.input_positions().max() > 1 + step_plan.input_lengths[:, :TOUCH].sum(1).max(), (
        "its rows are in the sequence"
    )


def test_a_model_without_it_reads_the_same_store_as_before(touched: Path, raw_store: Path, logged: list[str]) -> None:
    """The other modalities' plans are those of the store without touch."""
    config = load_config("opt-tiny", ["batch.size=64", "model.vocab_size=60", "tasks.dir.weight=0"])
    with_it, without = (PretrainingPlan(config, [FeatureStore(path)]).step(0).samples for path in (touched, raw_store))
    assert with_it.input_rows.shape[1] == 3
    assert np.array_equal(with_it.input_rows, without.input_rows) and np.array_equal(with_it.task, without.task)


def test_two_ranks_train_it_and_a_killed_run_goes_on_to_the_same_weights(touched: Path, whole: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert any("train/mtm/loss" in line for line in lines)
    table = json.loads((whole / "validation.json").read_text())
    assert table["baselines"]["mtm"] > 0
    output = tmp_path / "killed"
    started = ranks(touched, output)
    while not (output / "checkpoints" / "step-00000008").is_dir():
        assert all(process.poll() is None for process in started)
        time.sleep(0.002)
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    finish(ranks(touched, output))
    assert hashes(output, STEPS) == hashes(whole, STEPS)


def test_its_weights_are_trained_and_its_statistics_set(touched: Path, whole: Path) -> None:
    model, config = checkpoint.load_model(whole)
    assert config.model.touch.feature_dim == 3, "taken from the store"
    store = FeatureStore(touched)
    assert model.embeddings.modality.weight.shape[0] == 4
    mean = torch.tensor(store.description.statistics["touch"].mean)
    assert torch.allclose(model.embeddings.touch_standardizer.mean, mean)
    untrained = dict(initial_model(config, [store]).named_parameters())
    of_touch = {name: own for name, own in model.named_parameters() if ".touch." in name or name.startswith("mtm.")}
    assert len(of_touch) == 8
    for name, own in of_touch.items():
        assert not torch.equal(own, untrained[name]), f"{name} is still the initial one"


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_stage_trains_it_as_stage_1_does(stage: int, touched: Path, whole: Path, tmp_path: Path) -> None:
    finish(ranks(touched, tmp_path / "run", f"zero.stage={stage}", "train.max_steps=4"))
    found, expected = (losses(output) for output in (tmp_path / "run", whole))
    assert len(found) == 4 and all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in found)


def losses(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_a_store_may_lack_it(touched: Path, raw_store: Path) -> None:
    """Beside a store that has it, alone, or where no store is prepared yet."""
    config = load_config("opt-tiny", [*WITH_TOUCH, "model.touch.feature_dim=3", "batch.size=48", "model.vocab_size=60"])
    for paths, has_touch in (([touched, raw_store], True), ([raw_store], False)):
        stores = [FeatureStore(path) for path in paths]
        step_plan = PretrainingPlan(config, stores).step(0)
        rows = step_plan.samples.input_rows[:, TOUCH]
        assert (rows >= 0).any() == has_touch and (step_plan.counts["mtm"] > 0) == has_touch
        assert (rows[step_plan.samples.store == len(stores) - 1] < 0).all()
        reader = SampleReader(config, stores)
        assert all(reader.read(step_plan.samples, index).items for index in range(8))
        assert ("model.plugins: no store has touch" in training_notes(config, stores)) != has_touch
    assumed = AssumedStore(config.model, 10, 8, 20)
    assert PretrainingPlan(config, [assumed]).step(0).counts["mtm"] == 0 and str(assumed.path).endswith(
        ", without touch"
    )
    without = load_config("opt-tiny", ["model.vocab_size=60"])
    assert any("its touch is not read" in line for line in training_notes(without, [FeatureStore(touched)]))


def test_arrays_that_are_kept_with_a_store_are_those_of_the_modality() -> None:
    """Two modalities of the same limit have other lengths."""

    class Smell(Touch):
        name = "smell"

    model = load_config("opt-tiny", [*WITH_TOUCH]).model
    assert Smell(model, TOUCH).lengths_key != Touch(model, TOUCH).lengths_key


def test_it_is_evaluated_exported_and_served(
    touched: Path, whole: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--checkpoint", whole, "--store", touched, "--output", tmp_path / "summary.json")
    assert command("evaluate", "summary", *given) == 0, capsys.readouterr().err
    assert "mtm" in capsys.readouterr().out
    assert command("export", "--checkpoint", whole, "--output", tmp_path / "model") == 0, capsys.readouterr().err

    import opt_ds
    from opt_ds.serving.session import Session

    session = Session.load(tmp_path / "model")
    sample = session.processor(image=files / "4.png", touch=files / "4.csv")
    stored = FeatureStore(touched)
    index = next(i for i in range(stored.num_samples) if stored.sample_id(i) == "4")
    row = stored.rows[index, TOUCH]
    assert (sample.of(TOUCH).features == stored.columns("touch", row)["features"]).all() and IMAGE in sample.items
    assert isinstance(session.text(sample), str)
    model = opt_ds.load(tmp_path / "model")
    assert isinstance(model.caption(files / "4.png"), str)
    with pytest.raises(UserError, match=r'no modality "tuch" \(did you mean "touch"'):
        session.processor(image=files / "missing.png", tuch=files / "4.csv")
    described = answer(session, files, allow_further=True)
    assert described.status_code == 200 and isinstance(described.json()["text"], str)
    refused = answer(session, files, allow_further=False)
    assert refused.status_code == 422 and 'unknown field "touch"' in refused.json()["detail"]
    both, image = (session.packer.pack([own]).inputs for own in (sample, session.processor(image=files / "4.png")))
    assert not torch.allclose(session.model.encode_cls(both), session.model.encode_cls(image)), "it is read"


def answer(session: "Session", files: Path, *, allow_further: bool) -> Any:
    """The answer of the server to an image and a file of touch."""
    from fastapi.testclient import TestClient

    from opt_ds.serving.app import build_app

    client = TestClient(build_app(session, allow_further=allow_further), base_url="http://localhost")
    names = {"image": "4.png", "touch": "4.csv"}
    return client.post("/api/describe", files={field: (name, (files / name).read_bytes()) for field, name in names.items()})


def test_a_model_of_the_three_modalities_cannot_take_it(raw_store: Path) -> None:
    with pytest.raises(UserError, match=r'unknown key "model\.touch"'):
        load_config("opt-tiny", ["model.touch.max_readings=6"])
    with pytest.raises(UserError, match=r'unknown key "model.touch.max_reading" \(did you mean "max_readings"\?\)'):
        load_config("opt-tiny", [WITH_TOUCH[0], "model.touch.max_reading=6"])


def test_a_configuration_with_it_goes_to_another_process(tmp_path: Path) -> None:
    import pickle
    import subprocess
    import sys

    config = load_config("opt-tiny", [*WITH_TOUCH])
    assert pickle.loads(pickle.dumps(config)) == config
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    environment = {name: value for name, value in os.environ.items() if name != PLUGINS_VARIABLE} | {"PYTHONPATH": str(ROOT)}
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'config')!r}, 'rb')).model.touch.max_readings)"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == "6", found.stderr


def test_a_checkpoint_alone_cannot_name_code(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    environment = {name: value for name, value in os.environ.items() if name != PLUGINS_VARIABLE} | {"PYTHONPATH": str(ROOT)}
    code = f"from opt_ds.training.checkpoint import load_model; load_model({str(whole)!r})"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode and f"set the environment variable {PLUGINS_VARIABLE}={MODALITY}" in found.stderr
