"""`--init-from`: a new run begins with another run's weights, on its own schedule, and resumes from its own checkpoints."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_ds.cli.program import run_program
from opt_ds.config import Config, InitConfig
from opt_ds.pretrain import _resolve, _start, pretrain
from opt_ds.training import checkpoint
from opt_ds.training.distributed import ProcessGroup
from opt_ds.training.init_from import find_start
from tests.training.runs import FITTED, free_port, hashes, make_store, rank_environment, tensors, tiny_config, train

STILL = ("optimizer.lr=1e-30", "optimizer.weight_decay=0")  # a step that changes no weight by more than rounding
NEW = ("batch.size=8", "schedule.warmup_steps=0", "schedule.total_steps=6", "train.image_grid=0", "train.log_every=1")


@pytest.fixture(scope="module")
def source(store: Path, tmp_path_factory: pytest.TempPathFactory, group: Any) -> Path:
    """A finished run that was never trained to write image codes."""
    output = tmp_path_factory.mktemp("source") / "run"
    train(tiny_config(store, "schedule.total_steps=4", "tasks.dir.weight=0"), output, group, "fp32")
    return output


def resolved(source: Path, output: Path, *settings: str, moments: bool = False, stores: list[str] | None = None) -> Config:
    """The configuration that `pretrain.py --init-from` settles on."""
    start = _start(source, moments, output)
    return _resolve(None, stores or [], output, [*NEW, *settings], start)[0]


def command(source: Path, output: Path, *settings: str, options: tuple[str, ...] = ()) -> list[str]:
    given = [part for setting in (*NEW, *settings) for part in ("--set", setting)]
    return ["--init-from", str(source), "--output", str(output), *options, *given]


def refusal(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a start that is refused with exit code 2."""
    capsys.readouterr()
    assert run_program(pretrain, given, "pretrain.py") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("stage", "precision", "moments"), [(0, "fp32", True), (2, "bf16", True), (3, "fp32", True), (1, "bf16", False)]
)
def test_weights_and_asked_for_moments_are_the_sources_at_step_0(
    stage: int, precision: str, moments: bool, source: Path, tmp_path: Path, group: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opt_ds.training import optimizer_state
    from opt_ds.training.step import Stepper

    begun: dict[str, dict[str, torch.Tensor]] = {}

    def look_and_take(self: Stepper, *given: Any) -> Any:
        if not begun:
            begun.update({name: {k: v.float().clone() for k, v in s.items()} for name, s in optimizer_state.gather(self.engine)})
        return taken(self, *given)

    taken = Stepper.take
    monkeypatch.setattr(Stepper, "take", look_and_take)
    config = resolved(source, tmp_path / "new", f"zero.stage={stage}", "train.max_steps=1", moments=moments)
    assert train(config, tmp_path / "new", group, precision) == 0
    weights, kept = tensors(source, 4, "model"), tensors(source, 4, "moments")
    for name, state in begun.items():
        fresh = name.startswith("image_decoder.")  # its weights in the source were never trained
        assert torch.equal(state["weight"], weights[name]) != fresh or "bias" in name or "norm" in name, name
        for key in ("exp_avg", "exp_avg_sq"):
            there = kept[f"{name}.{key}"] if moments and not fresh else torch.zeros_like(weights[name])
            assert torch.equal(state[key], there), f"{name}.{key}"
    state = checkpoint.read_state(tmp_path / "new" / "checkpoints" / "step-00000001")
    assert state["adam_steps"] == (5 if moments else 1) and state["step"] == 1


def test_the_schedule_is_new_and_what_carries_over_is_said_and_recorded(
    source: Path, tmp_path: Path, group: Any, logged: list[str]
) -> None:
    config = resolved(source, tmp_path / "new", "optimizer.lr=0.01", moments=True)
    train(config, tmp_path / "new", group, "fp32")
    said = "\n".join(logged)
    assert f"--init-from {source}: weights of step-00000004 (step 4 of 4)" in said
    assert "freshly initialised: image_decoder (" in said and "Adam's moments of these after 4 updates" in said
    assert "not carried over: step, schedule" in said
    lines = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["optimizer/lr"] for line in lines if "optimizer/lr" in line]
    assert rates == pytest.approx([0.01 * (6 - step) / 6 for step in range(6)])
    assert {line["optimizer/skipped_steps"] for line in lines if "optimizer/lr" in line} == {0.0}
    record = json.loads((tmp_path / "new" / "run.json").read_text())
    assert record["init_from"]["checkpoint"].endswith("checkpoints/step-00000004")
    launch = record["launches"][0]["init_from"]
    assert launch["moments"] and launch["parameters_taken"] > 50
    assert launch["fresh"] and all(name.startswith("image_decoder.") for name in launch["fresh"])
    assert checkpoint.load_model(tmp_path / "new")[1].trained_losses.count("dir") == 1, "the new run trains it"


def test_resume_is_bit_exact_and_does_not_need_the_source(source: Path, tmp_path: Path, group: Any) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    for output, stops in ((tmp_path / "straight", (4,)), (tmp_path / "cut", (2, 4))):
        for stop in stops:
            train(resolved(copy, output, f"train.max_steps={stop}", moments=True), output, group, "fp32")
            if output.name == "cut":
                shutil.rmtree(copy, ignore_errors=True)
    assert hashes(tmp_path / "cut", 4) == hashes(tmp_path / "straight", 4)
    launches = json.loads((tmp_path / "cut" / "run.json").read_text())["launches"]
    assert ["init_from" in launch for launch in launches] == [True, False]


@pytest.mark.faults  # starting two processes takes too long for the quick tests
def test_a_new_run_of_two_ranks_takes_another_store_and_other_tasks(source: Path, tmp_path: Path) -> None:
    other = make_store(tmp_path / "other", 40, num_codes_vocab=16)  # another codebook: no image decoder was trained
    settings = (*STILL, "zero.stage=2", "tasks.sampling_weights={modality: 1, mlm: 1}", "train.max_steps=1", "model.dropout=0.2")
    given = command(source, tmp_path / "new", *settings, options=("--store", str(other)))
    script, port = Path(__file__).parents[2] / "opt_ds" / "pretrain.py", free_port()
    ranks = [
        subprocess.Popen([sys.executable, str(script), *given], env=rank_environment(rank, 2, port), stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    outcomes = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outcomes
    found, before = tensors(tmp_path / "new", 1, "model"), tensors(source, 4, "model")
    assert len(found["image_decoder.code.weight"]) == 17
    same = [name for name in before if not name.startswith("image_decoder.")]
    assert all(torch.allclose(found[name], before[name], rtol=0, atol=1e-20) for name in same)


def test_a_task_that_had_no_samples_starts_fresh(tmp_path: Path, group: Any) -> None:
    """Its head exists in every checkpoint, yet nothing trained it."""
    without = make_store(tmp_path / "without", 40, num_codes_vocab=None)
    train(tiny_config(without, "train.max_steps=1", "schedule.total_steps=4"), tmp_path / "source", group, "fp32")
    assert "dir" not in find_start(tmp_path / "source", False, tmp_path / "new").init.trained_losses
    codes = make_store(tmp_path / "codes", 40)
    config = resolved(tmp_path / "source", tmp_path / "new", stores=[str(codes)])
    assert config.model.image_codebook_size == 64


def _damage(run: Path, name: str) -> None:
    file = run / "checkpoints" / "step-00000004" / name
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")


SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (shutil.rmtree, "no such folder"),
    "without checkpoints": (lambda run: shutil.rmtree(run / "checkpoints"), "neither a checkpoint nor a run's output directory"),
    "damaged weights": (lambda run: _damage(run, "model.safetensors"), "model.safetensors is damaged"),
    "damaged moments": (lambda run: _damage(run, "moments.safetensors"), "moments.safetensors is damaged"),
    "damaged state": (lambda run: _damage(run, "state.json"), "state.json is damaged"),
    "an exported model": (
        lambda run: (run / "config.json").write_text('{"model_type": "opt_ds"}'), "an exported model, not a run",
    ),
    "a file": (lambda run: (shutil.rmtree(run), run.write_text("no run")), "neither a checkpoint nor a run"),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_that_is_no_whole_run_is_refused(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, expected = SOURCES[name]
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    damage(broken)
    error = refusal(command(broken, tmp_path / "new", options=("--init-moments",)), capsys)
    assert expected in error and str(broken) in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("model.hidden_size=64", "model.hidden_size is 32 there and 64 here"),
        ("model.norm=pre", "model.norm is post there and pre here"),
        ("model.num_heads=1", "model.num_heads is"),
        ("model.vocab_size=201", "model.vocab_size is 200 there and 201 here"),
        ("model.max_text_tokens=20", "model.max_text_tokens is"),
        ("model.text_decoder_layers=5", "model.text_decoder_layers is"),
        ("model.bert=/somewhere", "--init-from and model.bert both give the weights"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused_by_name(
    setting: str, expected: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refusal(command(source, tmp_path / "new", setting), capsys)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 201}, "vocab_size is 201 in the store and 200 in the model"),
        ({"audio_feature_dim": 24}, "audio_feature_dim is 24 in the store and 20 in the model"),
    ],
)
def test_a_store_of_other_sizes_is_refused_by_name(
    changes: dict[str, int], expected: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_store(tmp_path / "other", 40, **changes)
    error = refusal(command(source, tmp_path / "new", options=("--store", str(other))), capsys)
    assert expected in error and str(other) in error


def test_a_store_of_another_vocabulary_of_the_same_size_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source's record stands for the other vocabulary: its tokenizer and hashes are written again with another word."""
    from opt_ds.store.files import folder_sha256
    from opt_ds.store.processor_files import load_processor_description
    from opt_ds.store.seal import seal_folder

    copy = Path(shutil.copytree(source, tmp_path / "source"))
    processor = copy / "processor"
    vocabulary = next(file for file in (processor / "tokenizer").iterdir() if '"w7"' in file.read_text())
    vocabulary.write_text(vocabulary.read_text().replace('"w7"', '"other"'))
    described = json.loads((processor / "processor.json").read_text())
    described["tokenizer"]["sha256"] = folder_sha256(processor / "tokenizer")
    (processor / "processor.json").write_text(json.dumps(described))
    seal_folder(processor)
    load_processor_description(processor)
    assert "its vocabulary is not the model's" in refusal(command(copy, tmp_path / "new"), capsys)


def test_a_start_that_does_not_agree_with_its_folder_is_refused(
    source: Path, store: Path, tmp_path: Path, group: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "this is the run in --output itself" in refusal(command(source, source), capsys)
    within = source / "checkpoints" / "step-00000004"
    assert "this is the run in --output itself" in refusal(command(within, source), capsys)
    assert "name its folder with --output" in refusal(["--init-from", str(source)], capsys)
    assert "add --init-from RUN" in refusal(["--init-moments", "--output", str(tmp_path / "x")], capsys)

    new, other = tmp_path / "new", tmp_path / "other"
    train(tiny_config(store, "schedule.total_steps=3", "train.max_steps=1"), other, group)
    assert "began without --init-from" in refusal(command(source, other), capsys)
    train(resolved(source, new, "train.max_steps=1"), new, group)
    assert f"began with --init-from {source}, not {other}" in refusal(command(other, new), capsys)
    assert "began without --init-moments: omit it" in refusal(command(source, new, options=("--init-moments",)), capsys)
    plain = [part for setting in FITTED for part in ("--set", setting)]
    forgotten = ["--config", "opt-tiny", "--store", str(store), "--output", str(new), *plain]
    assert f"began with --init-from {source}: add this to resume" in refusal(forgotten, capsys)
    assert run_program(pretrain, command(within, new, "train.max_steps=1"), "pretrain.py") == 0  # the same weights


def test_weights_that_changed_under_the_recorded_name_are_not_taken(source: Path, tmp_path: Path) -> None:
    import torch.nn

    from opt_ds.errors import UserError
    from opt_ds.training.init_from import load_weights

    folder = source / "checkpoints" / "step-00000004"
    with pytest.raises(UserError, match="has other weights than when this run began"):
        load_weights(torch.nn.Linear(1, 1), InitConfig(run=str(source), checkpoint=str(folder), weights_sha256="0" * 64))


def test_a_fine_tuned_run_gives_all_but_its_label_head(learnable: Path, tmp_path: Path, group: Any) -> None:
    from opt_ds.training.finetuning import finetune_config

    train(tiny_config(learnable, "train.max_steps=1"), tmp_path / "first", group)
    tuned = finetune_config("captioning", tmp_path / "first", [str(learnable)], settings=["train.max_steps=1", "batch.size=4"])
    train(tuned, tmp_path / "tuned", group)
    config = resolved(tmp_path / "tuned", tmp_path / "new", "train.max_steps=1")
    assert config.finetune is None and set(config.init.trained_losses) == set(tuned.trained_losses)  # type: ignore[union-attr]
    train(config, tmp_path / "new", group)
    again = finetune_config("captioning", tmp_path / "new", [str(learnable)])
    assert again.init is None and set(again.trained_losses) == set(tuned.trained_losses)


def test_more_steps_than_the_schedule_has_are_said_to_be_of_learning_rate_0(
    source: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProcessGroup, "close", lambda self: None)  # other tests of this process still need the group
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    settings = [*FITTED, "schedule.total_steps=4", "tasks.dir.weight=0"]

    def start(*more: str) -> str:
        given = [part for setting in (*settings, *more) for part in ("--set", setting)]
        capsys.readouterr()
        assert run_program(pretrain, ["--config", "opt-tiny", "--store", str(store), "--output", str(copy), *given], "p") == 0
        return capsys.readouterr().out

    assert f"its learning rate has reached 0; a new run (pretrain.py --init-from {copy}" in start()
    said = start("train.max_steps=5")
    assert "train.max_steps 5 is beyond schedule.total_steps 4: the learning rate is 0 from there on" in said
    assert f"--init-from {copy}" in said
