"""Labels of a scene that need binding: which colour belongs to which kind, and which kind stands where."""

from opt_ds.scenes.truth import SIDES_OF_AXIS, SceneGraph
from opt_ds.scenes.vocabulary import KINDS

_RELATION = {"horizontal": "left of", "vertical": "above"}
_PLACE = {"left": "on the left", "right": "on the right", "above": "above", "below": "below"}


def scene_labels(graph: SceneGraph) -> list[str]:
    """Return the labels: "cat", "red cat", "cat on the left", and of two groups "animal left of food".

    A label per pair of kinds ("cat left of dog") would be absent from training for held-out pairs and rare for others.
    The place of a kind and the relation of two categories need the same binding and are frequent.
    """
    labels = []
    for place, group in enumerate(graph.groups):
        labels.append(group.kind)
        if group.colour is not None:
            labels.append(f"{group.colour} {group.kind}")
        if graph.axis is not None:
            labels.append(f"{group.kind} {_PLACE[SIDES_OF_AXIS[graph.axis][place]]}")
    if graph.axis is not None:
        labels.append(f" {_RELATION[graph.axis]} ".join(KINDS[group.kind].category for group in graph.groups))
    return labels
