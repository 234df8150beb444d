"""Experiments on the model in training, at intervals: the same functions as `opt-ds evaluate`'s, smaller, as flat figures."""

import importlib
from collections.abc import Collection
from typing import Any

import numpy as np

from opt_ds.abilities import GENERATE_IMAGES, LABEL, MATCH, WRITE_TEXT
from opt_ds.config import Config, EvaluateConfig
from opt_ds.data.task import AUDIO, IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluate.evaluator import Evaluator
from opt_ds.model.generation import DecodingConfig
from opt_ds.store.reader import FeatureStore

#: experiment -> (ability that it measures, modalities of which its samples have one set or another)
_NEEDS: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "retrieval": (MATCH, ((TEXT, IMAGE), (TEXT, AUDIO))),
    "transcription": (WRITE_TEXT, ((TEXT, AUDIO), (TEXT, IMAGE))),
    "captioning": (WRITE_TEXT, ((TEXT, IMAGE),)),
    "image-generation": (GENERATE_IMAGES, ((IMAGE, TEXT), (IMAGE, AUDIO))),
    "vqa": (LABEL, ((TEXT, IMAGE),)),
}
_PAIRS, _TRIPLES = 50, 20  # the matching head encodes every pair: a gallery's square
_FIGURES = ("R@1", "R@5", "R@10", "wer", "cer", "wer_shuffled_audio", "bleu_4", "cider", "bits_per_code", "accuracy")


def check_experiments(config: Config, store: FeatureStore) -> None:
    """Raise UserError if an experiment of `evaluate.experiments` cannot be run during training on this store."""
    options = config.evaluate
    if not options.every_steps:
        return
    for name in options.experiments:
        importlib.import_module(f"opt_ds.evaluate.{name.replace('-', '_')}")  # a missing extra is found now, not in mid-run
        ability, alternatives = _NEEDS[name]
        if not config.can(ability):
            loss = config.tasks.loss_for(ability)
            raise UserError(f"evaluate.experiments has {name}, but the model does not learn {loss}: leave it out")
        if name == "image-generation" and not store.has_codes:
            raise UserError(f"evaluate.experiments has {name}, but {store.path} has no image codes: leave it out")
        found = max(_count_with(store, options.split, modalities) for modalities in alternatives)
        if found < 2:
            raise UserError(
                f'evaluate.experiments has {name}, but split "{options.split}" of {store.path} has {found} samples with all that '
                "it needs: leave it out, or choose another evaluate.split"
            )


def _count_with(store: FeatureStore, split: str, modalities: Collection[int]) -> int:
    """Return how many samples of the split have these modalities, by the index's counts: no sample is looked at."""
    counts, wanted = store.split_subsets(split), sum(1 << modality for modality in modalities)
    return int(counts[np.arange(len(counts)) & wanted == wanted].sum())


def figures_during_training(evaluator: Evaluator, options: EvaluateConfig, seed: int) -> dict[str, float]:
    """"evaluate/<experiment>/…" -> figure; greedy decoding, galleries of at most `options.limit`."""
    figures: dict[str, float] = {}
    for name in options.experiments:
        for key, value in _flat(_run(name, evaluator, options, seed), f"evaluate/{name}").items():
            if key.rpartition("/")[2] in _FIGURES:
                figures[key] = value
    return figures


def _run(name: str, evaluator: Evaluator, options: EvaluateConfig, seed: int) -> dict[str, Any]:
    split, limit, greedy = options.split, options.limit, DecodingConfig()
    if name == "retrieval":
        from opt_ds.evaluate.retrieval import retrieval

        return retrieval(evaluator, split, limit, min(limit, _PAIRS), min(limit, _TRIPLES), seed)
    if name == "transcription":
        from opt_ds.evaluate.transcription import transcription

        return transcription(evaluator, split, limit=limit, seed=seed, options=greedy)
    if name == "captioning":
        from opt_ds.evaluate.captioning import captioning

        return captioning(evaluator, split, limit, seed, greedy)
    if name == "vqa":
        from opt_ds.evaluate.vqa import vqa

        return vqa(evaluator, split, limit=limit, seed=seed)
    from opt_ds.evaluate.image_generation import bits_per_code, possible_inputs

    return {inputs: bits_per_code(evaluator, split, inputs, limit, seed) for inputs in possible_inputs(evaluator, split)}


def _flat(tree: dict[str, Any], path: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in tree.items():
        if key in ("chance", "decoding", "constant_caption", "constant_answer", "another_picture"):
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{path}/{key}")
        elif isinstance(value, (int, float)):
            found[f"{path}/{key}"] = float(value)
    return found
