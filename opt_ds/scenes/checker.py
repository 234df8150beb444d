"""The scene graph of an image, found by comparing its cells with all pictograms, and how far it is what was asked for.

Images have 64 x 64 pixels, as generated ones do. The checker knows the pictograms, tints, grounds and layouts of the
corpus, so it needs no training. It always answers: on an image without objects the answer is the nearest scene.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from opt_ds.scenes.drawing import IMAGE_SIDE, object_icon
from opt_ds.scenes.judging import group_is_true
from opt_ds.scenes.layout import GRID, Axis, Cell, Extent, cells, layouts
from opt_ds.scenes.pictograms import FILLED
from opt_ds.scenes.truth import Group, SceneGraph
from opt_ds.scenes.vocabulary import GROUNDS, KINDS

#: Side of the images that are checked, in pixels.
CHECKED_SIDE = 64
_CODE = CHECKED_SIDE // GRID
_SHIFT = 2  # px by which an object may be displaced
_NEAR = 60.0**2  # squared distance of colours above which a pixel counts as no ground at all


@dataclass(frozen=True)
class Verdict:
    """What of an image is as asked. None: not asked for, or there is nothing to compare.

    `ground`: its colour. `layout`: number of groups and their axis. `objects`: the fraction of groups, in their
    places, of the right kind. `colour`, `count`, `size`: the fraction of groups of the right kind for which it is
    right as well. `whole`: everything that was asked for is right.
    """

    ground: bool | None
    layout: bool
    objects: float
    colour: float | None
    count: float | None
    size: float | None
    whole: bool


def check(image: np.ndarray, asked: SceneGraph, style: str = FILLED) -> Verdict:
    """Judge an image by the scene that it should show.

    Args:
        image: uint8 RGB, [64, 64, 3].
        asked: What was asked for: the graph of a caption, or of a scene.
        style: The drawing style of the image.
    """
    return compare(read_image(image, style), asked)


def compare(seen: SceneGraph, asked: SceneGraph) -> Verdict:
    """Judge what an image shows by what it should show. What `asked` does not mention is not judged."""
    ground = None if asked.ground is None else seen.ground == asked.ground
    layout = seen.axis == asked.axis and len(seen.groups) == len(asked.groups)
    pairs = list(zip(asked.groups, seen.groups, strict=False)) if layout else []
    right = [(want, have) for want, have in pairs if want.kind == have.kind]
    whole = layout and ground is not False and all(group_is_true(*pair) for pair in pairs)
    return Verdict(
        ground=ground,
        layout=layout,
        objects=len(right) / len(asked.groups),
        colour=_mean([want.colour == have.colour for want, have in right if want.colour is not None]),
        count=_mean([want.count == have.count for want, have in right]),
        size=_mean([want.size == have.size for want, have in right if want.size is not None]),
        whole=whole,
    )


def read_image(image: np.ndarray, style: str = FILLED) -> SceneGraph:
    """Return the scene graph that explains an image best: the smallest sum of squared differences over all pixels.

    Args:
        image: uint8 RGB, [64, 64, 3].
        style: The drawing style that the image is in.
    """
    pixels = image.astype(np.float32)
    ground = _ground(pixels)
    empty = ((pixels - np.array(GROUNDS[ground], np.float32)) ** 2).sum(-1)
    errors = _Errors(pixels, ground, style)
    best: tuple[float, SceneGraph] | None = None
    for extents, axis in layouts():
        total, groups = _explain(extents, axis, empty, errors)
        if best is None or total < best[0]:
            best = total, SceneGraph(groups, axis, ground)
    assert best is not None, "there are layouts"
    return best[1]


def for_checking(picture: Image.Image) -> np.ndarray:
    """Return an image as `check` takes it, scaled as `opt-ds prepare` scales the pixels of a store."""
    small = picture.convert("RGB").resize((CHECKED_SIDE, CHECKED_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(small)


def _explain(
    extents: tuple[Extent, ...], axis: Axis | None, empty: np.ndarray, errors: "_Errors"
) -> tuple[float, tuple[Group, ...]]:
    """Return the error of the best groups in one layout, and these groups."""
    total = empty.sum()
    groups = []
    for (count, size), places in zip(extents, cells(extents, axis), strict=True):
        appearance_errors = np.zeros(len(_appearances()), np.float32)
        for cell in places:
            appearance_errors += errors.of(cell)
            total -= empty[_span(cell.y, cell.side), _span(cell.x, cell.side)].sum()
        best = int(appearance_errors.argmin())
        total += appearance_errors[best]
        kind, colour = _appearances()[best]
        groups.append(Group(kind, count, colour, size))
    return float(total), tuple(groups)


class _Errors:
    """The squared differences between the cells of an image and every appearance of an object."""

    def __init__(self, pixels: np.ndarray, ground: str, style: str) -> None:
        padded = ((_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0))
        self._padded = np.pad(pixels, padded, mode="edge")
        self._ground, self._style = ground, style
        self._known: dict[Cell, np.ndarray] = {}

    def of(self, cell: Cell) -> np.ndarray:
        """Return the errors [appearances], each at the displacement that fits best."""
        if cell not in self._known:
            templates, squares = _templates(self._ground, self._style, cell.side)
            side = cell.side * _CODE
            left, top = cell.x * _CODE, cell.y * _CODE
            shifts = [(y, x) for y in range(2 * _SHIFT + 1) for x in range(2 * _SHIFT + 1)]
            crops = np.stack(
                [self._padded[top + y : top + y + side, left + x : left + x + side].ravel() for y, x in shifts]
            )
            distances = squares[:, None] - 2 * templates @ crops.T + (crops**2).sum(1)
            self._known[cell] = distances.min(1)
        return self._known[cell]


def _span(start: int, side: int) -> slice:
    return slice(start * _CODE, (start + side) * _CODE)


def _ground(pixels: np.ndarray) -> str:
    """Return the ground that most pixels are near."""
    names = list(GROUNDS)
    colours = np.array([GROUNDS[name] for name in names], np.float32)
    distances = ((pixels[:, :, None] - colours) ** 2).sum(-1)
    return names[int(np.minimum(distances, _NEAR).sum((0, 1)).argmin())]


@cache
def _appearances() -> list[tuple[str, str | None]]:
    """Return every kind in its own colours and in each of its tints."""
    return [(kind.name, colour) for kind in KINDS.values() for colour in (None, *kind.tints)]


@cache
def _templates(ground: str, style: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all appearances in a cell of `side` codes, float32 [appearances, values], and their squared norms."""
    colours, cover = _icons(style, side)
    templates = (colours + np.array(GROUNDS[ground], np.float32) * (1 - cover)).reshape(len(colours), -1)
    return templates, (templates**2).sum(1)


@cache
def _icons(style: str, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the premultiplied colours, float32 [appearances, s, s, 3], and the coverage, [appearances, s, s, 1], 0..1."""
    scale = IMAGE_SIDE // GRID
    size = (side * _CODE, side * _CODE)
    icons = (object_icon(*name, style, side * scale, scale) for name in _appearances())
    rgba = np.stack([np.asarray(icon.resize(size, Image.Resampling.LANCZOS), np.float32) for icon in icons])
    return rgba[..., :3], rgba[..., 3:] / 255


def _mean(values: list[bool]) -> float | None:
    return sum(values) / len(values) if values else None
