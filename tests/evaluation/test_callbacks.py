"""Test evaluation during a run: image grids and reports of the callbacks between steps."""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from opt_ds.config import Config
from opt_ds.dvae.codes import CodeExtractor, write_missing_codes
from opt_ds.dvae.model import DVAE_PRESETS, DiscreteVAE
from opt_ds.errors import UserError
from opt_ds.evaluation.callbacks import EvaluationCallbacks
from opt_ds.store import FeatureStore
from tests.tiny import make_config, make_model, make_store


@dataclass
class Report:
    """Keeps the reported values."""

    figures: dict[str, float] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)

    def scalars(self, step: int, values: dict[str, float], kind: str) -> None:
        self.figures |= values

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        self.images[name] = image


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """A store with pixels, codes and the dVAE that made them."""
    path = Path(make_store(tmp_path_factory.mktemp("callbacks") / "s", 24, pixels=True, num_codes_vocab=None).path)
    torch.manual_seed(0)
    write_missing_codes(path, CodeExtractor(DiscreteVAE(DVAE_PRESETS["dvae-tiny"])))
    return FeatureStore(path)


def run_of(store: FeatureStore, is_main: bool = True, **sections: Any) -> Any:
    """What callbacks see of a trainer after step 4."""
    sizes = {"num_image_codes": 64, "image_codebook_size": 32}
    config: Config = make_config(data={"stores": [str(store.path)]}, model=sizes, **sections)
    model = make_model(config).train()
    engine = SimpleNamespace(module=model, train=model.train, eval=model.eval)
    ranks = SimpleNamespace(is_main=is_main, world_size=1, rank=0)
    group = SimpleNamespace(ranks=ranks, device=torch.device("cpu"))
    return SimpleNamespace(
        config=config, stores=[store], group=group, engine=engine, plan=SimpleNamespace(version=None), report=Report(),
        state=SimpleNamespace(step=4), is_due=lambda every: 4 % every == 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("is_main", "settings", "drawn"),
    [(True, {"image_grid": 2}, True), (True, {"image_grid": 0}, False), (False, {"image_grid": 2}, False)],
)
def test_the_main_rank_draws_the_image_grid(store: FeatureStore, is_main: bool, settings: dict, drawn: bool) -> None:
    run = run_of(store, is_main, train=settings)
    EvaluationCallbacks().after_validation(run)
    assert ("valid/images" in run.report.images) == drawn
    assert run.engine.module.training


def test_experiments_run_only_at_their_steps(store: FeatureStore, logged: list[str]) -> None:
    for every, due in ((3, False), (4, True)):
        run = run_of(store, evaluate={"every_steps": every, "experiments": ("captioning",), "limit": 2})
        EvaluationCallbacks().after_step(run)
        assert ("evaluate/captioning/bleu_4" in run.report.figures) == due == bool(logged)
        assert run.engine.module.training


def test_reference_losses_are_the_main_ranks(store: FeatureStore) -> None:
    assert EvaluationCallbacks().reference_losses(run_of(store))["mlm"] > 0
    assert EvaluationCallbacks().reference_losses(run_of(store, is_main=False)) == {}


def test_experiments_are_checked_before_training(store: FeatureStore) -> None:
    run = run_of(store, evaluate={"every_steps": 1, "experiments": ("vqa",)})
    with pytest.raises(UserError, match="the model is not trained with labels"):
        EvaluationCallbacks().check(run.config, run.stores)
