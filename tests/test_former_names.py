"""Names of earlier versions work for one release: keys, options, arguments, and what older files hold."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from opt_ds.cli.former_options import FORMER_OPTIONS, with_current_options
from opt_ds.cli.program import run_program
from opt_ds.cli.stores import inspect_store
from opt_ds.config import config_from_dict, load_config, section
from opt_ds.config.dvae import DVAEConfig, load_dvae_config
from opt_ds.config.section import Section, load_section
from opt_ds.config.sources import merge
from opt_ds.errors import UserError
from opt_ds.features.extractors import Extractor, ExtractorChoice
from opt_ds.former_names import FIGURES, METRICS, current_keys, former_arguments
from opt_ds.ingest.report import ModalityNotes, build_report, refresh_report, report_table
from opt_ds.serving.limits import Limits
from opt_ds.serving.report import _grids, _metrics
from opt_ds.store.reader import FeatureStore
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.training import run_folder
from opt_ds.training.init_from import _disabled_tasks
from tests.cli.test_messages import leaf_commands
from tests.training.runs import tiny_config

START = {"checkpoint": "run/checkpoints/step-1", "weights_sha256": "0"}
#: Former key of a run's configuration, its name now, a value.
KEYS = (
    ("tasks.mix", "tasks.sampling_weights", {"mlm": 1.0, "modality": 0.5}),
    ("tasks.mix.mvm", "tasks.sampling_weights.mvm", 0.25),
    ("data.mix", "data.store_weights", [0.25, 0.75]),
    ("train.picture_grid", "train.image_grid", 3),
    ("tasks.matching.hard_negative_share", "tasks.matching.hard_negative_fraction", 0.5),
    ("tasks.matching.near_donor_share", "tasks.matching.hard_negative_fraction", 0.25),
    ("tasks.matching.near_donor_candidates", "tasks.matching.hard_negative_candidates", 8),
    ("tasks.modality.text_target_share", "tasks.modality.text_target_fraction", 0.25),
    ("init.learned", "init.trained_losses", ["mlm"]),
    ("finetune.learned", "finetune.trained_losses", ["mlm"]),
    ("finetune.negative_share", "finetune.negative_fraction", 0.25),
    ("finetune.donor_candidates", "finetune.negative_candidates", 4),
    ("finetune.same_group_donors", "finetune.same_group_negatives", True),
)  # fmt: skip
DVAE_KEYS = (
    ("soft_share", "soft_fraction", 0.25), ("anneal_share", "anneal_fraction", 0.25),
    ("kl_warmup_share", "kl_warmup_fraction", 0.5), ("straight_through_share", "straight_through_fraction", 0.5),
    ("kmeans_pictures", "kmeans_images", 99),
)  # fmt: skip
LIMITS = (("pictures", "images", 2), ("recording_s", "audio_s", 5.0))
NEEDED: dict[str, Any] = {
    "init": {"run": "run", **START},
    "finetune": {"task": "retrieval", "inputs": ["T+I"], **START},
    "data": {"stores": ["a", "b"]},
}


@pytest.fixture(autouse=True)
def _nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section, "_reported", set())


def tree_of(key: str, value: Any) -> dict[str, Any]:
    """A plain tree with one key, and what its section requires."""
    tree: dict[str, Any] = {}
    for part in reversed(key.split(".")):
        tree = {part: tree or value}
    outer = key.split(".")[0]
    return merge({outer: NEEDED[outer]}, tree) if outer in NEEDED else tree


def one_warning(lines: list[str], former: str, key: str) -> bool:
    return len(lines) == 1 and former in lines[0] and f"is now called {key}" in lines[0]


@pytest.mark.parametrize(("former", "key", "value"), KEYS)
def test_a_former_key_of_a_run(former: str, key: str, value: Any, tmp_path: Path, logged: list[str]) -> None:
    expected = config_from_dict(merge({"preset": "opt-emoji"}, tree_of(key, value)), where="test")
    assert expected != config_from_dict(merge({"preset": "opt-emoji"}, NEEDED), where="test")
    settings = [f"{name}={json.dumps(part)}" for name, part in NEEDED.items() if key.startswith(f"{name}.")]

    assert load_config("opt-base", [*settings, f"{former}={json.dumps(value)}"]) == load_config(
        "opt-base", [*settings, f"{key}={json.dumps(value)}"]
    )
    assert one_warning(logged, former, key), logged
    logged.clear()
    section._reported.clear()

    file = tmp_path / "mine.yaml"  # the preset has some of these keys by their names of now
    file.write_text(yaml.safe_dump({"preset": "opt-emoji", **tree_of(former, value)}))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"preset": "opt-emoji", **tree_of(key, value)}))
    assert load_config(str(file)) == load_config(str(other))
    assert one_warning(logged, former.removesuffix(".mvm"), key.removesuffix(".mvm")), logged
    logged.clear()

    old = config_from_dict(merge({"preset": "opt-emoji"}, tree_of(former, value)), where="an old checkpoint")
    assert old == expected and not logged, "a file that an older version wrote is read without a warning"
    with pytest.raises(UserError, match=f"{former.split('.')[-1]} is the former name of"):
        load_config("opt-tiny", [*settings, f"{former}={json.dumps(value)}", f"{key}={json.dumps(value)}"])


def test_a_former_key_in_a_list_of_sections(logged: list[str]) -> None:
    phase = "[{from_fraction: 0.5, %s: {mlm: 1}}]"
    config = load_config("opt-emoji", [f"tasks.curriculum={phase % 'mix'}"])
    assert one_warning(logged, "mix", "tasks.curriculum.sampling_weights")
    assert config == load_config("opt-emoji", [f"tasks.curriculum={phase % 'sampling_weights'}"])


@pytest.mark.parametrize(("former", "key", "value"), DVAE_KEYS)
def test_a_former_key_of_a_dvae(former: str, key: str, value: Any, tmp_path: Path, logged: list[str]) -> None:
    expected = load_dvae_config("dvae-tiny", settings=[f"{key}={value}"])
    assert expected != load_dvae_config("dvae-tiny")
    assert load_dvae_config("dvae-tiny", settings=[f"{former}={value}"]) == expected
    assert one_warning(logged, former, key)
    logged.clear()
    section._reported.clear()
    file = tmp_path / "mine.yaml"
    file.write_text(f"preset: dvae-tiny\n{former}: {value}\n")
    assert load_dvae_config(None, file) == expected
    assert one_warning(logged, former, key)
    logged.clear()
    saved = expected.model_dump()
    saved[former] = saved.pop(key)
    assert DVAEConfig.model_validate(saved) == expected and not logged


@pytest.mark.parametrize(("former", "key", "value"), LIMITS)
def test_a_former_limit_of_the_server(former: str, key: str, value: float, tmp_path: Path, logged: list[str]) -> None:
    file = tmp_path / "limits.yaml"
    file.write_text(f"{former}: {value}\n")
    assert load_section(Limits, str(file)) == Limits(**{key: value}) == load_section(Limits, None, [f"{key}={value}"])
    assert one_warning(logged, former, key)


def test_a_former_argument_of_a_section_in_python(logged: list[str]) -> None:
    assert Limits(pictures=3) == Limits(images=3)
    assert one_warning(logged, "pictures", "images")


def with_former_names(kind: type[Section], tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of a configuration as an older version wrote it."""
    former = {key: name for name, key in kind.renamed.items()}
    old = {}
    for key, value in tree.items():
        field = kind.model_fields.get(key)
        child = section.section_of(field.annotation) if field else None
        if child is not None and isinstance(value, dict):
            value = with_former_names(child.class_for(value), value)
        elif child is not None and isinstance(value, list):
            value = [with_former_names(child, item) for item in value]
        old[former.get(key, key)] = value
    return old


def test_a_run_of_an_older_version_is_the_same_run(complete: FeatureStore, tmp_path: Path, logged: list[str]) -> None:
    phases = "tasks.curriculum=[{from_fraction: 0.5, sampling_weights: {mlm: 1}}]"
    config, stores = tiny_config(complete.path, phases, "tasks.matching.hard_negative_fraction=0.5"), [complete]
    now = run_folder.fixed_settings(config, stores)
    tree = with_former_names(type(config), config.model_dump(mode="json"))
    assert {"mix", "curriculum"} <= tree["tasks"].keys() and "mix" in tree["tasks"]["curriculum"][0]
    old = run_folder.flatten(tree)
    recorded = {key: value for key, value in old.items() if key in now or key.startswith("tasks.") or key == "data.mix"}
    recorded = {key: value for key, value in recorded.items() if not key.endswith(".plugins")}
    recorded["data.stores"] = now["data.stores"]
    assert recorded.keys() != now.keys()
    (tmp_path / "run.json").write_text(json.dumps({"identity": recorded, "launches": [], "stores": []}))
    run_folder.check_same_run(tmp_path, config, stores)
    other = tiny_config(complete.path, phases, "tasks.matching.hard_negative_fraction=0.25")
    with pytest.raises(UserError, match=r"tasks\.matching\.hard_negative_fraction was 0\.5 there and is 0\.25 now"):
        run_folder.check_same_run(tmp_path, other, stores)
    assert not logged


def test_metrics_of_an_older_version_are_read(tmp_path: Path) -> None:
    old = {"kind": "train", "step": 1, "speed/fill": 0.5, "speed/rank_balance": 1.5, "speed/data_wait_share": 0.25}
    new = {"kind": "train", "step": 2, **{key: 0.5 for key in METRICS.values()}}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (old, new)))
    first, second = _metrics(tmp_path)
    assert first == {
        "kind": "train", "step": 1, "speed/packing_efficiency": 0.5, "speed/load_imbalance": 1.5,
        "speed/data_wait_fraction": 0.25,
    }  # fmt: skip
    assert second == new


def test_a_new_key_wins_over_its_former_name() -> None:
    names = {"old": "new"}
    assert current_keys({"new": 1, "old": 2, "in": [{"old": {"old": 3}}]}, names) == {"new": 1, "in": [{"new": {"new": 3}}]}
    assert current_keys({"old": 2, "new": 1}, names) == {"new": 1}


def test_notes_and_a_report_of_an_older_preparation(complete: FeatureStore, tmp_path: Path) -> None:
    note = {"skipped": [], "truncated": {"text": ["a"], "audio": []}, "digests": {}}
    old = {"skipped": [], "cut": note["truncated"], "digests": {}}
    lengths = {"text": np.array([3, 4])}
    report = build_report(2, [], [note], lengths)
    assert build_report(2, [], [old], lengths) == report and report["truncated"]["text"] == ["a"]
    assert any("text truncated at 4" in line for line in report_table(report, {"max_tokens": 4, "max_frames": None}))

    store = Path(shutil.copytree(complete.path, tmp_path / "store"))
    dropped = {"audio": [{"id": "b", "reason": "broken"}]}
    report["cut"], report["lost"] = report.pop("truncated"), dropped
    (store / "report.json").write_text(json.dumps(report))
    refresh_report(store, complete.description, ModalityNotes("text", truncated=["c"]))
    found = json.loads((store / "report.json").read_text())
    assert found["truncated"] == {"text": ["c"], "audio": []} and found["dropped"] == {**dropped, "text": []}
    assert not found.keys() & {"cut", "lost"}


@pytest.mark.parametrize("key", ["tasks_disabled", "tasks_off"])
def test_the_disabled_tasks_of_a_launch(key: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"launches": [{key: {"mvm": "no image", "mam": "no audio"}}, {key: {"mvm": "no image"}}]}))
    assert _disabled_tasks(file) == {"mvm"}


@pytest.mark.parametrize("command", FORMER_OPTIONS)
def test_the_former_options_of_a_command(command: str, logged: list[str]) -> None:
    names = FORMER_OPTIONS[command]
    known = {option for path, found in leaf_commands() if path[-1] == command for each in found.params for option in each.opts}
    assert set(names.values()) <= known and not known & names.keys()
    for former, option in names.items():
        given = [former, "x", f"{former}=y", "--sample", "--", former]
        assert with_current_options(command, given) == [option, "x", f"{option}=y", "--sample", "--", former]
        assert f"the option {former} is now called {option}" in logged[-1]
        with pytest.raises(UserError, match=f"{former} is the former name of {option}: give one of them"):
            with_current_options(command, [former, "x", option, "y"])
        logged.clear()
        assert with_current_options("another", given) == given and not logged


def test_a_former_option_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_synthetic_store(tmp_path / "store", 5)
    assert run_program(inspect_store, [str(tmp_path / "store"), "--pictures", str(tmp_path / "look")], "inspect") == 0
    assert (tmp_path / "look" / "lengths.png").is_file()
    assert capsys.readouterr().err.count("the option --pictures is now called --images") == 1


def test_figures_of_an_older_evaluation_are_shown(tmp_path: Path) -> None:
    old = {
        "split": "valid", "pictures": 3, "pictures_without_words": 0, "another_picture": {"bleu_4": 1.0},
        "T": {"painted": {"clip_score": {"painted": 20.0}}, "bits_per_code": 1.0}, "picture_grid": "picture_grid-valid.png",
        "text_to_image": {"matching": {"encoder_share": 0.5, "decoder_share": 0.25}},
    }  # fmt: skip
    found = current_keys(old, FIGURES)
    assert found["images"] == 3 and found["another_image"] == {"bleu_4": 1.0} and found["images_without_words"] == 0
    assert found["T"] == {"generated": {"clip_score": {"generated": 20.0}}, "bits_per_code": 1.0}
    assert found["text_to_image"]["matching"] == {"encoder_fraction": 0.5, "decoder_fraction": 0.25}
    (tmp_path / "picture_grid-valid.png").write_bytes(b"image")
    grids = _grids(tmp_path, {"summary": {"splits": {"valid": found}}, "image_generation": found})
    assert [grid["title"] for grid in grids] == ["Held-out split valid", "opt-ds evaluate image-generation"]


def test_former_arguments_warn_and_work() -> None:
    @former_arguments(share="partition")
    def function(first: int, *, partition: int | None = None) -> tuple[int, int | None]:
        return first, partition

    assert function(1) == (1, None) and function(1, partition=2) == (1, 2)
    with pytest.warns(DeprecationWarning, match="the argument share is now called partition"):
        assert function(1, share=2) == (1, 2)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="share is the former name of partition: give one of them"):
        function(1, share=2, partition=2)  # type: ignore[call-arg]


def test_an_extractor_may_define_its_fingerprint_by_the_former_name() -> None:
    with pytest.warns(DeprecationWarning, match="Old.identity is now called fingerprint"):

        class Old(Extractor):
            name, kind = "old", "image"

            def __init__(self, options: Any, device: str) -> None: ...

            def identity(self) -> dict[str, Any]:
                return {"name": "old"}

            def extract(self, inputs: Sequence[Any]) -> list[Any]:
                return list(inputs)

    choice = ExtractorChoice(Old, "old", Section())
    assert choice.complete_fingerprint(choice.build("cpu")) == {"name": "old"}
