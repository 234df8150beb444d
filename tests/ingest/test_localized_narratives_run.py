"""From Localized Narratives as published to training: manifest, store (Faster R-CNN, wav2vec 2.0), two optimiser steps."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

from opt_ds.ingest import PrepareSettings, prepare
from opt_ds.ingest.importers.localized_narratives import import_localized_narratives
from opt_ds.store import FeatureStore, inspect_store
from tests.training.runs import losses
from tests.training.test_pretrain import arguments, start

NUM_NARRATIVES, NUM_IMAGES = 200, 20
WORDS = ("In", "this", "image", "there", "is", "a", "cat", "dog", "tree", "house", "and", "the", "sky", "near", "road")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images, JSONL, voice recordings, label CSV files and two checkpoints, as they are published."""
    folder, random = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    torch.manual_seed(0)
    (folder / "train").mkdir()
    (folder / "voices" / "open_images_train").mkdir(parents=True)
    for index in range(NUM_IMAGES):
        pixels = random.integers(0, 256, (6, 8, 3), "uint8")
        Image.fromarray(pixels).resize((96, 72)).save(folder / "train" / f"{index:016x}.jpg")
    with open(folder / "narratives.jsonl", "w") as file:
        for number in range(NUM_NARRATIVES):
            image, annotator = f"{number % NUM_IMAGES:016x}", number // NUM_IMAGES
            audio_name = f"open_images_train/open_images_train_{image}_{annotator}.ogg"
            soundfile.write(folder / "voices" / audio_name, 0.1 * random.standard_normal(11_025), 44_100)
            caption = " ".join(random.choice(WORDS, 8)) + "."
            timed = [{"utterance": caption, "start_time": 0.0, "end_time": 0.25}]
            line = {"dataset_id": "open_images_train" if number % NUM_IMAGES else "open_images_validation",
                    "image_id": image, "annotator_id": annotator, "caption": caption, "timed_caption": timed,
                    "traces": [[{"x": 0.2, "y": 0.3, "t": 0.02}]], "voice_recording": audio_name}  # fmt: skip
            file.write(json.dumps(line) + "\n")
    (folder / "labels.csv").write_text(
        "ImageID,Source,LabelName,Confidence\n"
        + "".join(f"{index:016x},verification,/m/0{index % 3},1\n" for index in range(NUM_IMAGES))
    )
    (folder / "classes.csv").write_text("/m/00,Cat\n/m/01,Dog\n/m/02,Tree\n")
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=0)
    detector = FasterRCNN(backbone, num_classes=2, box_head=TwoMLPHead(256 * 49, 32))
    detector.roi_heads.box_predictor = FastRCNNPredictor(32, 1601)
    torch.save(detector.state_dict(), folder / "detector.pth")
    _save_wav2vec2(folder / "wav2vec2")
    return folder


def _save_wav2vec2(folder: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, conv_dim=[16] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


def test_from_published_files_to_two_training_steps(published: Path, tmp_path: Path) -> None:
    manifest, path = tmp_path / "manifest.jsonl", tmp_path / "store"
    import_localized_narratives(
        [published / "narratives.jsonl"],
        manifest,
        images=published / "train",
        audio=published / "voices",
        labels=[published / "labels.csv"],
        label_names=published / "classes.csv",
    )
    settings = PrepareSettings(
        images="faster_rcnn",
        image_weights=published / "detector.pth",
        image_min_side=72,
        image_max_side=96,
        speech="wav2vec2",
        speech_weights=published / "wav2vec2",
        vocab_size=60,
        pixels=False,
    )
    prepare(manifest, path, settings, workers=1, device="cpu", allow_outside=True)
    store = FeatureStore(path)
    assert inspect_store(path).failures == []
    assert store.num_samples == NUM_NARRATIVES
    assert len(store.region_counts) == NUM_IMAGES, "narratives of an image share its row"
    assert store.region_counts.min() >= 10
    assert set(store.frame_counts) == {12}  # a quarter of a second: (4000 - 400) // 320 + 1
    dims = store.description.dims
    assert (dims.image_num_classes, dims.image_feature_dim, dims.audio_feature_dim) == (1601, 32, 20)
    assert store.description.split_counts == {"train": 190, "valid": 10}
    assert store.labels(0) == ["Cat"]

    fitted = (
        f"model.vocab_size={dims.vocab_size}", "model.image_num_classes=1601", "schedule.total_steps=10",
        "train.max_steps=2", "model.max_regions=10", "tasks.dir.weight=0",
    )  # fmt: skip
    process = start(*arguments(path, tmp_path / "run", *fitted))
    _, said = process.communicate()
    assert process.returncode == 0, said
    curve = losses(tmp_path / "run")
    assert sorted(curve) == [1, 2]
    assert np.isfinite(list(curve.values())).all()
