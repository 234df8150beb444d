"""Test an exported folder: Hugging Face's classes load it with bit-equal results; tied weights stay one tensor."""

import json
import re
from pathlib import Path

import pytest
import torch

from opt_ds.errors import UserError
from opt_ds.evaluation.image_generation import DEFAULT_SAMPLING
from opt_ds.serving.export import export
from opt_ds.serving.session import Session
from opt_ds.training.checkpoint import is_exported, load_model
from tests.serving.conftest import start_run


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exported") / "model")


def test_every_weight_comes_back_bit_for_bit(run: Path, exported: Path) -> None:
    from transformers import AutoModel

    from opt_ds.serving.pretrained import OPTModel

    expected = load_model(run)[0].state_dict()
    for loaded in (OPTModel.from_pretrained(exported), AutoModel.from_pretrained(exported)):
        assert type(loaded) is OPTModel
        found = loaded.opt.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        word = loaded.opt.embeddings.text.word.weight
        assert loaded.opt.text_decoder.word.weight is word and loaded.opt.mlm.word.weight is word


def test_a_model_with_norms_of_summands_and_candidates_is_exported(raw_store: Path, tmp_path: Path) -> None:
    from opt_ds.serving.pretrained import OPTModel

    start_run(raw_store, tmp_path / "run", "model.normalize_embedding_summands=true", "tasks.matching.candidates=3")
    loaded = OPTModel.from_pretrained(export(tmp_path / "run", tmp_path / "model"))
    expected, found = load_model(tmp_path / "run")[0].state_dict(), loaded.opt.state_dict()
    assert "embeddings.regions.box_norm.weight" in found and found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_answers_are_those_of_the_run(session: Session, exported: Path, raw: Path) -> None:
    other = Session.load(exported)
    for given in ({"text": "a red square"}, {"image": raw / "2.png", "audio": raw / "2.wav"}):
        sample, same = session.processor(**given), other.processor(**given)
        assert session.text(sample) == other.text(same)
        assert session.generate_images(sample)[0][0].tobytes() == other.generate_images(same)[0][0].tobytes()


def test_a_model_with_a_grid_of_codes_and_dropped_conditions_is_trained_exported_and_guided(
    raw_store: Path, tmp_path: Path
) -> None:
    modality = ("always_drop_target=true", "text_target_fraction=0", "condition_dropout=0.5")
    settings = ("model.image_positions=grid", "tasks.sampling_weights={modality: 1}")
    start_run(raw_store, tmp_path / "run", *settings, *(f"tasks.modality.{setting}" for setting in modality))
    session, other = Session.load(tmp_path / "run"), Session.load(export(tmp_path / "run", tmp_path / "model"))
    sample, same = session.processor("a red square"), other.processor("a red square")
    options = DEFAULT_SAMPLING.model_copy(update={"guidance": 3.0})
    (guided, _), (again, _) = session.generate_images(sample, 1, options)[0], other.generate_images(same, 1, options)[0]
    assert guided.tobytes() == again.tobytes() != session.generate_images(sample)[0][0].tobytes()
    assert other.model.image_decoder.position.row.weight.shape[0] == 8


def test_the_folder_names_no_path_of_the_machine_and_has_a_card(exported: Path, raw_store: Path) -> None:
    text = (exported / "config.json").read_text() + (exported / "README.md").read_text()
    assert str(raw_store) not in text and "arXiv 2107.00249" in text
    assert json.loads((exported / "config.json").read_text())["model_type"] == "opt_ds"
    assert is_exported(exported) and not is_exported(exported / "processor")


def test_others_may_read_the_files_as_the_umask_says(run: Path, exported: Path) -> None:
    everything = [file for folder in (run / "checkpoints", exported) for file in folder.rglob("*") if file.is_file()]
    assert {file.name for file in everything} >= {"model.safetensors", "moments.safetensors", "state.json", "README.md"}
    (exported.parent / "any").touch()
    assert {file.stat().st_mode for file in everything} == {(exported.parent / "any").stat().st_mode}


@pytest.mark.parametrize("page", ["card", "README.md"])
def test_the_examples_in_python_run_as_they_are_written(
    page: str, exported: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (exported / "README.md" if page == "card" else Path(__file__).parents[2] / page).read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(raw)
    files = {"photo.jpg": "0.png", "photo.png": "0.png", "speech.wav": "0.wav"}
    for name, there in {"this/folder": exported, "my-model": exported, **files}.items():
        example = example.replace(f'"{name}"', f'"{there}"')
    exec(example, {})
    assert capsys.readouterr().out.endswith("\n")


def test_an_existing_folder_is_left_alone(run: Path, exported: Path) -> None:
    before = sorted(exported.rglob("*"))
    with pytest.raises(UserError, match="exists already"):
        export(run, exported)
    assert sorted(exported.rglob("*")) == before
