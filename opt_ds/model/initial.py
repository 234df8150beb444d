"""The model that a run begins with."""

from pathlib import Path

import torch

from opt_ds.config import Config
from opt_ds.model.opt import OPT
from opt_ds.model.warm_start import load_bert
from opt_ds.store.reader import FeatureStore


def initial_model(config: Config, stores: list[FeatureStore], warm_start: bool = True) -> OPT:
    """The model that a run begins with: weights drawn from `seed` (on every rank the same), the stores' standardisation, and,
    with `warm_start`, what `model.bert` gives."""
    torch.manual_seed(config.seed)
    model = OPT(config.model, config.tasks).recompute_layers(config.train.recompute)
    model.set_feature_statistics(stores)
    if warm_start and config.model.bert:
        load_bert(model, Path(config.model.bert))
    return model
