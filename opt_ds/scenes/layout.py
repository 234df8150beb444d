"""Where the objects of a scene are: squares on the 8 x 8 grid of image codes.

Counts, sizes and the axis alone determine them. One group stands in the middle. Of two groups, the first is at the left
or upper edge and the second at the opposite one.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from opt_ds.scenes.vocabulary import MOST_OBJECTS

Axis = Literal["horizontal", "vertical"]

#: Side of an image, in image codes.
GRID = 8
#: Side of an object by its size, in image codes.
SIDES: dict[str | None, int] = {"small": 3, None: 4, "large": 5}


@dataclass(frozen=True)
class Cell:
    """The square of an object: the column and row of its upper left corner and its side, in image codes."""

    x: int
    y: int
    side: int


#: What determines the cells of a group: how many objects, and their size.
Extent = tuple[int, str | None]


@cache
def fits(extents: tuple[Extent, ...]) -> bool:
    """Return whether an image has room for one or two groups of these extents."""
    counts = [count for count, _ in extents]
    crowded = any(count > 1 and 2 * SIDES[size] > GRID for count, size in extents)
    if min(counts) < 1 or sum(counts) > MOST_OBJECTS or crowded:
        return False
    return len(extents) == 1 or sum(SIDES[size] for _, size in extents) <= GRID


def cells(extents: tuple[Extent, ...], axis: Axis | None) -> tuple[tuple[Cell, ...], ...]:
    """Return the cells of each group's objects. `axis` is None for one group."""
    if len(extents) == 1:
        return (_alone(*extents[0]),)
    groups = []
    for place, (count, size) in enumerate(extents):
        side = SIDES[size]
        along = 0 if place == 0 else GRID - side
        across = [_middle(side)] if count == 1 else [0, GRID - side]
        groups.append(tuple(Cell(along, at, side) if axis == "horizontal" else Cell(at, along, side) for at in across))
    return tuple(groups)


def layouts() -> list[tuple[tuple[Extent, ...], Axis | None]]:
    """Return the extents and axis of every possible scene."""
    single: list[Extent] = [(count, size) for count in range(1, MOST_OBJECTS + 1) for size in SIDES]
    found: list[tuple[tuple[Extent, ...], Axis | None]] = [((extent,), None) for extent in single if fits((extent,))]
    for first in single:
        for second in single:
            if fits((first, second)):
                found += [((first, second), "horizontal"), ((first, second), "vertical")]
    return found


def _alone(count: int, size: str | None) -> tuple[Cell, ...]:
    side = SIDES[size]
    far, middle = GRID - side, _middle(side)
    if count == 1:
        return (Cell(middle, middle, side),)
    if count == 2:
        return Cell(0, middle, side), Cell(far, middle, side)
    return Cell(0, 0, side), Cell(far, 0, side), Cell(middle, far, side)


def _middle(side: int) -> int:
    return (GRID - side) // 2
