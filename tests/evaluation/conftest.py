"""A small random model on a small store that has codes and pixels. Projections are fitted in a few steps."""

from functools import partial
from pathlib import Path

import pytest
import torch

from opt_ds.data.modalities import AUDIO
from opt_ds.evaluation import projections
from opt_ds.evaluation.dual_projection import fit_dual_projection
from opt_ds.evaluation.evaluator import Evaluator
from tests.tiny import make_config, make_model, make_store, masked


@pytest.fixture(scope="session")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> Evaluator:
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("evaluate")
    store = make_store(folder / "store", 60, pixels=True, num_codes_vocab=16)
    config = make_config(data={"stores": [str(store.path)]}, model={"num_image_codes": 64})
    return Evaluator(make_model(config), config, store)


@pytest.fixture(scope="session")
def without_audio(evaluator: Evaluator) -> Evaluator:
    """Return the same model on the same store, as if it had no audio."""
    return Evaluator(evaluator.model, evaluator.config, masked(evaluator.store, AUDIO))


@pytest.fixture(autouse=True)
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "fit_dual_projection", partial(fit_dual_projection, steps=20))
