"""Initial model of a run."""

from pathlib import Path

import torch

from opt_ds.config import Config
from opt_ds.model.opt import OPT
from opt_ds.model.warm_start import load_bert
from opt_ds.store.reader import FeatureStore


def initial_model(config: Config, stores: list[FeatureStore], warm_start: bool = True) -> OPT:
    """Return the initial model of a run.

    Its weights are sampled from `seed`, equal on every rank. The standardisation is that of the stores.

    With `warm_start`, the weights of `model.bert` are loaded too.
    """
    torch.manual_seed(config.seed)
    model = OPT(config.model, config.tasks).recompute_layers(config.train.recompute)
    model.set_feature_statistics(stores)
    if warm_start and config.model.bert:
        load_bert(model, Path(config.model.bert))
    return model
