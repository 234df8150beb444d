"""Test `opt-ds evaluate`: its defaults, and the table of experiments."""

import dataclasses
import inspect
from pathlib import Path
from typing import get_args

import pytest

from opt_ds.cli.evaluate import EXPERIMENTS, Row, evaluate
from opt_ds.cli.evaluation_options import held_out
from opt_ds.config import EvaluateConfig
from opt_ds.evaluation.experiments import Experiment, load_experiment
from tests.tiny import make_store


def test_a_store_without_a_test_split_is_judged_on_valid_and_that_is_said(
    tmp_path: Path, logged: list[str]
) -> None:
    store = make_store(tmp_path / "store", 20)
    assert held_out(store, 1) == ["valid"]
    assert "evaluated on valid, since none begins with test" in logged[0]


@pytest.mark.parametrize("row", EXPERIMENTS, ids=lambda row: row.name)
def test_the_options_of_a_row_are_what_its_experiment_takes(row: Row) -> None:
    experiment = load_experiment(row.name)
    assert isinstance(experiment, Experiment)
    taken = [name for name in inspect.signature(experiment.measure).parameters if name != "request"]
    assert sorted(taken) == sorted(field.name for field in dataclasses.fields(row.options))


def test_what_can_be_measured_in_training_is_what_the_configuration_takes() -> None:
    (accepted, _) = get_args(EvaluateConfig.model_fields["experiments"].annotation)
    in_training = {row.name for row in EXPERIMENTS if load_experiment(row.name).ability_in_training is not None}
    assert set(get_args(accepted)) == in_training


def test_every_file_of_an_experiment_is_a_row_and_every_row_a_command() -> None:
    folder = Path(inspect.getfile(Experiment)).parent
    files = {path.stem.replace("_", "-") for path in folder.glob("*.py")} - {"--init--"}
    assert files == {row.name for row in EXPERIMENTS} == {info.name for info in evaluate.registered_commands}
