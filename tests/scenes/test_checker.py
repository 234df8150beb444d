"""Test the checker: right on true images, at chance on another scene's, and it sees what a hard negative changes."""

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from opt_ds.scenes.checker import CHECKED_SIDE, check, compare, for_checking, read_image
from opt_ds.scenes.drawing import draw
from opt_ds.scenes.layout import GRID, cells
from opt_ds.scenes.pictograms import FILLED, OUTLINED, pictogram
from opt_ds.scenes.truth import Group, Scene, SceneGraph
from opt_ds.scenes.vocabulary import KINDS

CODE = CHECKED_SIDE // GRID
CAT_DOG = SceneGraph((Group("cat", 1, "red", "small"), Group("dog", 2, "blue")), "horizontal", "green")


@pytest.fixture(scope="module")
def judged(described: list[Any]) -> list[tuple[Scene, SceneGraph]]:
    """Every split's scenes, and what the checker reads in their images."""
    chosen = [each.scene for each in described[:100]]
    return [(scene, read_image(for_checking(draw(scene)), scene.style)) for scene in chosen]


def test_true_images_are_right(judged: list[tuple[Scene, SceneGraph]]) -> None:
    assert np.mean([seen == scene.graph for scene, seen in judged]) >= 0.99
    whole = [compare(seen, scene.graph) for scene, seen in judged]
    assert np.mean([verdict.whole for verdict in whole]) >= 0.99
    assert np.mean([verdict.objects for verdict in whole]) >= 0.99


def test_another_scenes_images_are_at_chance(judged: list[tuple[Scene, SceneGraph]]) -> None:
    """Of 48 kinds and 6 grounds: objects 2 %, less where the layout is wrong; a ground in six."""
    others = [
        compare(seen, scene.graph)
        for place, (scene, _) in enumerate(judged)
        for _, seen in judged[place + 1 :] + judged[:place]
    ]
    assert np.mean([verdict.whole for verdict in others]) < 0.002
    assert np.mean([verdict.objects for verdict in others]) < 0.03
    assert 0.1 < np.mean([bool(verdict.ground) for verdict in others]) < 0.25
    assert 0.2 < np.mean([verdict.layout for verdict in others]) < 0.5


def test_blurred_and_noisy_images_are_read(described: list[Any]) -> None:
    """As far as a discrete variational autoencoder changes them."""
    random = np.random.default_rng(0)
    right = []
    for each in [each for each in described if each.scene.style == FILLED][:25]:
        soft = draw(each.scene).resize((CHECKED_SIDE, CHECKED_SIDE)).filter(ImageFilter.GaussianBlur(0.8))
        noisy = np.clip(np.asarray(soft) + random.normal(0, 15, (CHECKED_SIDE, CHECKED_SIDE, 3)), 0, 255).astype(
            np.uint8
        )
        right.append(check(np.roll(noisy, 1, axis=1), each.scene.graph).whole)
    assert np.mean(right) >= 0.9


def test_images_of_hard_negatives_are_wrong_in_what_they_change(described: list[Any]) -> None:
    found: Counter[str] = Counter()
    for each in [each for each in described if each.scene.style == FILLED and len(each.negatives) == 6][:6]:
        truth = each.scene.graph
        for kind, (graph, _) in each.negatives.items():
            image = draw(Scene(SceneGraph(graph.groups, graph.axis, truth.ground), FILLED))
            verdict = check(for_checking(image), truth)
            assert not verdict.whole and verdict.ground, kind
            assert verdict.layout == (kind != "relation")
            assert verdict.objects == {"swapped": 0, "object": 0.5, "relation": 0}.get(kind, 1)
            assert (verdict.colour == 1) == (
                kind not in ("colour", "colours", "swapped", "relation")
            ) or kind == "object"
            assert kind != "count" or verdict.count == 0.5
            found[kind] += 1
    assert len(found) == 6


def test_what_was_not_asked_for_is_not_judged() -> None:
    seen = read_image(for_checking(draw(Scene(CAT_DOG, FILLED))))
    asked = SceneGraph((Group("cat"), Group("dog", 2)), "horizontal", None)
    verdict = compare(seen, asked)
    assert verdict.whole and verdict.ground is None and verdict.colour is None and verdict.size is None
    assert not compare(seen, SceneGraph((Group("cat", size="large"), Group("dog", 2)), "horizontal", None)).whole
    single = compare(seen, SceneGraph((Group("cat"),), None, None))
    assert not single.layout and single.objects == 0 and single.count is None


def test_an_image_without_objects_is_no_scene() -> None:
    grey = np.full((CHECKED_SIDE, CHECKED_SIDE, 3), 128, np.uint8)
    assert not check(grey, CAT_DOG).whole


def test_objects_are_on_the_grid_of_codes(described: list[Any]) -> None:
    """Everything outside the cells is the ground, exactly: an object changes no code but its own."""
    for each in described[:40]:
        scene = each.scene
        pixels = for_checking(draw(scene)).astype(int)
        free = np.ones((GRID, GRID), bool)
        for group in cells(scene.graph.extents, scene.graph.axis):
            for cell in group:
                free[cell.y : cell.y + cell.side, cell.x : cell.x + cell.side] = False
        assert (~free).sum() == sum(item.cell.side**2 for item in scene.objects), "objects do not overlap"
        outside = pixels[np.kron(free, np.ones((CODE, CODE), bool))]
        assert np.abs(outside - outside[0]).max() <= 12  # ringing of the scaling filter


@pytest.mark.parametrize("style", [FILLED, OUTLINED])
def test_appearances_differ(style: str) -> None:
    """At the smallest size, on a grey ground: every kind and tint differs from every other one."""
    side = 3 * CODE
    names = [(kind.name, colour) for kind in KINDS.values() for colour in (None, *kind.tints)]
    images = np.stack([np.asarray(pictogram(*name, style, side), float) for name in names])
    flat = (images[..., :3] + 190 * (1 - images[..., 3:] / 255)).reshape(len(names), -1)
    squares = (flat**2).sum(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0) / flat.shape[1])
    close = [(names[i], names[j]) for i, j in combinations(range(len(names)), 2) if distances[i, j] < 9]
    assert close == []


def test_drawing_is_repeatable() -> None:
    scene = Scene(CAT_DOG, FILLED)
    assert draw(scene).tobytes() == draw(scene).tobytes()
    assert draw(scene).getpixel((100, 2)) == (190, 235, 180)
    assert isinstance(draw(scene), Image.Image) and draw(scene).size == (192, 192)
