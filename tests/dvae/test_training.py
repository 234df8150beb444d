"""Training the dVAE on a store: it learns, resumes bit-exactly, writes codes, and names bad input in one line."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import opt_ds.dvae.trainer as program
from opt_ds.dvae import training
from opt_ds.dvae.codes import CodeExtractor, codebook_use, reconstruction_quality, split_image_rows
from opt_ds.dvae.model import DVAE_PRESETS, DiscreteVAE, psnr_db
from opt_ds.dvae.trainer import DVAERun, DVAETrainer
from opt_ds.dvae.training import train_dvae
from opt_ds.errors import RunError, TrainingStoppedError, UserError
from opt_ds.store import FeatureStore, inspect_store
from opt_ds.store.files import atomic_file
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.training import checkpoint, run_folder

NUM_SAMPLES = 24


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def threads_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_synthetic_store(tmp_path / "store", NUM_SAMPLES, num_codes_vocab=None, samples_per_shard=10, missing=0.2)
    return tmp_path / "store"


def train(store: Path, output: Path, **options) -> dict:
    return train_dvae(store, output, preset="dvae-tiny", device="cpu", **{"write_codes": False, **options})


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def test_a_run_writes_its_result_and_the_codes_that_the_model_gives(
    store: Path, tmp_path: Path, logged: list[str]
) -> None:
    result = train(store, tmp_path / "run", write_codes=True)
    opened = FeatureStore(store)
    assert inspect_store(store).failures == []
    dvae = DiscreteVAE.from_pretrained(tmp_path / "run")
    assert opened.description.extractors["codes"] == dvae.fingerprint() == result["fingerprint"]
    assert opened.description.dims.num_codes == 32
    num_images = len(opened.region_counts)
    assert num_images < NUM_SAMPLES  # some samples have no image
    for row in range(num_images):
        expected = dvae.encode(torch.from_numpy(np.array(opened.pixels(row)))[None])[0]
        assert (opened.codes(row) == expected.numpy()).all()
    assert DiscreteVAE.from_pretrained(store / "dvae").fingerprint() == dvae.fingerprint()
    for file in ("run.json", "result.json", "reconstructions.png", "tensorboard"):
        assert (tmp_path / "run" / file).exists()
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written == result and set(written["reconstruction"]) == {"train", "valid"}
    assert written["codebook"]["codes_used"] <= 32
    assert set(written["controls"]) == {"valid"}, "what it was trained on needs no control"
    controls = written["controls"]["valid"]["psnr_db"]["controls"]
    assert set(controls) == {"untrained", "jpeg", "mean_image", "another_image"}
    shown = [line for line in logged if line.startswith("dVAE: valid, mean PSNR per image")]
    assert len(shown) == 1 and "JPEG of as many bits" in shown[0] and "untrained (k-means)" in shown[0]


def test_training_lowers_the_loss_of_relaxed_and_of_argmax_codes(store: Path, tmp_path: Path) -> None:
    settings = ("learning_rate=3e-3", "steps=60", "batch_size=8")
    result = train(store, tmp_path / "run", settings=settings)
    assert result["reconstruction"]["train"]["psnr_db"] > result["kmeans_start_psnr_db"] + 0.02


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store and a run on it that was never interrupted."""
    folder = tmp_path_factory.mktemp("complete")
    write_synthetic_store(folder / "store", NUM_SAMPLES, num_codes_vocab=None, samples_per_shard=10, missing=0.2)
    torch.set_num_threads(1)
    train(folder / "store", folder / "run")
    return folder / "store", folder / "run"


@pytest.mark.parametrize("cut", [3, 9])  # with relaxed codes; with the decoder alone
def test_a_run_that_was_cut_off_resumes_bit_equal(
    complete: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    store, whole = complete
    _train_until(cut, store, tmp_path / "cut", monkeypatch)
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    started = _noted_steps(monkeypatch)
    train(store, tmp_path / "cut", checkpoint_every=cut)
    assert started[0] == cut
    assert weights(tmp_path / "cut") == weights(whole)
    assert weights(tmp_path / "cut") != _weights_of_other_seed(store, tmp_path)
    assert not (tmp_path / "cut" / "checkpoints").exists(), "they are needed until the run is complete"


def test_images_are_shifted_by_what_seed_and_step_select_in_both_phases(
    complete: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, unshifted = complete
    seen: dict[int, np.ndarray] = {}
    real = DVAETrainer._training_pixels

    def note(self: DVAETrainer, index: np.ndarray) -> np.ndarray:
        found = real(self, index)
        again = seen.setdefault(self.state.step, found)
        np.testing.assert_array_equal(found, again)
        plain = np.stack([self.spec.store.pixels(int(row)) for row in self.spec.rows[index]])
        moved = [not np.array_equal(a, b) for a, b in zip(found, plain, strict=True)]
        assert any(moved) and all(np.isin(a, b).all() for a, b in zip(found, plain, strict=True)), "the image's own values"
        return found

    monkeypatch.setattr(DVAETrainer, "_training_pixels", note)
    shifts = ("max_shift=2",)
    train(store, tmp_path / "whole", settings=shifts)
    assert len(seen) == 12 and weights(tmp_path / "whole") != weights(unshifted)
    for cut in (3, 9):
        output = tmp_path / str(cut)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(DVAETrainer, "train_step", _dying_after(cut))
            train(store, output, settings=shifts, checkpoint_every=cut)
        train(store, output, settings=shifts, checkpoint_every=cut)
        assert weights(output) == weights(tmp_path / "whole")


@pytest.mark.parametrize("key", ["max_shift", "l1_weight", "coarse_weight"])
def test_a_run_that_began_before_a_setting_existed_resumes(
    complete: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    store, whole = complete
    _train_until(3, store, tmp_path / "run", monkeypatch)
    file = tmp_path / "run" / "run.json"
    record = json.loads(file.read_text())
    assert record["fixed_settings"].pop(f"config.{key}") == 0
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"holds another run .config.{key} was 0(.0)? there and is 1(.0)? now"):
        train(store, tmp_path / "run", settings=(f"{key}=1",))
    train(store, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(whole)


@pytest.mark.parametrize("cut", [3, 9])
def test_a_checkpoint_in_the_former_format_resumes_bit_equal(
    complete: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    store, whole = complete
    with monkeypatch.context() as patch:
        patch.setattr(DVAETrainer, "save", _save_in_former_format)
        _train_until(cut, store, tmp_path / "cut", monkeypatch)
    assert sorted(path.name for path in (tmp_path / "cut").glob("checkpoint*")) == ["checkpoint.pt"]
    started = _noted_steps(monkeypatch)
    train(store, tmp_path / "cut")
    assert started[0] == cut and weights(tmp_path / "cut") == weights(whole)
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_a_damaged_checkpoint_in_the_former_format_is_one_line(
    complete: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DVAETrainer, "save", _save_in_former_format)
        _train_until(3, complete[0], tmp_path / "cut", monkeypatch)
    file = tmp_path / "cut" / "checkpoint.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (bytes(content), bytes(content[:100]), b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"checkpoint\.pt: damaged checkpoint: remove it to start the run again"):
            train(complete[0], tmp_path / "cut")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    complete: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    store, whole = complete
    output = tmp_path / "run"
    _train_until(9, store, output, monkeypatch, checkpoint_every=3)
    found = [folder.name for folder in checkpoint.all_checkpoints(output)]
    assert found == ["step-00000009", "step-00000006"], "the last two are kept"
    (output / "checkpoints" / found[0] / "moments.safetensors").write_bytes(b"")
    started = _noted_steps(monkeypatch)
    train(store, output)
    assert started[0] == 6 and weights(output) == weights(whole)
    assert any("step-00000009 is not usable: moments.safetensors is truncated" in line for line in logged)
    launches = json.loads((output / "run.json").read_text())["launches"]
    assert [launch["resumed_from"] for launch in launches] == [None, "step-00000006"]


def test_only_damaged_checkpoints_are_an_error_and_those_of_a_model_too(
    complete: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    _train_until(3, complete[0], output, monkeypatch)
    with pytest.raises(UserError, match=r"a checkpoint of the dVAE, not of the model: name a run of the model"):
        checkpoint.load_model(output / "checkpoints" / "step-00000003")
    (output / "checkpoints" / "step-00000003" / "state.json").unlink()
    with pytest.raises(UserError, match=r"no checkpoint is usable .*state\.json is missing"):
        train(complete[0], output)


def test_a_run_stops_before_the_time_limit_and_is_saved(
    complete: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_JOB_END_TIME", str(time.time() + 60))  # less than is kept for saving
        with pytest.raises(TrainingStoppedError, match="time limit: saved after step 1"):
            train(complete[0], tmp_path / "run")
    started = _noted_steps(monkeypatch)
    train(complete[0], tmp_path / "run")
    assert started[0] == 1 and weights(tmp_path / "run") == weights(complete[1])


def test_too_few_patches_leave_the_output_for_the_setting_that_mends_it(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distinct patches cannot fill a codebook of 4096: --set codebook_size=\d+"):
        train(store, tmp_path / "run", settings=("codebook_size=4096", "kmeans_patches=4096"))
    train(store, tmp_path / "run")


def test_training_needs_no_deepspeed(complete: tuple[Path, Path], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['deepspeed'] = None\n"
        "from pathlib import Path; from opt_ds.dvae.training import train_dvae\n"
        f"train_dvae(Path({str(complete[0])!r}), Path({str(tmp_path / 'run')!r}), preset='dvae-tiny', device='cpu', steps=2)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "run" / "result.json").is_file(), done.stderr


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_checkpoint_never_holds_weights_that_are_not_finite(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    real_step = DVAETrainer.train_step

    def step(self: DVAETrainer):
        losses, settings = real_step(self)
        if self.state.step >= 4 and spoilt == "loss":
            losses = losses._replace(loss=losses.loss * float("nan"))
        elif self.state.step >= 4:
            self.gradient_norm = self.gradient_norm * float("inf")
        return losses, settings

    monkeypatch.setattr(DVAETrainer, "train_step", step)
    for _ in range(2):  # given again, too
        with pytest.raises(RunError, match=r"at step 6: train again with a lower --set learning_rate=.* another --output"):
            train(store, tmp_path / "run", checkpoint_every=3)
    assert [folder.name for folder in checkpoint.all_checkpoints(tmp_path / "run")] == ["step-00000003"]


def test_a_run_folder_written_before_it_recorded_launches_resumes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(store, tmp_path / "whole")
    _train_until(3, store, tmp_path / "cut", monkeypatch)
    file = tmp_path / "cut" / "run.json"
    config, others = {}, {}
    for key, value in _with_former_names(json.loads(file.read_text())["fixed_settings"]).items():
        (config if key.startswith("config.") else others)[key.removeprefix("config.")] = value
    assert "kmeans_pictures" in config, "a former name"
    file.write_text(json.dumps({"config": config, **others}, indent=1))
    with pytest.raises(UserError, match=r"holds another run \(seed was 1 there and is 2 now\)"):
        train(store, tmp_path / "cut", seed=2)
    train(store, tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    record = json.loads(file.read_text())
    assert record["kind"] == "dVAE" and [launch["threads"] for launch in record["launches"]] == [1]


def test_a_run_of_a_version_with_other_names_resumes_and_is_complete(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    _train_until(3, store, output, monkeypatch)
    record = json.loads((output / "run.json").read_text())
    former = {"identity": _with_former_names(record.pop("fixed_settings")), **record}
    (output / "run.json").write_text(json.dumps(former))
    with pytest.raises(UserError, match=r"holds another run \(config\.soft_fraction was 0\.5 there and is 0\.25 now\)"):
        train(store, output, settings=("soft_fraction=0.25",))
    started = _noted_steps(monkeypatch)
    result = train(store, output)
    assert started[0] == 3
    (output / "run.json").write_text(json.dumps(former))
    old = {"identity" if key == "fingerprint" else key: value for key, value in result.items()}
    (output / "result.json").write_text(json.dumps(old))
    assert train(store, output) == result, "nothing to train"


def _with_former_names(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as older versions recorded them."""
    former = {key: name for name, key in training._FORMER_KEYS.items()}
    return {former.get(key, key): value for key, value in settings.items()}


def test_a_run_folder_is_one_run_s_with_launches_and_metrics(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    monkeypatch.setattr(program, "LOG_EVERY", 2)
    _train_until(6, store, output, monkeypatch)
    with run_folder.lock(output), pytest.raises(UserError, match="another process is training there"):
        train(store, output)
    left = output / ".checkpoint.pt.0123456789abcdef.tmp"  # of a process that was killed while it saved
    left.touch()
    train(store, output)
    assert not left.exists()
    launches = json.loads((output / "run.json").read_text())["launches"]
    assert len(launches) == 2 and all(launch["versions"]["torch"] for launch in launches)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [2, 4, 6, 8, 10, 12], "each once, though one is redone"
    assert "dvae/psnr_db_train" in lines[-1]


def test_a_run_of_the_model_and_one_of_the_dvae_are_told_apart(complete: tuple[Path, Path], tmp_path: Path) -> None:
    from opt_ds.serving.export import export
    from opt_ds.serving.report import write_report
    from opt_ds.training.init_from import find_start

    store, dvae = complete
    (tmp_path / "run.json").write_text('{"identity": {}, "launches": []}')
    with pytest.raises(UserError, match="holds a run of the model, not of the dVAE: use another --output"):
        train(store, tmp_path)
    with pytest.raises(UserError, match="holds a run of the dVAE, not of the model: use another --output"):
        run_folder.read_record(dvae, run_folder.MODEL)
    for use in (
        lambda: checkpoint.load_model(dvae),
        lambda: write_report(dvae, tmp_path / "report.html"),
        lambda: export(dvae, tmp_path / "exported"),
        lambda: find_start(dvae, False, tmp_path / "new"),
    ):
        with pytest.raises(UserError, match=r"a run of the dVAE, .*result\.json .*: name a run of the model") as caught:
            use()
        assert str(dvae) in str(caught.value)


def _train_until(
    step: int, store: Path, output: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_every: int | None = None
) -> None:
    """Train until one step after the checkpoint of `step`, like a process that is killed then."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DVAETrainer, "train_step", _dying_after(step))
        train(store, output, checkpoint_every=checkpoint_every or step)


def _dying_after(step: int) -> Any:
    """A train_step that is killed one step after this one."""
    real_step = DVAETrainer.train_step

    def dying_step(self: DVAETrainer) -> Any:
        if self.state.step == step + 1:
            raise KeyboardInterrupt
        return real_step(self)

    return dying_step


def _noted_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that are taken from now on."""
    started: list[int] = []
    real_step = DVAETrainer.train_step
    monkeypatch.setattr(DVAETrainer, "train_step", lambda self: (started.append(self.state.step), real_step(self))[1])
    return started


def _save_in_former_format(self: DVAETrainer) -> None:
    """Write a checkpoint as versions before the shared format did."""
    state = {
        "step": self.state.step,
        "seconds": self.state.seconds,
        "cpu_seconds": self.state.cpu_seconds,
        "start_psnr_db": self.state.start_psnr_db,
        "dvae": self.dvae.state_dict(),
        "optimizer": self.optimizer.state_dict(),
    }
    with atomic_file(self.output / "checkpoint.pt") as temporary:
        torch.save(state, temporary)


def _weights_of_other_seed(store: Path, tmp_path: Path) -> bytes:
    train(store, tmp_path / "other", seed=2)
    return weights(tmp_path / "other")


def test_a_complete_run_only_writes_missing_codes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    result = train(store, tmp_path / "run")
    monkeypatch.setattr(DVAETrainer, "run", lambda self: pytest.fail("trained again"))
    assert train(store, tmp_path / "run", write_codes=True) == result
    assert any("is complete" in line for line in logged)
    fingerprint = FeatureStore(store).fingerprint
    train(store, tmp_path / "run", write_codes=True)  # the store's new fingerprint is no other run
    assert "already has this dVAE's codes" in logged[-1]
    assert FeatureStore(store).fingerprint == fingerprint
    (store / "dvae" / "config.json").unlink()
    train(store, tmp_path / "run", write_codes=True)
    DiscreteVAE.from_pretrained(store / "dvae")


def test_an_epoch_takes_each_image_once_and_batches_cross_epochs(store: Path, tmp_path: Path) -> None:
    rows = split_image_rows(FeatureStore(store), "train")
    hardware = program.Hardware("cpu", "fp32", 1)
    run = DVAERun(FeatureStore(store), rows, "train", DVAE_PRESETS["dvae-tiny"], 5, hardware, tmp_path, 1, {})
    drawn = np.concatenate([program.batch_index(run, step) for step in range(len(rows))])
    epochs = drawn[: 4 * len(rows)].reshape(4, len(rows))
    assert all((np.sort(epoch) == np.arange(len(rows))).all() for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_quality_is_the_formula_on_the_store_s_images(store: Path) -> None:
    torch.manual_seed(0)
    extractor, opened = CodeExtractor(DiscreteVAE(DVAE_PRESETS["dvae-tiny"])), FeatureStore(store)
    rows = np.arange(5)
    true = np.stack([opened.pixels(row) for row in rows]) / 255.0
    generated = extractor.reconstruct(np.stack([opened.pixels(row) for row in rows])).astype("float64")
    quality = reconstruction_quality(extractor, opened, rows)
    assert quality.psnr_db == pytest.approx(10 * np.log10(1 / np.mean((true - generated) ** 2)), abs=1e-6)
    own = [psnr_db(float(np.mean((t - p) ** 2))) for t, p in zip(true, generated, strict=True)]
    assert quality.mean_psnr_db == pytest.approx(np.mean(own), abs=1e-6)
    use = codebook_use(np.array([[0, 0, 3, 3]]), 8)
    assert use == {"codes_used": 2, "fraction_used": 0.25, "perplexity": pytest.approx(2.0)}


def test_bad_input_is_named(store: Path, tmp_path: Path) -> None:
    write_synthetic_store(tmp_path / "blind", 4, num_codes_vocab=None, pixels=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    train(store, tmp_path / "run")
    for message, arguments, options in [
        ("no feature store there", (tmp_path / "gone", tmp_path / "o"), {}),
        ("no pixels", (tmp_path / "blind", tmp_path / "o"), {}),
        ('no split "trian" .did you mean "train"', (store, tmp_path / "o"), {"train_split": "trian"}),
        ("another run .seed was 1 there and is 2 now", (store, tmp_path / "run"), {"seed": 2}),
        ("another run .config.steps was 12 there and is 13 now", (store, tmp_path / "run"), {"steps": 13}),
        ("not empty and no dVAE run", (store, tmp_path / "full"), {}),
        ('--precision "int3"', (store, tmp_path / "o"), {"precision": "int3"}),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            train(*arguments, **options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_started_by_path_mistakes_are_one_line_and_exit_2(tmp_path: Path) -> None:
    script = str(Path(__file__).parents[2] / "opt_ds" / "train_dvae.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, script, "--store", str(tmp_path / "gone"), "--output", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "no feature store there" in done.stderr
    shown = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0 and "--checkpoint-every" in shown.stdout
