"""Test arrays that plans derive from a store: they are made once, equal after loading, and not used if a file changed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_ds.config import Config
from opt_ds.data import derived, text_similarity
from opt_ds.data.finetune_plan import FineTunePlan
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.step_plan import Plan
from opt_ds.store import FeatureStore
from tests.tiny import make_config, make_store

TOKENS = {"batch": {"size": 600, "unit": "tokens"}}
NEGATIVES = {"hard_negative_fraction": 0.7, "hard_negative_candidates": 8}
HARD = {"tasks": {"sampling_weights": {"matching": 1.0}, "matching": NEGATIVES}}
START = {"checkpoint": "-", "weights_sha256": "0", "trained_losses": ["matching"]}
TUNED = {"finetune": {"task": "retrieval", "inputs": ["T+I"], **START}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("derived") / "store", 120, missing=0.3, seed=2, samples_per_group=3).path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run's folder, with stores that cannot be written."""
    monkeypatch.setattr("opt_ds.store.records.os.access", lambda path, mode: False)
    return tmp_path / "run"


def plan_of(kind: type[Plan], config: Config, path: Path, run: Path | None) -> list[Any]:
    plan = kind(config, [FeatureStore(path, run)])
    steps = [plan.step(step) for step in range(5)]
    return [plan.batch_samples, *(array.tobytes() for step in steps for array in step.samples.arrays().values())]


@pytest.mark.parametrize(
    ("kind", "sections"), [(PretrainingPlan, TOKENS), (PretrainingPlan, HARD), (FineTunePlan, TUNED)]
)
def test_the_plan_is_the_same_from_files(
    kind: type[Plan], sections: dict[str, Any], path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**sections)
    expected = plan_of(kind, config, path, None)
    assert plan_of(kind, config, path, run) == expected
    assert list(run.rglob("*.npy")) and not list(path.rglob("*.npy"))
    written: list[Path] = []
    monkeypatch.setattr(derived, "_write", lambda path, *_: written.append(path))
    assert plan_of(kind, config, path, run) == expected
    assert not written


def test_hard_negatives_read_no_text_a_second_time(path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(**HARD)
    first = PretrainingPlan(config, [FeatureStore(path, run)])
    monkeypatch.setattr(FeatureStore, "text", None)
    second = PretrainingPlan(config, [FeatureStore(path, run)])
    pools = [pool for plan in (first, second) for pool in plan._derived["matching"]]
    near: list[text_similarity.TextSimilarity] = [pool._similarity for pool in pools]
    assert np.array_equal(near[0]._vectors, near[1]._vectors) and not near[1]._vectors.flags.owndata


def test_a_changed_file_is_made_again(path: Path, run: Path) -> None:
    store = FeatureStore(path, run)

    def value(key: int, content: int) -> int:
        return int(derived.cached_array(store, "value", [key], lambda: np.array([content]))[0])

    assert [value(1, 5), value(1, 6), value(2, 7)] == [5, 5, 7]
    for file in run.rglob("value-*.npy"):
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    assert [value(1, 6), value(2, 8)] == [6, 8]
    for file in run.rglob("value-*.json"):
        file.write_text("{broken")
    assert value(1, 9) == 9


def test_arrays_of_a_stores_earlier_contents_are_removed(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / name, 20, seed=1) for name in ("one", "other")]
    opened = [FeatureStore(store.path, tmp_path / "run") for store in stores]
    for store in opened:
        derived.cached_array(store, "value", [1], lambda: np.array([1]))
    mapped = derived.cached_array(opened[0], "value", [2], lambda: np.array([2]))
    foreign = stores[0].path / "derived" / "notes.json"
    foreign.write_text('{"identity": 3}')
    opened[0].description = opened[0].description.model_copy(update={"fingerprint": "later"})
    derived.cached_array(opened[0], "value", [1], lambda: np.array([5]))
    assert [len(list((store.path / "derived").glob("*.npy"))) for store in stores] == [1, 1]
    assert foreign.is_file() and mapped.tolist() == [2], "what is not ours stays, and so does what is in use"
