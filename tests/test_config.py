"""The configuration: presets, files, settings, and one clear line for each mistake."""

import itertools
import pickle
from pathlib import Path

import pytest
import yaml

from opt_ds.config import config_from_dict, dump_config, load_config
from opt_ds.config.sources import preset_names
from opt_ds.errors import UserError
from tests.tiny import LOSSES


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_its_dump(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.preset == name
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(str(file)) == config
    assert config_from_dict(yaml.safe_load(dump_config(config)), where="dump") == config
    assert pickle.loads(pickle.dumps(config)) == config, "ranks send each other configurations"


def test_the_presets_of_the_paper_are_the_paper() -> None:
    config = load_config("opt-base")
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_heads, model.ffn_size) == (12, 768, 12, 3072)
    assert (config.batch.size, config.schedule.total_steps, config.optimizer.lr) == (10240, 100_000, 5e-5)
    assert {"opt-base", "opt-large", "opt-small", "opt-emoji", "opt-tiny"} <= set(preset_names())


def test_a_file_starts_from_its_preset_and_settings_come_last(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: opt-tiny\nmodel: {hidden_size: 128}\noptimizer: {lr: 1e-4}\n")
    config = load_config(str(file), ["model.num_heads=4", "optimizer.lr=2e-4"])
    assert (config.model.hidden_size, config.model.num_heads, config.model.num_layers) == (128, 4, 2)
    assert config.optimizer.lr == 2e-4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["batch.siez=3"], 'unknown key "batch.siez" (did you mean "size"?)'),
        (["optimiser.lr=1"], 'unknown key "optimiser" (did you mean "optimizer"?)'),
        (["batch.size=none"], "batch.size"),
        (["seed=2024-13-45"], "--set seed=2024-13-45: not readable as YAML"),
        (["batch.size=0"], "batch.size: must be at least 1 (found 0)"),
        (["precision=bf61"], "precision: choose 'auto', 'fp32', 'bf16' or 'fp16' (did you mean \"bf16\"?) (found 'bf61')"),
        (["optimizer.betas=[0.9]"], "optimizer.betas.1: is missing"),
        (["optimizer.betas=[0.9, 0.9, 0.9]"], "optimizer.betas: must hold at most 2 items"),
        (["finetune.taks=vqa"], 'unknown key "finetune.taks" (did you mean "task"?)'),
        (
            ["tasks.curriculum=[{sampling_wieghts: {mlm: 1}}]"],
            'unknown key "tasks.curriculum.0.sampling_wieghts" (did you mean "sampling_weights"?)',
        ),
        (["batch"], "key.path=value"),
        (["batch.size.x=1"], '"batch.size" is a value, not a section'),
        (["model.num_heads=5"], "not a multiple of num_heads 5"),
        (["tasks.sampling_weights={mlmm: 1}"], '"mlmm" (did you mean "mlm"?)'),
        ([f"tasks.{loss}.weight=0" for loss in ("mlm", "mvm", "mam", "modality", "matching")], "no task is enabled"),
        (["precision=fp16", "zero.stage=0"], "use zero.stage=1"),
        (["batch.max_tokens=100"], "batch.max_tokens 100 cannot hold the longest sample"),
        (["schedule.warmup_steps=1000"], "is not below schedule.total_steps"),
        (["data.store_weights=[1, 2]"], "2 weights for 0 stores"),
        (["tasks.sampling_weights.mlm=.nan"], "tasks.sampling_weights.mlm: must be a finite number (found "),
        (["data.store_weights=[.nan, 1]"], "data.store_weights.0: must be a finite number (found "),
        (["optimizer.lr=.inf"], "optimizer.lr: must be a finite number (found "),
        (["optimizer.betas=[0.9, 1]"], "optimizer.betas.1: must be less than 1 (found 1"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(settings: list[str], expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("opt-tiny", settings)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_preset_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='did you mean "opt-tiny"'):
        load_config("opt-tniy")
    file = tmp_path / "mine.yaml"
    file.write_text("preset: opt-bas\n")
    with pytest.raises(UserError, match='did you mean "opt-base"'):
        load_config(str(file))
    file.write_text("a: [")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_config(str(file))


def test_a_draw_without_a_weighted_loss_gives_its_share_to_the_others() -> None:
    tasks = load_config("opt-tiny", ["tasks.mvfr.weight=0", "tasks.mrc.weight=0", "tasks.matching.weight=0"]).tasks
    weights = tasks.sampling_weights_at(0.0)
    assert weights["mvm"] == weights["matching"] == 0
    assert weights["mlm"] == pytest.approx(1 / 3)
    assert set(tasks.active_losses) == set(LOSSES) - {"mvfr", "mrc", "matching"}


def test_the_learning_rate_rises_then_falls_to_zero_whatever_max_steps_is() -> None:
    schedule = load_config("opt-tiny", ["schedule.total_steps=100", "schedule.warmup_steps=10"]).schedule
    short = load_config(
        "opt-tiny", ["schedule.total_steps=100", "schedule.warmup_steps=10", "train.max_steps=20"]
    ).schedule
    factors = [schedule.lr_factor(step) for step in range(101)]
    assert factors == [short.lr_factor(step) for step in range(101)]
    assert 0 < factors[0] < factors[5] < factors[10] == 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[100] == 0
