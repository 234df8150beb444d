"""The beginning of a corpus of scenes, with captions and negatives, as data."""

from dataclasses import dataclass
from itertools import islice

import pytest

from opt_ds.scenes.captions import Phrasing, different_captions
from opt_ds.scenes.negatives import hard_negatives
from opt_ds.scenes.random_choices import Choices
from opt_ds.scenes.sampling import scenes, split_of
from opt_ds.scenes.truth import Scene, SceneGraph


@dataclass(frozen=True)
class Described:
    """A scene, its captions with what they mention, and the negatives of the first caption."""

    split: str
    scene: Scene
    captions: list[tuple[str, SceneGraph, Phrasing]]
    negatives: dict[str, tuple[SceneGraph, str]]


@pytest.fixture(scope="session")
def described() -> list[Described]:
    """The first 2,000 samples of seed 1."""
    found = []
    for number, scene in enumerate(islice(scenes(1), 2000)):
        captions = different_captions(scene.graph, Choices("captions", number), 3)
        _, mentioned, phrasing = captions[0]
        negatives = hard_negatives(scene.graph, mentioned, phrasing, Choices("negatives", number))
        found.append(Described(split_of(number), scene, captions, negatives))
    return found
