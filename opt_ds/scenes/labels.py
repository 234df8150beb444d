"""Labels of a scene that need binding: which colour belongs to which kind, and which kind stands where."""

from collections import Counter

from opt_ds.scenes.truth import SIDES_OF_AXIS, SceneGraph
from opt_ds.scenes.vocabulary import KINDS

#: Kinds of labels. Those of `object` need no binding.
LABEL_KINDS = ("object", "colour", "place", "relation")
_RELATION = {"horizontal": "left of", "vertical": "above"}
_PLACE = {"left": "on the left", "right": "on the right", "above": "above", "below": "below"}


def scene_labels(graph: SceneGraph) -> list[str]:
    """Return the labels: "cat", "red cat", "cat on the left", and of two groups "animal left of food".

    A label per pair of kinds ("cat left of dog") would be absent from training for held-out pairs and rare for others.
    The place of a kind and the relation of two categories need the same binding and are frequent.
    """
    return [label for _, label in labels_with_kinds(graph)]


def labels_with_kinds(graph: SceneGraph) -> list[tuple[str, str]]:
    """Return (one of LABEL_KINDS, label) of the labels of a scene."""
    labels = []
    for place, group in enumerate(graph.groups):
        labels.append(("object", group.kind))
        if group.colour is not None:
            labels.append(("colour", f"{group.colour} {group.kind}"))
        if graph.axis is not None:
            labels.append(("place", f"{group.kind} {_PLACE[SIDES_OF_AXIS[graph.axis][place]]}"))
    if graph.axis is not None:
        categories = [KINDS[group.kind].category for group in graph.groups]
        labels.append(("relation", f" {_RELATION[graph.axis]} ".join(categories)))
    return labels


def concepts(graph: SceneGraph) -> Counter[str]:
    """Return how often a scene has each kind, tint and axis: all that its labels are made of, without what is bound.

    Two scenes whose groups are swapped, or whose colours are exchanged, have the same concepts.
    """
    found: Counter[str] = Counter()
    for group in graph.groups:
        found[f"kind {group.kind}"] += 1
        found[f"category {KINDS[group.kind].category}"] += 1
        if group.colour is not None:
            found[f"colour {group.colour}"] += 1
    found[f"axis {graph.axis}"] += 1
    return found
