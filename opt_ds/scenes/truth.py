"""What a scene shows, as plain data: the truth that captions, questions and generated images are judged by."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from opt_ds.scenes.layout import Axis, Cell, cells, fits

#: Axis -> how the first group stands to the second, and the second to the first.
SIDES_OF_AXIS = {"horizontal": ("left", "right"), "vertical": ("above", "below")}


@dataclass(frozen=True)
class Group:
    """One to three equal objects. `colour` None: the pictogram's own colours. `size` None: between small and large."""

    kind: str
    count: int = 1
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class SceneGraph:
    """One or two groups, and the colour of the ground.

    The first of two groups is left of (`axis` horizontal) or above (vertical) the second, whatever words a caption
    uses. The graph of a caption has None for what the caption does not mention.
    """

    groups: tuple[Group, ...]
    axis: Axis | None = None
    ground: str | None = None

    @property
    def extents(self) -> tuple[tuple[int, str | None], ...]:
        """Count and size of each group, which determine the layout."""
        return tuple((group.count, group.size) for group in self.groups)

    @property
    def is_drawable(self) -> bool:
        """Whether an image has room for the objects, and two groups are of different kinds."""
        return fits(self.extents) and len({group.kind for group in self.groups}) == len(self.groups)

    def with_group(self, place: int, **changes: Any) -> "SceneGraph":
        """Return the graph with some fields of one group changed."""
        groups = list(self.groups)
        groups[place] = replace(groups[place], **changes)
        return replace(self, groups=tuple(groups))

    def to_json(self) -> dict[str, Any]:
        """Return the graph as plain values."""
        return {"groups": [asdict(group) for group in self.groups], "axis": self.axis, "ground": self.ground}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "SceneGraph":
        """Return the graph that `to_json` returned the values of."""
        return cls(tuple(Group(**group) for group in fields["groups"]), fields["axis"], fields["ground"])


@dataclass(frozen=True)
class PlacedObject:
    """An object of a scene and its cell."""

    kind: str
    colour: str | None
    size: str | None
    cell: Cell


@dataclass(frozen=True)
class Scene:
    """A complete scene graph (with a ground) and the drawing style of its image."""

    graph: SceneGraph
    style: str

    @property
    def objects(self) -> tuple[PlacedObject, ...]:
        """All objects, group by group."""
        places = cells(self.graph.extents, self.graph.axis)
        return tuple(
            PlacedObject(group.kind, group.colour, group.size, cell)
            for group, taken in zip(self.graph.groups, places, strict=True)
            for cell in taken
        )

    def to_json(self) -> dict[str, Any]:
        """Return the scene as plain values. The objects are included for readers in other languages."""
        return {**self.graph.to_json(), "style": self.style, "objects": [asdict(item) for item in self.objects]}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Scene":
        """Return the scene that `to_json` returned the values of."""
        return cls(SceneGraph.from_json(fields), fields["style"])
