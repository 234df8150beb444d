"""A model of a few thousand weights and the stores that fit it: what the tests of data, model and tasks build on."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opt_ds.config import Config, config_from_dict, default_tasks
from opt_ds.data.batch import PackedBatch, Packer
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.sample import Sample
from opt_ds.data.samples import SampleReader
from opt_ds.data.step_plan import StepPlan
from opt_ds.model.opt import OPT
from opt_ds.store import FeatureStore
from opt_ds.store.index import StoreIndex, count_subsets
from opt_ds.store.synthetic import write_synthetic_store
from opt_ds.tasks import BUILT_IN
from opt_ds.tasks.reconstruct import ReconstructionTargets

#: The built-in tasks by name, and their numbers in a plan.
TASK_NAMES = tuple(BUILT_IN)
MLM, MVM, MAM, MODALITY, MATCHING, WRITE, LABELS, ALIGNMENT = range(len(TASK_NAMES))
#: The tasks that pre-training samples by default, with their losses.
SAMPLED_TASKS = {name: losses for name, losses in default_tasks().sampled.items() if name in default_tasks().sampling_weights}
LOSSES = tuple(loss for losses in SAMPLED_TASKS.values() for loss in losses)

STORE = {
    "text_len": (1, 10),
    "regions": (1, 8),
    "frames": (1, 16),
    "image_feature_dim": 8,
    "audio_feature_dim": 6,
    "image_num_classes": 7,
    "vocab_size": 40,
    "num_codes_vocab": 16,
    "pixels": False,
}
MODEL = {
    "vocab_size": 40, "max_text_tokens": 8, "image_feature_dim": 8, "image_num_classes": 7, "max_regions": 6,
    "audio_feature_dim": 6, "audio_stack": 2, "max_frames": 8, "image_codebook_size": 16, "hidden_size": 16,
    "num_heads": 2, "num_layers": 2, "ffn_size": 32, "text_decoder_layers": 2, "image_decoder_layers": 1,
    "dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.2,
}  # fmt: skip


def make_store(path: Path, num_samples: int = 60, **changes: Any) -> FeatureStore:
    write_synthetic_store(path, num_samples, **{**STORE, **changes})
    return FeatureStore(path)


def index_with(store: FeatureStore, rows: np.ndarray) -> StoreIndex:
    """The store's index as if its samples had these rows: laid into `store.__dict__["index"]`, a store with other modalities."""
    subsets = count_subsets(rows, store.split_codes, len(store.description.split_names))
    return dataclasses.replace(store.index, rows=rows, subsets=subsets)


def masked(store: FeatureStore, modality: int) -> FeatureStore:
    """Open the same store again, as if no sample had the modality."""
    without = FeatureStore(store.path)
    rows = without.index.rows.copy()
    rows[:, modality] = -1
    without.__dict__["index"] = index_with(without, rows)
    return without


def make_config(**sections: Any) -> Config:
    """The tiny configuration; each section's keys are laid over it: make_config(model={"norm": "pre"}, seed=3)."""
    tree: dict[str, Any] = {
        "model": MODEL,
        "batch": {"size": 24, "max_tokens": 256},
        "schedule": {"total_steps": 100, "warmup_steps": 5},
        "data": {},
    }
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return config_from_dict(tree, where="test")


def make_model(config: Config, seed: int = 0) -> OPT:
    """An initialised model whose biases and norms are random too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = OPT(config.model, config.tasks)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def read_samples(config: Config, stores: list[FeatureStore], step: int = 0) -> list[Sample]:
    """Return all samples of one training step, in the order of their global indices."""
    step_plan, reader = PretrainingPlan(config, stores).step(step), SampleReader(config, stores)
    return [reader.read(step_plan.samples, index) for index in range(step_plan.num_samples)]


def written(sample: Sample) -> ReconstructionTargets:
    """What the decoders are to write of a sample; nothing where it has another task."""
    return sample.targets.get("modality", ReconstructionTargets())


def make_packer(config: Config, stores: list[FeatureStore]) -> Packer:
    return Packer(config, stores[0].description.tokenizer)


def make_batches(config: Config, stores: list[FeatureStore], step_plan: StepPlan) -> list[list[PackedBatch]]:
    """[rank][k], the micro-batches as the plan distributes them."""
    reader, packer = SampleReader(config, stores), make_packer(config, stores)
    return [
        [packer.pack([reader.read(step_plan.samples, int(index)) for index in m.indices]) for m in rank]
        for rank in step_plan.micro_batches
    ]


def positions_of(samples: list[Sample]) -> list[tuple[int, range, range, range]]:
    """Packed positions of each sample's [CLS], WordPieces, regions and frames, counted out from the layout
    `[CLS] text [SEP] regions frames`."""
    positions, at = [], 0
    for sample in samples:
        num_words, num_regions, num_frames = (
            len(sample.items.get(modality, ())) for modality in (TEXT, IMAGE, AUDIO)
        )
        words = range(at + 1, at + 1 + num_words)
        first_region = words.stop + (TEXT in sample.items)  # [SEP] ends a text
        regions = range(first_region, first_region + num_regions)
        frames = range(regions.stop, regions.stop + num_frames)
        positions.append((at, words, regions, frames))
        at = frames.stop
    return positions
