"""Test the commands on a store of scenes: several ranks have the figures of one; the summary and the report show them."""

import json
from pathlib import Path
from typing import Any

import pytest

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.config import load_config
from opt_ds.config.dvae import DVAE_PRESETS
from opt_ds.dvae.codes import CodeExtractor, write_missing_codes
from opt_ds.dvae.model import DiscreteVAE
from opt_ds.evaluation.scene_truth import SampleCounts
from opt_ds.scenes.records import truth_lines
from opt_ds.scenes.sampling import COMPOSITION, TRAIN, VALID
from opt_ds.store import FeatureStore
from tests.evaluation.scene_store import make_records, write_store
from tests.training.runs import FITTED, free_port, rank_environment, train
from tests.warm import WarmProcess

COUNTS = ("--limit", "4", "--probe", "8", "--generate", "2", "--beam-size", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, group: Any) -> Path:
    """A folder with a store of scenes, its truth, its dVAE, and a run of two steps on it."""
    folder, records = tmp_path_factory.mktemp("scenes"), make_records({TRAIN: 200, VALID: 4, COMPOSITION: 8})
    (folder / "truth.jsonl").write_text("".join(truth_lines(records)))
    write_store(folder / "store", records, coded=False)
    write_missing_codes(folder / "store", CodeExtractor(DiscreteVAE(DVAE_PRESETS["dvae-tiny"])))
    dims = FeatureStore(folder / "store").description.dims
    sizes = (f"model.vocab_size={dims.vocab_size}", f"model.image_feature_dim={dims.image_feature_dim}",
             f"model.image_num_classes={dims.image_num_classes}", f"model.audio_feature_dim={dims.audio_feature_dim}",
             f"model.image_codebook_size={dims.num_codes}", "model.audio_stack=2", "model.max_text_tokens=40")  # fmt: skip
    config = load_config("opt-tiny", [*FITTED, *sizes, f"data.stores=[{folder / 'store'}]", "train.max_steps=2"])
    train(config, folder / "run", group)
    return folder


def evaluation(made: Path, name: str, output: Path, *options: str) -> list[str]:
    given = ("--checkpoint", made / "run", "--store", made / "store", "--truth", made / "truth.jsonl", "--output", output)
    return ["evaluate", name, *map(str, given), *options]


@pytest.mark.timeout(300)
def test_two_ranks_have_the_figures_of_one_and_the_report_shows_them(made: Path, tmp_path: Path) -> None:
    one, two = made / "run" / "scenes.json", tmp_path / "two.json"
    assert run_command(_build(), evaluation(made, "scenes", one, *COUNTS), "opt-ds") == 0
    port = free_port()
    command = ["-m", "opt_ds", *evaluation(made, "scenes", two, *COUNTS)]
    ranks = [WarmProcess(command, rank_environment(rank, 2, port)) for rank in range(2)]
    outcomes = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outcomes
    assert json.loads(two.read_text()) == json.loads(one.read_text())
    assert "image→text, text likelihood, swapped" in outcomes[0][0] and not outcomes[1][0], "only the first rank prints"
    found = json.loads(one.read_text())
    assert found["skipped"] == {} and {"texts", "negatives", "probes", "images"} <= set(found)
    assert run_command(_build(), ["report", str(made / "run"), "--output", str(tmp_path / "page.html")], "opt-ds") == 0
    page = (tmp_path / "page.html").read_text()
    for shown in ("hard negatives that the true caption is preferred to", "bag of words", "untrained model",
                  "mAP of a linear probe on the frozen [CLS] for the labels of scenes", "dVAE of the true image"):  # fmt: skip
        assert shown in page, shown


def test_the_summary_has_the_scenes_of_each_split(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("opt_ds.evaluation.summary.SCENE_COUNTS", SampleCounts(2, 8, 1))
    few, output = ("--candidates", "4", "--matching-candidates", "3"), tmp_path / "result.json"
    assert run_command(_build(), evaluation(made, "summary", output, *few), "opt-ds") == 0
    found = json.loads(output.read_text())
    assert list(found["splits"]) == [COMPOSITION]
    figures = found["splits"][COMPOSITION]["scenes"]
    assert figures["split"] == COMPOSITION and figures["skipped"] == {} and figures["images"]["T"]["samples"] == 1
    assert found["seconds_by_part"]["scenes"] > 0
    printed = capsys.readouterr().out
    assert "generated texts that are complete, or true, of their scene" in printed and "bag of words" in printed


@pytest.mark.parametrize("experiment", ["scenes", "summary"])
def test_the_truth_of_another_corpus_is_refused_at_once(
    experiment: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opt_ds.evaluation.summary.validate", lambda *_: pytest.fail("something was measured"))
    lines = (made / "truth.jsonl").read_text().splitlines(keepends=True)
    other = tmp_path / "truth.jsonl"
    other.write_text("".join(lines[:-1]))
    arguments = evaluation(made, experiment, tmp_path / "out.json")
    arguments[arguments.index("--truth") + 1] = str(other)
    assert run_command(_build(), arguments, "opt-ds") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "truth.jsonl: it has no sample" in error and "give the truth.jsonl of the corpus" in error
    assert not (tmp_path / "out.json").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["transcription", "captioning"])
def test_two_ranks_write_the_predictions_of_one(made: Path, tmp_path: Path, name: str) -> None:
    def command(folder: Path) -> list[str]:
        given = ("--checkpoint", made / "run", "--store", made / "store", "--output", folder / "figures.json",
                 "--predictions", folder / "rows.jsonl", "--split", VALID, "--beam-size", 2)  # fmt: skip
        return ["evaluate", name, *map(str, given)]

    one, two = tmp_path / "one", tmp_path / "two"
    assert run_command(_build(), command(one), "opt-ds") == 0
    port = free_port()
    ranks = [WarmProcess(["-m", "opt_ds", *command(two)], rank_environment(rank, 2, port)) for rank in range(2)]
    outcomes = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outcomes
    rows = [json.loads(line) for line in (one / "rows.jsonl").read_text().splitlines()]
    store = FeatureStore(made / "store")
    ids = [store.sample_id(int(index)) for index in store.split_samples(VALID)]
    assert len(ids) == 4 and sorted(row["id"] for row in rows) == sorted(ids * (3 if name == "transcription" else 1))
    for file in ("rows.jsonl", "figures.json"):
        assert (two / file).read_bytes() == (one / file).read_bytes()
