"""Precision, and DeepSpeed's settings: derived from the run config, and a JSON that contradicts it is refused."""

import json
from pathlib import Path

import pytest

from opt_ds.config import load_config
from opt_ds.errors import UserError
from opt_ds.training.deepspeed_config import Hardware, choose_precision, deepspeed_settings

CPU = Hardware("cpu", "a processor")
V100 = Hardware("cuda", "Tesla V100", (7, 0), ("sm_70", "sm_80"))
A100 = Hardware("cuda", "A100", (8, 0), ("sm_70", "sm_80"))
FOLDER = Path(__file__).parents[2] / "ds_configs"
BESIDE = {
    "zero1_fp16": ([], V100, "fp16"),
    "zero2_fp16": (["zero.stage=2"], V100, "fp16"),
    "zero2_offload_fp16": (["zero.stage=2", "zero.offload_optimizer=true"], V100, "fp16"),
    "zero3_fp16": (["zero.stage=3"], V100, "fp16"),
    "zero1_bf16": ([], A100, "bf16"),
    "cpu": ([], CPU, "fp32"),
}


def test_precision_follows_the_hardware() -> None:
    config = load_config("opt-base")
    assert [choose_precision(config, hardware) for hardware in (CPU, V100, A100)] == ["fp32", "fp16", "bf16"]
    assert choose_precision(load_config("opt-base", ["precision=bf16"]), CPU) == "bf16"


@pytest.mark.parametrize(
    ("settings", "hardware", "expected"),
    [
        (["precision=fp16"], CPU, "does not run on the CPU"),
        (["precision=bf16"], V100, "bf16 is more than Tesla V100 has, older than Ampere: use --set precision=fp16"),
        ([f"deepspeed_config={FOLDER / 'zero1_bf16.json'}"], V100, "precision=fp16, and in "),
        (["zero.stage=0"], V100, "use --set zero.stage=1"),
        (["zero.stage=0"], A100, "would not accumulate gradients in fp32"),
        (
            [],
            Hardware("cuda", "Tesla V100", (7, 0), ("sm_75", "sm_80", "compute_120")),
            "no kernels for Tesla V100 (sm_70",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings: list[str], hardware: Hardware, expected: str) -> None:
    with pytest.raises(UserError) as error:
        choose_precision(load_config("opt-base", settings), hardware)
    assert expected in str(error.value)


def test_offload_without_a_partitioned_optimizer_is_refused() -> None:
    config = load_config("opt-base", ["zero.stage=0", "zero.offload_optimizer=true", "precision=fp32"])
    with pytest.raises(UserError, match=r"zero\.offload_optimizer needs .* use --set zero\.stage=1"):
        deepspeed_settings(config, choose_precision(config, CPU))


def test_settings_own_batch_clipping_and_accumulation() -> None:
    for clip in (1.0, 0.0):
        settings = deepspeed_settings(load_config("opt-base", [f"optimizer.clip_norm={clip}"]), "fp16")
        assert settings["gradient_clipping"] == clip  # DeepSpeed's default is 1.0, so "disabled" must be written too
        stage_0 = deepspeed_settings(load_config("opt-base", [f"optimizer.clip_norm={clip}", "zero.stage=0"]), "fp32")
        assert stage_0["gradient_clipping"] == 0.0  # the step clips there
        assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
        assert settings["train_micro_batch_size_per_gpu"] == settings["gradient_accumulation_steps"] == 1


def test_the_first_loss_scale_grows_with_the_number_of_micro_batches() -> None:
    powers = [deepspeed_settings(load_config("opt-base"), "fp16", n)["fp16"]["initial_scale_power"] for n in (1, 2, 80)]
    assert powers == [16, 17, 23]


@pytest.mark.parametrize("name", BESIDE)
def test_the_settings_that_we_ship_agree_with_what_their_readme_says(name: str) -> None:
    beside, hardware, precision = BESIDE[name]
    config = load_config("opt-base", [*beside, f"deepspeed_config={FOLDER / name}.json"])
    assert choose_precision(config, hardware) == precision
    settings = deepspeed_settings(config, precision)
    shipped = json.loads((FOLDER / f"{name}.json").read_text())
    for key, value in shipped["zero_optimization"].items():
        assert settings["zero_optimization"][key] == value
    assert settings["fp16"]["enabled"] == (precision == "fp16")
    assert f"`{name}.json`" in (FOLDER / "README.md").read_text()
    assert {path.stem for path in FOLDER.glob("*.json")} == set(BESIDE)


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"zero_optimization": {"stage": 2}}, ["zero_optimization.stage 2", "zero.stage 1"]),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer", "zero.offload_optimizer"],
        ),
        ({"bf16": {"enabled": True}}, ["bf16.enabled true", "precision fp32"]),
        ({"train_batch_size": 64}, ["train_batch_size 64", "batch.size"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping 0.5", "optimizer.clip_norm is 1.0"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "of the run config"]),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, ["grad_accum_dtype", "fp32"]),
        ({"zero_optimization": {"reduce_bucket_sizee": 5}}, ["zero_optimization.reduce_bucket_sizee", '"reduce_bucket_size"?']),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, ['zero_optimization.reduce_bucket_size "many"', "change it"]),
        ({"zero_optimization": {"compute_grad_norm": False}}, ["zero_optimization.compute_grad_norm false", "remove it"]),
        ({"zero_optimization": 1}, ["zero_optimization 1", "expected an object"]),
        ({"fp16": True}, ["fp16 true", "expected an object"]),
        ({"communication_data_type": "fp8"}, ['communication_data_type "fp8"', "choose fp32"]),
        ({"zero_optimisation": {}}, ["zero_optimisation", 'did you mean "zero_optimization"']),
    ],
)
def test_a_json_that_contradicts_the_run_config_is_refused_naming_both(
    tree: dict, expected: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(tree))
    config = load_config("opt-base", [f"deepspeed_config={file}", "precision=fp32"])
    with pytest.raises(UserError) as error:
        deepspeed_settings(config, "fp32")
    assert str(file) in str(error.value)
    assert all(part in str(error.value) for part in expected)
    assert "\n" not in str(error.value)


def test_auto_in_a_json_means_the_run_configs_value(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": "auto", "gradient_clipping": "auto", "zero_optimization": {"stage": "auto"}}')
    config = load_config("opt-base", [f"deepspeed_config={file}", "zero.stage=2"])
    assert deepspeed_settings(config, "fp32")["zero_optimization"]["stage"] == 2
