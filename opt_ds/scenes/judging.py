"""Whether a caption is true of a scene, and whether it says everything that the scene's own captions say."""

from opt_ds.scenes.parser import parse_caption
from opt_ds.scenes.truth import Group, SceneGraph
from opt_ds.scenes.vocabulary import KINDS


def caption_is_true(text: str, truth: SceneGraph) -> bool:
    """Return whether all that a caption says holds, however it is worded. A text outside the grammar is not true."""
    said = parse_caption(text)
    return said is not None and graph_is_true(said, truth)


def caption_is_complete(text: str, truth: SceneGraph) -> bool:
    """Return whether a caption is true and names every group, their counts, tints and sizes, and how they stand.

    The ground may be left out, as some of the corpus's own captions do.
    """
    said = parse_caption(text)
    return said is not None and graph_is_true(said, truth) and graph_is_complete(said, truth)


def graph_is_true(said: SceneGraph, truth: SceneGraph) -> bool:
    """Return whether all facts of `said` hold in `truth`. One group may be any group of the truth."""
    if said.ground not in (None, truth.ground):
        return False
    if len(said.groups) == 1:
        return any(group_is_true(said.groups[0], group) for group in truth.groups)
    if said.axis != truth.axis or len(said.groups) != len(truth.groups):
        return False
    return all(group_is_true(*pair) for pair in zip(said.groups, truth.groups, strict=True))


def graph_is_complete(said: SceneGraph, truth: SceneGraph) -> bool:
    """Return whether a true graph leaves nothing out but the ground."""
    if len(said.groups) != len(truth.groups):
        return False
    pairs = list(zip(said.groups, truth.groups, strict=True))
    return all(bool(said.colour) >= bool(true.colour) and bool(said.size) >= bool(true.size) for said, true in pairs)


def group_is_true(said: Group, true: Group) -> bool:
    """Return whether a group is as said. A colour may be the pictogram's own; colour and size may be unmentioned."""
    if (said.kind, said.count) != (true.kind, true.count) or said.size not in (None, true.size):
        return False
    return said.colour in (None, true.colour or KINDS[true.kind].own_colour)
