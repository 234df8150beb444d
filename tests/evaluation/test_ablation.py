"""The ablation: which losses each row trains with, what is refused, real runs in one table, and no row made twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from opt_ds.cli import _build
from opt_ds.cli.program import run_command
from opt_ds.config import load_config
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.errors import RunError, UserError
from opt_ds.evaluation import ablation
from opt_ds.evaluation.ablation_table import ablation_markdown
from opt_ds.store.reader import FeatureStore
from opt_ds.store.synthetic import write_synthetic_store
from tests.tiny import LOSSES
from tests.training.runs import FITTED

TINY = (*FITTED, "train.max_steps=2")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ablation") / "store"
    write_synthetic_store(path, 60, frames=(16, 40), pixels=False)
    return path


def rows_of(store: Path, *settings: str, names: tuple[str, ...] = ()) -> dict[str, ablation.Row]:
    given = (*TINY, f"data.stores=['{store}']", *settings)
    return {row.name: row for row in ablation.ablation_rows("opt-tiny", given, [FeatureStore(store)], names)}


def opt_ds(store: Path, output: Path, *arguments: str, min_positives: int = 5) -> int:
    options = [part for setting in TINY for part in ("--set", setting)]
    probe = ["--split", "valid", "--min-positives", str(min_positives)]
    command = ["ablate", "--config", "opt-tiny", "--store", str(store), "--output", str(output), *probe, *options, *arguments]
    return run_command(_build(), command, "opt-ds")


def test_rows_differ_in_the_losses_that_are_planned(store: Path) -> None:
    """The plan of some steps of each row's run counts exactly the losses that the row names."""
    rows = rows_of(store)
    assert list(rows) == list(ablation.rows_without(load_config("opt-tiny").tasks))
    expected = {
        "full": set(LOSSES),
        "no-sample-level": set(LOSSES) - {"matching"},
        "no-modality-level": set(LOSSES) - {"dtr", "dir"},
        "no-token-level": {"dtr", "dir", "matching"},
        "no-dtr": set(LOSSES) - {"dtr"},
    }
    for name, row in rows.items():
        if not row.steps:
            continue
        plan = PretrainingPlan(row.config, [FeatureStore(store)])
        counted = {loss for step in range(30) for loss, count in plan.step(step).counts.items() if count}
        assert counted == set(row.losses), name
        assert counted == expected.get(name, counted), name
    assert len({row.losses for row in rows.values()}) == len(rows), "no two rows are the same run"


def test_a_row_that_would_repeat_the_full_run_is_left_out_and_refused_when_named(store: Path) -> None:
    assert "no-mam" not in rows_of(store, "tasks.mam.weight=0")
    assert "no-sample-level" not in rows_of(store, "tasks.sampling_weights={mlm: 1, modality: 1}"), "never drawn"
    with pytest.raises(UserError, match="takes nothing away"):
        rows_of(store, "tasks.mam.weight=0", names=("no-mam",))
    with pytest.raises(UserError, match='did you mean "no-dtr"'):
        rows_of(store, names=("no-dtrr",))


def test_a_probe_without_labels_is_refused_before_anything_is_trained(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opt_ds(store, tmp_path / "a", min_positives=1000) == 2
    assert "no label has 1000" in capsys.readouterr().err and not (tmp_path / "a").exists()
    assert opt_ds(store, tmp_path / "a", "--subset", "T+I+A") == 2
    assert 'did you mean "T+I"' in capsys.readouterr().err


def test_runs_become_a_table_and_are_not_run_again(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run pretrain.py for the row without the modality level, and evaluate the untrained model too."""
    output = tmp_path / "ablation"
    chosen = ("--row", "no-modality-level", "--row", "untrained")
    assert opt_ds(store, output, *chosen) == 0
    figures = json.loads((output / "ablation.json").read_text())
    by_name: dict[str, Any] = {row["row"]: row for row in figures["rows"]}
    assert list(by_name) == ["no-modality-level", "untrained"]
    ran = by_name["no-modality-level"]["losses"]
    assert ran and not {"dtr", "dir"} & set(ran) and by_name["untrained"]["losses"] == []
    assert by_name["no-modality-level"]["steps"] == 2
    assert f"| no-modality-level | {', '.join(ran)} |" in (output / "ablation.md").read_text()
    assert (output / "ablation.png").read_bytes().startswith(b"\x89PNG")
    capfd.readouterr()

    monkeypatch.setattr(ablation, "_pretrain", lambda *_: pytest.fail("a finished row is trained again"))
    assert opt_ds(store, output, *chosen) == 0
    assert capfd.readouterr().out.count("already complete") == 2
    assert opt_ds(store, output, "--row", "untrained", min_positives=6) == 0
    found = json.loads((output / "ablation.json").read_text())["rows"]
    assert [row["row"] for row in found] == ["untrained"], "a row of another probe is not in this table"
    name = "no-modality-level"
    row = rows_of(store, names=(name,))[name]
    (output / "no-modality-level" / "metrics.jsonl").open("a").write('{"step": 2, "train/dtr/loss": 1.0}\n')
    with pytest.raises(RunError, match="dtr ran, which this row disables"):
        ablation.probe_row(row, output, FeatureStore(store), ablation.Probe("valid", min_positives=5), "cpu")
    with pytest.raises(RunError, match="is at step 2 of 9"):
        longer = rows_of(store, "train.max_steps=9", names=(name,))[name]
        ablation.probe_row(longer, output, FeatureStore(store), ablation.Probe("valid"), "cpu")
    assert opt_ds(store, output, *chosen, "--set", "seed=7") == 2, "another run than the one that is there"
    assert "seed was 1 there and is 7 now" in capfd.readouterr().err


def test_changes_are_relative_to_the_full_run() -> None:
    def row(name: str, score: float) -> dict[str, Any]:
        probe = {"labels": 3, "test_samples": 4, "train_samples": 5, "split": "valid", "chance": 0.2}
        return {"row": name, "losses": ["mlm"], "steps": 2, "classification": {**probe, "subsets": {"T": {"mAP": score}}}}

    figures = {"preset": "opt-tiny", "seed": 1, "batch": {"size": 2, "unit": "samples"}}
    table = ablation_markdown({**figures, "rows": [row("full", 0.8), row("no-sample-level", 0.6)]})
    assert "| no-sample-level | mlm | 60.0 | -25.0 % | -7.4 % |" in table
    assert "change" in ablation_markdown({**figures, "rows": [row("no-mlm", 0.6)]}), "without the full run there is no change"
